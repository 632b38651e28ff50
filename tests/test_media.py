import base64
import io
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import kimi_k26.media_kimi_k26 as media
from kimi_k26.media_kimi_k26 import MediaError, MediaLimits, load_image, read_video

from .media_samples import data_uri, make_audio, make_video, number_of, numbered_frame, picture_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
PNG = picture_bytes(PICTURE)


def every(total, fps):
    return list(range(total))


def numbers(source, indices=None, **kwargs):
    video = read_video(source, every if indices is None else lambda total, fps: indices, **kwargs)
    return [number_of(frame) for frame in video.frames]


# -- pictures


@pytest.mark.parametrize("form", ["str", "Path", "file", "file%20", "bytes", "bytearray", "object", "base64", "uri"])
def test_sources_of_a_picture(form, tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    source = {
        "str": str(path),
        "Path": path,
        "file": f"file://{path}",
        "file%20": path.as_uri(),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "object": io.BytesIO(PNG),
        "base64": text,
        "uri": data_uri(PNG),
    }[form]
    assert np.array_equal(load_image(source), PIXELS)


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(PNG, gap=" "),
        data_uri(PNG, kind="application/octet-stream"),
        "DATA:image/png;name=a.png;BASE64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D"),
    ],
)
def test_forms_of_data_uris(uri):
    assert np.array_equal(load_image(uri), PIXELS)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "La"]
)
def test_modes_become_rgb_as_pillow_does_it(mode):
    if mode in ("La", "RGBa"):
        picture = PICTURE.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "PA":
        picture = PICTURE.convert("P").convert("PA")
    else:
        picture = PICTURE.convert("I").convert(mode) if mode == "I;16" else PICTURE.convert(mode)
    expected = (picture.convert("LA") if mode == "La" else picture).convert("RGB")
    got = load_image(picture)
    assert got.mode == "RGB" and np.array_equal(got, expected)


def test_transparent_palette_and_alpha_are_dropped():
    rgba = Image.fromarray(np.dstack([PIXELS, np.full((20, 30), 7, np.uint8)]))
    assert np.array_equal(load_image(picture_bytes(rgba)), PIXELS)
    palette = PICTURE.convert("P")
    stored = picture_bytes(palette, transparency=3)
    assert np.array_equal(load_image(stored), palette.convert("RGB"))


def test_first_frame_of_an_animation_and_no_exif_rotation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    gif = picture_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(picture_bytes(PICTURE, "PNG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float64) / 255,
        (PIXELS / 255.0).astype(np.float32).transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255,
        np.dstack([PIXELS, PIXELS[..., :1]]),
    ],
)
def test_arrays(array):
    assert np.array_equal(load_image(array), PIXELS)


def test_gray_and_boolean_arrays():
    gray = PIXELS[..., 0]
    expected = np.repeat(gray[..., None], 3, -1)
    for array in (gray, gray[..., None], gray[None], torch.from_numpy(gray), np.dstack([gray, gray])):
        assert np.array_equal(load_image(array), expected)
    assert np.array_equal(load_image(gray > 99), np.where(expected > 99, 255, 0))


@pytest.mark.parametrize(
    "source, words",
    [
        (b"", "empty"),
        ("", "empty"),
        ("no/such/file.png", "not an existing file"),
        (Path("no/such/file.png"), "cannot open"),
        (b"not a picture at all", "not a picture"),
        (PNG[:-300], "damaged or truncated"),
        (picture_bytes(PICTURE.resize((300, 200)), "JPEG")[:-2000], "damaged or truncated"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64", "without a comma"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS"),
        (12, "cannot read a int"),
        (np.zeros((6, 7, 5)), "shape"),
        (np.full((4, 4, 3), 2.0), "0..1"),
        (np.full((4, 4, 3), np.nan), "0..1"),
        (np.full((4, 4), 300), "0..255"),
        (np.zeros((4, 4), complex), "complex"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
    ],
)
def test_what_is_no_picture(source, words):
    with pytest.raises(MediaError, match=words):
        load_image(source)


def test_picture_limits():
    with pytest.raises(MediaError, match="600 is over the limit max_image_pixels=599"):
        load_image(PNG, MediaLimits(max_image_pixels=599))
    assert load_image(PNG, MediaLimits(max_image_pixels=600)).size == (30, 20)
    for source in (PICTURE, PIXELS):
        with pytest.raises(MediaError, match="max_image_pixels"):
            load_image(source, MediaLimits(max_image_pixels=1))
    for source in (PNG, data_uri(PNG)):
        with pytest.raises(MediaError, match="max_bytes"):
            load_image(source, MediaLimits(max_bytes=100))
    with pytest.raises(ValueError, match="max_bytes"):
        MediaLimits(max_bytes=0)


def test_size_is_checked_before_pixels_are_decoded():
    # a header that promises 10^10 pixels, without any of them, and one over Pillow's warning: no warning leaks
    header = bytearray(PNG)
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(MediaError, match="limit"):
        load_image(bytes(header))
    header[16:24] = (10_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="max_image_pixels=5e"):
            load_image(bytes(header), MediaLimits(max_image_pixels=50_000_000))


# -- videos

CODECS = [
    ("mp4", "libx264", {}),
    ("mp4", "mpeg4", {"gop_size": 10, "max_b_frames": 2}),
    ("mp4", "libx264", {"options": {"x264-params": "open-gop=1:bframes=3:keyint=10"}}),
    ("matroska", "libx264", {"gop_size": 8}),
    ("webm", "libvpx-vp9", {"gop_size": 20}),
    ("webm", "libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}}),
    ("gif", "gif", {"rate": 10}),
    ("avi", "libx264", {"gop_size": 10}),
    ("avi", "mjpeg", {}),
    ("mpegts", "libx264", {"gop_size": 10}),
    ("h264", "libx264", {"gop_size": 10}),
]


@pytest.fixture(scope="module", params=CODECS, ids=lambda c: f"{c[0]}-{c[1]}")
def encoded(request):
    container, codec, options = request.param
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    return container, make_video(container, codec, **options)


@pytest.mark.parametrize("indices", [None, [0, 29, 59], [59], [31, 31, 40]])
def test_frames_by_index_in_every_container(encoded, indices):
    container, data = encoded
    assert numbers(data, indices) == (list(range(60)) if indices is None else indices)
    video = read_video(data, every)
    assert (video.total_frames, video.width, video.height) == (60, 64, 48)
    assert video.fps == {"gif": 10.0, "h264": 25.0}.get(container, 30.0)  # a bare stream has no rate: FFmpeg's 25


def plainly_decoded(data):
    with av.open(io.BytesIO(data)) as container:
        return [np.asarray(frame.to_image()) for frame in container.decode(video=0)]


@pytest.mark.parametrize("indices", [range(60), range(0, 60, 7), [13, 13, 58]])
def test_pixels_are_those_of_the_whole_video_decoded(encoded, indices):
    """Whatever is left out on the way to the frames that are asked for."""
    whole = plainly_decoded(encoded[1])
    for index, frame in zip(indices, read_video(encoded[1], lambda *_: list(indices)).frames, strict=True):
        assert np.array_equal(frame, whole[index])


def test_truncated_videos(encoded):
    container, data = encoded
    if container in ("mpegts", "h264"):
        pytest.skip("a stream may be cut anywhere")
    for part in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(MediaError, match="truncated"):
            numbers(data[: int(len(data) * part)])


@pytest.mark.parametrize("form", ["path", "uri", "object", "base64"])
def test_sources_of_a_video(form, tmp_path):
    data = make_video(frames=5)
    (tmp_path / "clip").write_bytes(data)
    source = {
        "path": tmp_path / "clip",
        "uri": data_uri(data, "video/mp4", " "),
        "object": io.BytesIO(data),
        "base64": base64.b64encode(data).decode(),
    }[form]
    assert numbers(source) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25), Fraction(1, 2), 60])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_constant_rates_are_exact(rate, container):
    assert read_video(make_video(container, frames=7, rate=rate), every).fps == float(rate)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rate_counts_frames_and_averages_the_rate(container):
    times = [0, 40, 80, 1000, 1040, 3000, 3900]  # milliseconds
    video = read_video(make_video(container, frames=7, times=times), every)
    assert video.total_frames == 7
    assert [number_of(frame) for frame in video.frames] == list(range(7))
    assert 7 / 5.0 < video.fps <= 7 / 3.9  # how long the last frame lasts, each container says in its own way


@pytest.fixture
def decoded(monkeypatch):
    """The frames that decoders gave out."""
    decoded = []
    original = media._open_container

    class Packets:
        def __init__(self, container):
            self.container, self.format = container, container.format

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            for packet in self.container.demux(stream):
                yield Counted(packet)

    class Counted:
        def __init__(self, packet):
            self.packet = packet

        def __getattr__(self, name):
            return getattr(self.packet, name)

        def decode(self):
            frames = self.packet.decode()
            decoded.extend(frames)
            return frames

    def open_counted(file, name):
        container, stream = original(file, name)
        stream.thread_type = "NONE"
        return Packets(container), stream

    monkeypatch.setattr(media, "_open_container", open_counted)
    return decoded


def test_only_needed_frames_are_decoded(decoded):
    data = make_video("mp4", "mpeg4", frames=200, gop_size=10)
    assert numbers(data, [0, 95, 150]) == [0, 95, 150]
    # from key frame to wanted frame, at most a group of pictures (12) each; walking there would take 151
    assert 3 <= len(decoded) <= 25


def test_frames_that_no_other_needs_are_left_out(decoded):
    # groups of one reference and three frames between, of which none is a reference
    options = {"x264-params": "bframes=3:b-pyramid=none:b-adapt=0:keyint=60:scenecut=0"}
    assert numbers(make_video("mp4", "libx264", options=options), [1, 30, 50]) == [1, 30, 50]
    assert 3 <= len(decoded) <= 51 // 4 + 3 + 2  # references, wanted frames, and what comes after the last one


def test_a_frame_that_is_lost_when_others_are_left_out_is_decoded_with_them(monkeypatch):
    original = media._decode_between

    def forgetful(file, timeline, indices, sparing):
        for at, frame in enumerate(original(file, timeline, indices, sparing)):
            if sparing and at == 2:
                return
            yield frame

    monkeypatch.setattr(media, "_decode_between", forgetful)
    data = make_video("mp4", "libx264", gop_size=8)
    assert numbers(data, [3, 9, 9, 10, 31, 59]) == [3, 9, 9, 10, 31, 59]


def test_decoding_is_lazy_and_closes_the_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_video(frames=30))
    video = read_video(path, every)
    assert number_of(next(video.frames)) == 0
    video.frames.close()
    path.unlink()


@pytest.mark.parametrize(
    "frames",
    [
        [numbered_frame(k) for k in range(6)],
        [Image.fromarray(numbered_frame(k)) for k in range(6)],
        np.stack([numbered_frame(k) for k in range(6)]),
        torch.from_numpy(np.stack([numbered_frame(k) for k in range(6)])).permute(0, 3, 1, 2),
    ],
)
def test_decoded_frames(frames):
    assert numbers(frames, [0, 2, 5], fps=4) == [0, 2, 5]
    assert numbers({"frames": frames, "fps": 4.0}) == list(range(6))
    assert read_video(frames, every, fps=Fraction(30000, 1001)).fps == 30000 / 1001


def test_what_is_no_video(tmp_path):
    (tmp_path / "notes.ans").write_text("plain text " * 50)
    frames = [numbered_frame(0)]
    for source, fps, words in [
        (PNG, None, "no video stream"),
        (make_audio(), None, "no video stream"),
        (tmp_path / "notes.ans", None, "not a video|no video stream"),
        (b"plain text", None, "not a video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", None, "not a video"),
        ("no/such.mp4", None, "not an existing file"),
        (make_video(frames=3), 30, "sample_fps"),
        (frames, None, "give fps"),
        (frames, 0, "positive"),
        (frames, float("nan"), "positive"),
        (frames, "30", "give fps"),
        ([], 1, "no frames"),
        (np.zeros((3, 4)), 1, "shape"),
        ({"frames": frames}, None, "'fps'"),
    ]:
        with pytest.raises(MediaError, match=words):
            numbers(source, fps=fps)
    with pytest.raises(MediaError, match="one size"):
        numbers([numbered_frame(0), numbered_frame(1, 80, 48)], fps=1)


def test_video_limits():
    data = make_video(frames=30)
    tight = {"max_video_frames": 29, "max_video_seconds": 0.9, "max_video_pixels": 3071, "max_bytes": 99}
    for name, value in tight.items():
        with pytest.raises(MediaError, match=name):
            numbers(data, limits=MediaLimits(**{name: value}))
        if name != "max_bytes":
            with pytest.raises(MediaError, match=name):
                numbers([numbered_frame(k) for k in range(30)], fps=30, limits=MediaLimits(**{name: value}))
    limits = MediaLimits(max_video_frames=30, max_video_seconds=1, max_video_pixels=3072)
    assert numbers(data, limits=limits) == list(range(30))


def test_damage_inside_a_video():
    # a container without sizes or an index: only decoding shows that the last frame is incomplete
    data = make_video("nut", "mpeg4")
    with pytest.raises(MediaError, match="damaged or truncated: frame"):
        numbers(data[: int(len(data) * 0.6)])
    broken = bytearray(make_video("mp4", "mpeg4"))
    start = broken.index(b"mdat") + 400
    broken[start : start + 1500] = bytes(1500)
    with pytest.raises(MediaError, match="damaged or truncated"):
        numbers(bytes(broken))


def test_http_goes_through_the_library(monkeypatch):
    asked = []

    def picture(url, timeout=None):
        asked.append(url)
        return PICTURE

    def film(url, backend, sample_indices_fn):
        asked.append(url)

        class Metadata:
            total_num_frames, fps, width, height = 10, 5.0, 64, 48

        return np.stack([numbered_frame(k) for k in sample_indices_fn(metadata=Metadata)]), Metadata

    monkeypatch.setattr(media, "library_load_image", picture)
    monkeypatch.setattr(media, "library_load_video", film)
    assert np.array_equal(load_image("https://example.org/a.png"), PIXELS)
    assert numbers("https://example.org/a.mp4", [0, 4, 9]) == [0, 4, 9]
    assert asked == ["https://example.org/a.png", "https://example.org/a.mp4"]
    with pytest.raises(MediaError, match="max_video_frames"):
        numbers("https://example.org/a.mp4", limits=MediaLimits(max_video_frames=9))
