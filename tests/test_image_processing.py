import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_k26.image_processing_kimi_k26 import (
    KimiK26ImageProcessor,
    MediaConfig,
    choose_frames,
    fit,
    is_image,
    is_video,
    nest,
    timestamp,
    write_patches,
)
from kimi_k26.media_kimi_k26 import MediaError, MediaLimits

from .media_samples import golden_picture, make_video, numbered_frame

PUBLISHED = {
    "auto_map": {
        "AutoProcessor": "kimi_k25_processor.KimiK25Processor",
        "AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor",
    },
    "media_proc_cfg": {
        "in_patch_limit": 16384,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 512,
        "in_patch_limit_each_frame": 4096,
        "in_patch_limit_video": None,
        "sample_fps": 2.0,
        "max_num_frames_each_video": None,
        "temporal_merge_kernel_size": 4,
        "timestamp_mode": "hh:mm:ss.fff",
    },
}


def reference_patches(picture, width, height, rows, columns, mean, std, patch=14):
    """The pipeline in plain NumPy and float64."""
    picture = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.zeros((rows * patch, columns * patch, 3))
    pixels[:height, :width] = np.asarray(picture)
    pixels = (pixels / 255 - np.array(mean)) / np.array(std)
    return pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch)


def test_golden_sizes(golden):
    processor, config = KimiK26ImageProcessor(), MediaConfig()
    for row in json.loads((golden / "media.json").read_text())["sizes"]:
        width, height = row["width"], row["height"]
        targets = {"image": config.fit_image(width, height), "video_frame": config.fit_frame(width, height, 1)}
        for key, target in targets.items():
            want = row[key]
            assert (target.width, target.height) == (want["new_width"], want["new_height"]), row
            assert [target.rows, target.columns] == want["grid_hw"], row
            assert target.columns * 14 == want["new_width"] + want["pad_width"]
            assert target.rows * 14 == want["new_height"] + want["pad_height"]
            assert config.tokens(target) == want["num_tokens"]
        assert processor.get_num_image_tokens(height, width) == row["image"]["num_tokens"]
        assert processor.get_number_of_image_patches(height, width) == math.prod(row["image"]["grid_hw"])
        assert processor.get_num_video_tokens(height, width, 1, 30.0) == row["video_frame"]["num_tokens"]


def test_golden_pixels(golden):
    processor = KimiK26ImageProcessor()
    for row in json.loads((golden / "media.json").read_text())["pixels"]:
        picture = golden_picture(row["width"], row["height"], row["seed"])
        output = processor(picture, return_tensors="pt")
        assert output["grid_thws"].tolist() == [row["grid_thw"]] and output["grid_thws"].dtype == torch.int64
        values = output["pixel_values"]
        assert list(values.shape) == row["shape"] and values.dtype == torch.float32
        probes = next(row[key] for key in row if key.startswith("probe") and key != "probe_index")
        difference = values.flatten()[row["probe_index"]].double() - torch.tensor(probes, dtype=torch.float64)
        assert difference.abs().max() <= 1e-6
        assert abs(values.double().mean().item() - row["mean"]) < 1e-6
        assert abs(values.double().std(unbiased=False).item() - row["std"]) < 1e-6


def test_golden_frames(golden):
    for row in json.loads((golden / "media.json").read_text())["videos"]:
        indices = choose_frames(row["total_frames"], row["fps"], 2.0)
        assert indices == row["frame_indices"]
        assert [timestamp(i / row["fps"], "hh:mm:ss.fff") for i in indices[::4]] == row["chunk_timestamps"]
        assert [len(indices[i : i + 4]) for i in range(0, len(indices), 4)] == row["chunk_frames"]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (300, 200), (29, 57), (500, 20)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        {"image_mean": 0.0, "image_std": 1.0, "in_patch_limit": 40},
        {"merge_kernel_size": [1, 2], "patch_size": 16, "patch_limit_on_one_side": 8},
    ],
)
def test_pixels_against_plain_numpy(size, settings):
    processor = KimiK26ImageProcessor(**settings)
    picture = golden_picture(*size, seed=6)
    config = processor.media_config()
    target = config.fit_image(*size)
    encoded = processor.encode_image(picture)
    expected = reference_patches(
        picture, target.width, target.height, target.rows, target.columns, config.mean, config.std, config.patch_size
    )
    assert encoded.grid_thws == [[1, target.rows, target.columns]]
    assert np.abs(encoded.pixel_values.double().numpy() - expected).max() <= 1e-6
    assert encoded.tokens == [processor.get_num_image_tokens(size[1], size[0])]


@pytest.mark.parametrize("parts", [2, 3, 50])
@pytest.mark.parametrize(
    "size, settings",
    [
        ((1, 1), {}),
        ((333, 257), {}),
        ((700, 501), {"in_patch_limit": 300}),
        ((1500, 40), {"patch_limit_on_one_side": 64}),
        ((90, 700), {"patch_limit_on_one_side": 12, "merge_kernel_size": [2, 6]}),
        ((300, 600), {"in_patch_limit": 200}),
        ((301, 599), {"in_patch_limit": 200}),
        ((29, 400), {"in_patch_limit": 9, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]}),
    ],
)
def test_parts_have_the_bits_of_the_whole(size, settings, parts):
    config = MediaConfig(**settings)
    target, picture = config.fit_image(*size), Image.fromarray(golden_picture(*size, seed=3))
    whole, cut, threaded = torch.full((3, target.rows * target.columns, 3, 14, 14), torch.nan)
    write_patches(picture, target, 14, config.mean, config.std, whole)
    write_patches(picture, target, 14, config.mean, config.std, cut, parts)
    with ThreadPoolExecutor(3) as pool:
        write_patches(picture, target, 14, config.mean, config.std, threaded, parts, pool.map)
    assert torch.equal(cut, whole) and torch.equal(threaded, whole) and whole.isfinite().all()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_give_the_same_pixels(three_threads):
    processor, pictures = KimiK26ImageProcessor(), [golden_picture(900, 700, seed) for seed in range(8)]
    config, target = MediaConfig(), MediaConfig().fit_image(900, 700)
    expected = torch.empty(8, target.rows * target.columns, 3, 14, 14)
    for picture, out in zip(pictures, expected):
        write_patches(Image.fromarray(picture), target, 14, config.mean, config.std, out)
    assert torch.equal(processor.encode_image(pictures[0]).pixel_values, expected[0])
    assert torch.equal(processor.encode_video(pictures, fps=1).pixel_values, expected.flatten(0, 1))
    pictures[-1] = pictures[-1][1:]
    with pytest.raises(MediaError, match="one size"):
        processor.encode_video(pictures, fps=1)


def test_video_is_cut_into_clips():
    processor = KimiK26ImageProcessor()
    frames = [numbered_frame(k) for k in range(75)]
    encoded = processor.encode_video(frames, fps=25)
    assert encoded.grid_thws == [[4, 4, 6], [2, 4, 6]]
    assert encoded.timestamps == ["00:00:00.000", "00:00:02.359"]
    assert encoded.tokens == [6, 6] and sum(encoded.tokens) == processor.get_num_video_tokens(48, 64, 75, 25)
    for at, index in enumerate([0, 15, 30, 44, 59, 74]):
        expected = reference_patches(frames[index], 64, 48, 4, 6, [0.5] * 3, [0.5] * 3)
        assert np.abs(encoded.pixel_values[at * 24 : (at + 1) * 24].numpy() - expected).max() <= 1e-6
    from_file = processor.encode_video(make_video("mp4", "mpeg4", frames=75, rate=25))
    assert (from_file.grid_thws, from_file.timestamps) == (encoded.grid_thws, encoded.timestamps)


@pytest.mark.parametrize(
    "settings, frames, tokens",
    [
        ({"sample_fps": 1.0}, [3], 6),
        ({"max_num_frames_each_video": 5}, [4, 1], 12),
        ({"temporal_merge_kernel_size": 3}, [3, 3], 12),
        ({"in_patch_limit_each_frame": 4}, [4, 2], 4),
        ({"in_patch_limit_video": 24}, [4, 2], 4),
        ({"fixed_output_tokens": 5}, [4, 2], 10),
    ],
)
def test_video_settings(settings, frames, tokens):
    for processor, call in ((KimiK26ImageProcessor(**settings), {}), (KimiK26ImageProcessor(), settings)):
        encoded = processor.encode_video([numbered_frame(k) for k in range(75)], fps=25, **call)
        assert [grid[0] for grid in encoded.grid_thws] == frames
        assert sum(encoded.tokens) == tokens == processor.get_num_video_tokens(48, 64, 75, 25.0, **call)


def test_timestamps():
    assert timestamp(59 / 25, "hh:mm:ss.fff") == "00:00:02.359"  # cut, with the rounding of the division
    assert timestamp(3725.5, "hh:mm:ss.fff") == "01:02:05.500"
    assert timestamp(90000.0, "hh:mm:ss.fff") == "25:00:00.000"
    assert timestamp(3725.5, "mm:ss.fff") == "62:05.500"
    assert timestamp(65.999, "mm:ss") == "01:05"


@pytest.mark.parametrize(
    "key, value",
    [
        ("in_patch_limit", 0),
        ("patch_size", 14.0),
        ("patch_size", True),
        ("in_patch_limit_each_frame", None),
        ("in_patch_limit_video", -1),
        ("fixed_output_tokens", "many"),
        ("max_num_frames_each_video", 0),
        ("temporal_merge_kernel_size", [4]),
        ("merge_kernel_size", [2, 2, 2]),
        ("patch_limit_on_one_side", 511),
        ("image_mean", [0.5, 0.5]),
        ("image_std", 0.0),
        ("image_std", [0.5, 0.5, math.inf]),
        ("sample_fps", 0),
        ("sample_fps", math.nan),
        ("timestamp_mode", "ss"),
    ],
)
def test_wrong_settings_name_their_key(key, value):
    with pytest.raises(ValueError, match=key):
        KimiK26ImageProcessor(media_proc_cfg={key: value})
    with pytest.raises(ValueError, match=key):
        KimiK26ImageProcessor().encode_image(numbered_frame(0), **{key: value})


def test_unknown_settings_are_refused_in_a_call_and_kept_in_a_file():
    with pytest.raises(TypeError, match="patch_limit"):
        KimiK26ImageProcessor()(numbered_frame(0), patch_limit=3)
    assert KimiK26ImageProcessor(media_proc_cfg={"later": 1}).to_dict()["media_proc_cfg"]["later"] == 1
    with pytest.raises(ValueError, match="media_proc_cfg"):
        KimiK26ImageProcessor(media_proc_cfg=[1])


def test_published_file_survives_a_round_trip(tmp_path):
    values = {**PUBLISHED["media_proc_cfg"], "more": "x"}
    content = {**PUBLISHED, "something": {"else": [1, 2]}, "media_proc_cfg": values}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = KimiK26ImageProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert {key: saved[key] for key in content} == content
    assert set(saved) - set(content) == {"image_processor_type", "processor_class"}


def test_missing_values_and_missing_file_take_the_published_ones(tmp_path):
    assert KimiK26ImageProcessor.from_pretrained(tmp_path).media_proc_cfg == PUBLISHED["media_proc_cfg"]
    (tmp_path / "preprocessor_config.json").write_text('{"media_proc_cfg": {"in_patch_limit": 64}}')
    processor = KimiK26ImageProcessor.from_pretrained(tmp_path, sample_fps=4.0)
    assert processor.media_proc_cfg == {**PUBLISHED["media_proc_cfg"], "in_patch_limit": 64, "sample_fps": 4.0}
    assert processor.get_num_image_tokens(224, 224) == 16
    with pytest.raises(OSError):
        KimiK26ImageProcessor.from_pretrained(tmp_path / "nowhere")


def test_limits_are_saved_and_overridden(tmp_path):
    processor = KimiK26ImageProcessor(media_limits={"max_image_pixels": 100})
    processor.save_pretrained(tmp_path)
    again = KimiK26ImageProcessor.from_pretrained(tmp_path)
    assert again.media_limits == MediaLimits(max_image_pixels=100)
    with pytest.raises(MediaError, match=r"images\[1\].*max_image_pixels=100"):
        again([np.zeros((10, 10, 3), np.uint8), np.zeros((10, 11, 3), np.uint8)])
    assert again(np.zeros((10, 11, 3), np.uint8), media_limits=MediaLimits())["grid_thws"].tolist() == [[1, 2, 2]]
    with pytest.raises(ValueError, match="max_height"):
        KimiK26ImageProcessor(media_limits={"max_height": 3})


def test_batches_of_pictures_and_videos():
    processor = KimiK26ImageProcessor()
    frames = [numbered_frame(k) for k in range(8)]
    for return_tensors, kind in ((None, torch.Tensor), ("pt", torch.Tensor), ("np", np.ndarray)):
        output = processor(frames[:2], [frames, np.stack(frames)], fps=[2.0, 4], return_tensors=return_tensors)
        assert isinstance(output["pixel_values"], kind) and isinstance(output["grid_thws"], kind)
        assert output["grid_thws"].tolist() == [[1, 4, 6], [1, 4, 6], [4, 4, 6], [4, 4, 6], [4, 4, 6]]
        assert len(output["pixel_values"]) == 14 * 24
    with pytest.raises(ValueError, match="no picture"):
        processor()
    with pytest.raises(ValueError, match="1 rates were given for 2 videos"):
        processor(videos=[frames, frames], fps=[2.0])
    with pytest.raises(ValueError, match="sample_fps"):
        processor(videos=[make_video(frames=2)], fps=2.0)
    with pytest.raises(MediaError, match=r"videos\[0\]: .*fps"):
        processor(videos=[frames])


def test_nesting():
    picture, array = Image.new("RGB", (2, 2)), np.zeros((2, 2, 3), np.uint8)
    assert nest("a.png", is_image, 1) == (["a.png"], None)
    assert nest(["a", "b"], is_image, 2) == (["a", "b"], None)
    assert nest([["a"], ["b", "c"]], is_image, 2) == (["a", "b", "c"], [1, 2])
    assert nest([["a"], None], is_image, 2) == (["a"], [1, 0])
    assert len(nest(np.zeros((3, 2, 2, 3)), is_image, 1)[0]) == 3
    assert len(nest([picture, array], is_video, 1)[0]) == 1
    assert len(nest([[picture, array], [array]], is_video, 2)[0]) == 2
    assert nest([["a.mp4"], ["b.mp4", "c.mp4"]], is_video, 2) == (["a.mp4", "b.mp4", "c.mp4"], [1, 2])
    assert [len(v) for v in nest([[[array] * 2], [[array] * 3]], is_video, 2)[0]] == [2, 3]
    with pytest.raises(TypeError, match="dict"):
        nest([{"url": "a"}], is_image, 1)


def test_fit_refuses_empty_pictures():
    with pytest.raises(ValueError, match="0x5"):
        fit(0, 5, 16384, 14, (2, 2), 512)
    with pytest.raises(ValueError, match="num_frames"):
        KimiK26ImageProcessor().get_num_video_tokens(5, 5, 0, 1.0)
    with pytest.raises(ValueError, match="fps"):
        KimiK26ImageProcessor().get_num_video_tokens(5, 5, 3, 0.0)
