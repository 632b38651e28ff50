"""The benchmarks of pictures, video and MoonViT in small: what is measured is worth nothing here, how it is measured is."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import kimi_k26
from kimi_k26.image_processing_kimi_k26 import MediaConfig
from kimi_k26.video_kimi_k26 import read_video

from .media_samples import golden_picture
from .test_benchmarks import load

pytestmark = pytest.mark.once

BENCHMARKS = Path(kimi_k26.__file__).resolve().parent / "benchmarks"


def run(script: str, folder: Path, *options) -> tuple[str, dict]:
    """What a script printed, and its JSON."""
    files = ["--work", folder, "--json", folder / "out.json", "--plot", folder / "out.png", "--threads", "1"]
    command = [str(word) for word in (sys.executable, BENCHMARKS / script, *options, *files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_pictures_and_video_beside_their_peers(tmp_path):
    sizes = ["--pictures", "300x200", "--seconds", "1.5", "--size", "160x120"]
    printed, results = run("media.py", tmp_path, *sizes, "--rounds", "2", "--video-rounds", "1")
    measured = {(row["what"].partition(" ")[0], row["engine"]): row for row in results["rows"]}
    engines = {"picture": ("kimi_k26", "numpy", "numpy-float32"), "video,": ("kimi_k26", "pyav", "pyav-spare")}
    assert set(measured) == {(what, engine) for what, names in engines.items() for engine in names}
    for (what, _), row in measured.items():
        assert row["count"] == (2 if what == "picture" else 1)
        assert 0 < row["fastest"] <= row["median"] <= row["slowest"] and row["limit"] > 0
    assert "| picture 300 × 200 |" in printed and "3 frames of it" in printed and "NumPy as published" in printed


@pytest.mark.parametrize("size", [(40, 30), (700, 300)])
def test_the_published_arithmetic_is_that_of_plain_python(size, monkeypatch):
    published = load("media", monkeypatch).published
    config = MediaConfig(in_patch_limit=200, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    target, picture = config.fit_image(*size), Image.fromarray(golden_picture(*size, seed=1))
    scaled = np.asarray(picture.resize((target.width, target.height), Image.Resampling.BICUBIC))
    for dtype in (np.float64, np.float32):
        patches = published(picture, config, target, dtype)
        assert patches.shape == (target.rows * target.columns, 3, 14, 14) and patches.dtype == np.float32
        for number, channel, y, x in ((0, 0, 0, 0), (target.columns + 1, 1, 3, 5), (len(patches) - 1, 2, 13, 13)):
            row, column = number // target.columns * 14 + y, number % target.columns * 14 + x
            inside = row < target.height and column < target.width
            value = scaled[row, column, channel] / 255 if inside else 0.0
            expected = (value - config.mean[channel]) / config.std[channel]
            assert patches[number, channel, y, x] == pytest.approx(expected, abs=1e-6)


def test_the_frames_that_pyav_decodes_are_those_the_processor_looks_at(tmp_path, monkeypatch):
    media = load("media", monkeypatch)
    path, indices = tmp_path / "made.mp4", [0, 4, 5, 11]
    media.make_video(path, 0.5, 96, 64, 30)
    ours = [np.asarray(frame) for frame in read_video(path, lambda *_: indices).frames]
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 15
    for decode in (media.decoded, media.decoded_sparingly):
        assert all(np.array_equal(frame, own) for frame, own in zip(decode(path, indices), ours, strict=True))


def test_every_frame_of_the_video_moves(monkeypatch):
    frames = list(load("moving", monkeypatch).frames(20, 400, 300, 30))
    assert all(frame.shape == (300, 400, 3) and frame.dtype == np.uint8 for frame in frames)
    assert all((one != other).mean() > 0.5 for one, other in zip(frames, frames[1:]))
    assert np.array_equal(frames[3], list(load("moving", monkeypatch).frames(4, 400, 300, 30))[3])


def test_a_picture_through_the_tower(tmp_path):
    sizes = ["--size", "small", "--grid", "6", "4", "--large", "8", "8", "--rounds", "2"]
    printed, results = run("vision.py", tmp_path, "--engines", "kimi_k26", "--profile", *sizes)
    (row,), (memory,) = results["time"], results["memory"]
    assert row["count"] == 2 and 0 < row["limit"] < row["fastest"] <= row["median"] <= row["slowest"]
    assert memory["bytes"] > 0 and memory["grid"] == [8, 8] and results["versions"]["torch"] == torch.__version__
    assert "| time, 6 × 4 patches |" in printed and "| memory, 8 × 8 patches |" in printed
    assert "under the profiler" in printed and results["profile"]["all"] > 0


def test_operations_are_those_of_the_products(monkeypatch):
    vision = load("vision", monkeypatch)
    sizes = {"vt_hidden_size": 8, "vt_intermediate_size": 20, "vt_num_hidden_layers": 3, "text_hidden_size": 10}
    config = {"vision_config": {**sizes, "merge_kernel_size": [2, 2], "patch_size": 14}}
    linear = 8 * 24 + 8 * 8 + 8 * 20 + 20 * 8  # wqkv, wo, fc0, fc1
    tower = 3 * (4 * linear + 2 * 4 * 4 * 8)  # scores and weighted values of 4 patches
    expected = tower + 4 * 3 * 14 * 14 * 8 + 32 * 32 + 32 * 10  # patches become one token
    assert vision.operations(config, 4) == 2 * expected
