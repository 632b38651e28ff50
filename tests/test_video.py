import base64
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import kimi_k26.video_kimi_k26 as video_module
from kimi_k26.media_kimi_k26 import MediaError, MediaLimits
from kimi_k26.video_kimi_k26 import read_video

from .media_samples import data_uri, make_audio, make_video, number_of, numbered_frame, picture_bytes, served


def every(total, fps):
    return list(range(total))


def numbers(source, indices=None, **kwargs):
    video = read_video(source, every if indices is None else lambda total, fps: indices, **kwargs)
    return [number_of(frame) for frame in video.frames]


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
    original = video_module._open_container

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

    monkeypatch.setattr(video_module, "_open_container", open_counted)
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
    original = video_module._decode_between

    def forgetful(file, timeline, indices, sparing):
        for at, frame in enumerate(original(file, timeline, indices, sparing)):
            if sparing and at == 2:
                return
            yield frame

    monkeypatch.setattr(video_module, "_decode_between", forgetful)
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
        (picture_bytes(Image.fromarray(numbered_frame(0))), None, "no video stream"),
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


def test_an_address_is_the_file_behind_it(monkeypatch):
    """Of any container, also where frames are unevenly spaced."""
    monkeypatch.setenv("no_proxy", "*")
    uneven = make_video("matroska", "mpeg4", frames=12, times=[0, 40, 80, 500, 540, 580, 620, 900, 940, 980, 1020, 1500])
    with served(film=uneven) as (host, _):
        there, here = read_video(f"{host}/film", every), read_video(uneven, every)
        assert (there.total_frames, there.fps) == (here.total_frames, here.fps)
        assert numbers(f"{host}/film") == list(range(12))
        for limits, words in ((MediaLimits(max_video_frames=9), "max_video_frames"), (MediaLimits(max_bytes=99), "max_bytes")):
            with pytest.raises(MediaError, match=words):
                numbers(f"{host}/film", limits=limits)


def test_what_stands_behind_a_film_is_not_its_concern():
    data = make_video("mp4", "mpeg4", frames=12)
    for behind in (b"twenty bytes of junk", b"TAG" + b"a song".ljust(125, b"\0"), bytes(range(1, 60))):
        assert numbers(data + behind) == list(range(12))


def test_codecs_nobody_has_a_decoder_for():
    data = make_video("avi", "mpeg4", frames=12)
    unknown = data.replace(b"FMP4", b"XYZ1")
    assert unknown != data
    with pytest.raises(MediaError, match="decoder"):
        numbers(unknown)
