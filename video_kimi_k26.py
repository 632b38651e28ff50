"""Videos: from containers PyAV knows, or frames that are decoded already, to the RGB frames that are looked at.

A video is read twice: once packet by packet, to count its frames exactly and learn their times without decoding, and
once to decode what lies between key frames and the frames that are asked for, less the frames that no other needs.
Limits and errors are those of `media_kimi_k26`. The rotation flag of phone videos is not applied: the published pipeline
does not apply it.
"""

import bisect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .media_kimi_k26 import MediaError, MediaLimits, is_array, load_image, open_source, short_name, to_numpy


ChooseFrames = Callable[[int, float], list[int]]  # (frames in the video, frames per second) -> indices, ascending


@dataclass
class SampledVideo:
    """The chosen frames of a video. `frames` yields one RGB picture per index, uint8 (height, width, 3), and decodes
    while it is walked; a frame that cannot be delivered raises `MediaError` there."""

    total_frames: int
    fps: float
    width: int
    height: int
    indices: list[int]
    frames: Iterator[np.ndarray]


def read_video(
    source: Any, choose: ChooseFrames, fps: Optional[float] = None, limits: MediaLimits = MediaLimits()
) -> SampledVideo:
    """Opens a video, asks `choose` for frame indices and gives those frames.

    `source`: path, `file://`, `http(s)://`, data URI, base64 string, bytes or binary file of any container PyAV
    reads; or decoded frames: a list of pictures, an array (n, h, w), (n, h, w, c) or (n, c, h, w), or a mapping with
    `frames` and `fps`. `fps` is the rate of decoded frames, needed for them and refused for files, which carry theirs.

    Index k is the k-th frame in presentation order, also where frames are unevenly spaced; the rate is then frames
    divided by duration. Raises `MediaError` for a source that is no video, is damaged or truncated or over `limits`.
    """
    if isinstance(source, Mapping):
        if not {"frames", "fps"} <= set(source):
            raise MediaError(f"a video given as a mapping needs 'frames' and 'fps', has {sorted(source)}")
        source, fps = source["frames"], source["fps"]
    if isinstance(source, (list, tuple)) or is_array(source):
        return _from_frames(source, choose, fps, limits)
    if fps is not None:
        raise MediaError("fps is the rate of decoded frames and a video file has its own; to sample it, set sample_fps")
    file, owned = open_source(source, limits)
    try:
        timeline = _read_timeline(file, short_name(source), limits)
        indices = _check_indices(choose(timeline.total_frames, timeline.fps), timeline.total_frames)
    except BaseException:
        if owned:
            file.close()
        raise
    frames = _decode(file, owned, timeline, indices)
    return SampledVideo(timeline.total_frames, timeline.fps, timeline.width, timeline.height, indices, frames)


def _check_video(total: int, fps: float, width: int, height: int, limits: MediaLimits) -> None:
    limits.check("max_video_pixels", width * height, f"pixels of a {width}x{height} video frame")
    limits.check("max_video_frames", total, "frames of the video")
    limits.check("max_video_seconds", total / fps, "seconds of video")


def _check_indices(indices: list[int], total: int) -> list[int]:
    if not indices or list(indices) != sorted(indices) or indices[0] < 0 or indices[-1] >= total:
        raise ValueError(f"frame indices must ascend within 0..{total - 1}, got {indices[:8]}")
    return list(indices)


def _from_frames(source: Any, choose: ChooseFrames, fps: Optional[float], limits: MediaLimits) -> SampledVideo:
    if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction, np.number)):
        raise MediaError(f"decoded frames need their rate: give fps (frames per second), got {fps!r}")
    fps = float(fps)
    if not (0.0 < fps < math.inf):
        raise MediaError(f"fps must be positive and finite, got {fps}")
    if is_array(source):
        source = to_numpy(source)
        if source.ndim not in (3, 4):
            raise MediaError(f"frames of shape {source.shape}: give (n, h, w), (n, h, w, c) or (n, c, h, w)")
    if len(source) == 0:
        raise MediaError("the video has no frames")
    first = load_image(source[0], limits)
    width, height = first.size
    _check_video(len(source), fps, width, height, limits)
    indices = _check_indices(choose(len(source), fps), len(source))

    def frames() -> Iterator[np.ndarray]:
        for index in indices:
            frame = load_image(source[index], limits)
            if frame.size != (width, height):
                raise MediaError(
                    f"frame {index} is {frame.width}x{frame.height} and frame 0 is {width}x{height}:"
                    " the frames of a video have one size"
                )
            yield np.asarray(frame)

    return SampledVideo(len(source), fps, width, height, indices, frames())


@dataclass
class _Timeline:
    """What one pass over the packets says about the video stream, without decoding it.

    pts: presentation times in decode order; shown: decode-order index of the k-th frame in presentation order, or
    None where the container has no usable times and frames can only be counted; keys: decode-order indices of the
    packets a decoder can start from; seekable: whether the container can go to each of these; sparing: whether the
    decoder can be told to leave out frames that no other frame is made from.
    """

    name: str
    total_frames: int
    fps: float
    width: int
    height: int
    pts: list[int]
    shown: Optional[list[int]]
    keys: list[int]
    seekable: bool
    sparing: bool


# Codecs that mark frames no other is made from, whatever else is left out (HEVC's marks hold within a temporal layer).
SPARING = ("h264", "mpeg4")


class _Nameless:
    """A file without a name, so that FFmpeg judges the content alone and not the suffix."""

    def __init__(self, file: Any):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _open_container(file: Any, name: str):
    """The container and its video stream; cover art of an audio file is not a video."""
    file.seek(0)
    try:
        # no protocol is allowed: a playlist inside the data must not make FFmpeg open files or addresses
        container = av.open(_Nameless(file), options={"protocol_whitelist": "none"}, buffer_size=1 << 18)
    except Exception as error:  # FFmpeg's own errors and those of unreadable headers
        raise MediaError(f"{name} is not a video that PyAV can read, or is truncated: {error}") from error
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not (stream.disposition & cover)]
    if not streams or container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
        container.close()
        raise MediaError(f"{name} has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        container.close()
        raise MediaError(f"{name} is a video that PyAV has no decoder for")
    stream.thread_type = "AUTO"
    return container, stream


# What stands in ISO media files beside one another.
BOXES = {box.encode() for box in "ftyp styp moov moof mdat mfra free skip wide uuid meta pdin sidx ssix prft emsg udta pnot".split()}


def _declared_size(file: Any) -> int:
    """How many bytes the container says it has: the end of its last box (ISO media), segment (Matroska, WebM) or RIFF
    chunk, or the trailer of a GIF. 0 where the format does not say. A file shorter than that has been cut."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        position = 0
        while position + 8 <= end:
            file.seek(position)
            box = file.read(16)
            if box[4:8] not in BOXES:  # whatever stands behind a film, such as tags
                return position
            size = int.from_bytes(box[:4], "big")
            size = int.from_bytes(box[8:16], "big") if size == 1 else size
            if size < 8:  # 0 means "to the end of the file"
                return end
            position += size
        return position
    if head[:4] == b"\x1a\x45\xdf\xa3":
        first = _vint(head, 4)
        if first is not None:
            start = first[0] + first[1]  # behind the EBML header
            segment = head[start : start + 4] == b"\x18\x53\x80\x67" and _vint(head, start + 4)
            if segment and segment[1] >= 0:
                return segment[0] + segment[1]
        return 0
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"GIF8":
        file.seek(0)
        return _gif_size(file.read())
    return 0


def _gif_size(data: bytes) -> int:
    """Position behind the trailer of a GIF; one more than there are bytes where the data ends before it."""

    def table(flags: int) -> int:  # bytes of a colour table
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    try:
        at = 13 + table(data[10])
        while data[at] != 0x3B:
            # an extension has a label before its blocks, an image a descriptor, a table and the code size
            at += 2 if data[at] == 0x21 else 11 + table(data[at + 9])
            while data[at]:
                at += 1 + data[at]
            at += 1
        return at + 1
    except IndexError:
        return len(data) + 1


def _vint(data: bytes, at: int) -> Optional[tuple[int, int]]:
    """A Matroska variable-length number: position behind it, and its value (-1 for "unknown")."""
    if at >= len(data) or data[at] == 0:
        return None
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return at + length, -1 if value == (1 << 7 * length) - 1 else value


def _read_timeline(file: Any, name: str, limits: MediaLimits) -> _Timeline:
    declared, size = _declared_size(file), file.seek(0, os.SEEK_END)
    if declared > size:
        raise MediaError(f"{name} is truncated: its container says {declared} bytes and there are {size}")
    container, stream = _open_container(file, name)
    try:
        width, height = stream.codec_context.width, stream.codec_context.height
        if width < 1 or height < 1:
            raise MediaError(f"{name} is damaged or truncated: its frames have no size")
        limits.check("max_video_pixels", width * height, f"pixels of a {width}x{height} video frame")
        vp8 = stream.codec_context.name == "vp8"
        pts, keys, shown, span = [], [], [], {}
        for packet in container.demux(stream):
            if packet.size == 0:  # end marker, or a repeated frame that some AVI files hold as nothing
                continue
            if packet.is_corrupt:
                raise MediaError(f"{name} is damaged or truncated: packet {len(pts)} is incomplete")
            if packet.is_keyframe:
                keys.append(len(pts))
            # edit lists discard packets; VP8 has packets that are never shown (bit 4 of the first byte is clear)
            if not packet.is_discard and not (vp8 and not (bytes(packet)[0] >> 4) & 1):
                shown.append(len(pts))
                limits.check("max_video_frames", len(shown), "frames of the video")
            span[packet.pts] = packet.duration or 0
            pts.append(packet.pts)
        total, tick = len(shown), float(stream.time_base or 0)
        usable = None not in span and len(span) == len(pts) and tick > 0
        # AVI stores no presentation times: with reordered frames what FFmpeg makes up is their decode order
        usable = usable and not (container.format.name == "avi" and stream.codec_context.has_b_frames)
        if stream.frames > len(pts):
            raise MediaError(f"{name} is truncated: its index lists {stream.frames} frames and {len(pts)} are there")
        if usable:
            shown.sort(key=pts.__getitem__)
        else:
            total = sum(1 for _ in _decode_all(file, name))
        if total < 1:
            raise MediaError(f"{name} has a video stream without frames")
        duration = 0.0
        if usable:
            first, last = pts[shown[0]], pts[shown[-1]]
            duration = (last - first + (span[last] or (last - first) / max(1, total - 1))) * tick
        fps = _rate(total, duration, stream.average_rate or stream.guessed_rate, tick)
        _check_video(total, fps, width, height, limits)
        # seeking is exact where an index of key frames exists; elsewhere the stream is read from its start
        seekable = usable and bool({"mp4", "matroska", "webm"} & set(container.format.name.split(",")))
        sparing = stream.codec_context.name in SPARING
        return _Timeline(name, total, fps, width, height, pts, shown if usable else None, keys, seekable, sparing)
    except av.FFmpegError as error:
        raise MediaError(f"{name} is damaged or truncated: {error}") from error
    finally:
        container.close()


def _rate(total: int, duration: float, nominal: Optional[Fraction], tick: float) -> float:
    """Frames per second. The container's rate (exact, such as 30000/1001) counts when it agrees with the times of the
    frames to their resolution; else, as for variable frame rates it does not describe, frames per duration."""
    if nominal and (duration <= 0 or abs(total / float(nominal) - duration) <= 2 * tick + 1e-9):
        return float(nominal)
    return total / duration if duration > 0 else 1.0


def _decode_all(file: Any, name: str) -> Iterator[Any]:
    container, stream = _open_container(file, name)
    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise MediaError(f"{name} is damaged or truncated: {error}") from error
    finally:
        container.close()


def _decode(file: Any, owned: bool, timeline: _Timeline, indices: list[int]) -> Iterator[np.ndarray]:
    """The frames of `indices`, in order, as RGB pixels; repeated indices repeat the frame."""
    try:
        if timeline.shown is None:
            found = enumerate(_decode_all(file, timeline.name))
        else:
            found = _decode_needed(file, timeline, indices)
        position, pixels, reformatter = -1, None, VideoReformatter()
        for index in indices:
            while position < index:
                position, frame = next(found, (None, None))
                if position is None:
                    raise MediaError(f"{timeline.name} is damaged or truncated: frame {index} cannot be decoded")
                pixels = None
            if pixels is None:
                if frame.is_corrupt:
                    raise MediaError(f"{timeline.name} is damaged or truncated: frame {index} is incomplete")
                pixels = _rgb(frame, timeline.width, timeline.height, reformatter)
            yield pixels
    finally:
        if owned:
            file.close()


def _rgb(frame: Any, width: int, height: int, reformatter: VideoReformatter) -> np.ndarray:
    """`(height, width, 3)` uint8, every row contiguous. As `frame.to_ndarray`, which copies the pixels once more and makes
    a reformatter for each frame."""
    plane = reformatter.reformat(frame, width, height, "rgb24").planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(height, abs(plane.line_size))[:, : 3 * width]
    return rows[:: 1 if plane.line_size > 0 else -1].reshape(height, width, 3)  # negative: the last row comes first


def _decode_needed(file: Any, timeline: _Timeline, indices: list[int]) -> Iterator[tuple[int, Any]]:
    """(index, frame) for every index, as far as they can be decoded."""
    left = sorted(set(indices))
    # A decoder that guesses the order of frames from those it sees may drop one when others are left out.
    for sparing in (True, False) if timeline.sparing else (False,):
        for frame in _decode_between(file, timeline, left, sparing):
            yield left.pop(0), frame
        if not left:
            return


def _decode_between(file: Any, timeline: _Timeline, indices: list[int], sparing: bool) -> Iterator[Any]:
    """The frames of ascending `indices`, decoding no more than lies between a key frame and the frame after it, and of
    that, if `sparing`, only what other frames are made from. Ends early where one cannot be decoded."""
    pts, shown = timeline.pts, timeline.shown
    place = {time: at for at, time in enumerate(pts)}  # presentation time -> decode order
    times = [pts[shown[index]] for index in indices]
    wanted = frozenset(times)
    container, stream = _open_container(file, timeline.name)
    try:
        packets, fed = container.demux(stream), -1
        ready: list[Any] = []  # decoded frames not yet looked at
        for index, time in zip(list(indices), times):
            # the last key frame at or before the wanted one; one that is shown later cannot start it
            key = bisect.bisect_right(timeline.keys, shown[index]) - 1
            while key > 0 and pts[timeline.keys[key]] > time:
                key -= 1
            start = timeline.keys[key] if key >= 0 else 0
            if timeline.seekable and start > fed + 1:
                container.seek(pts[start], stream=stream)
                packets, ready = container.demux(stream), []
            while True:
                while ready and ready[0].pts is not None and ready[0].pts < time:
                    ready.pop(0)
                if ready:
                    break
                packet = next(packets, None)
                if packet is None:
                    return
                fed = max(fed, place.get(packet.pts, fed)) if packet.size else fed
                if sparing:
                    stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                ready.extend(packet.decode())
            if ready[0].pts != time:  # the decoder dropped it
                return
            yield ready.pop(0)
    except av.FFmpegError as error:
        raise MediaError(f"{timeline.name} is damaged or truncated: {error}") from error
    finally:
        container.close()
