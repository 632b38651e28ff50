"""Pictures and videos: from whatever a user has (bytes, paths, data URIs, arrays, containers PyAV knows) to RGB frames.

Sizes are checked before pixels are decoded, and anything that is damaged, of the wrong kind or over a stated limit
raises `MediaError`. A video is read twice: once packet by packet, to count its frames exactly and learn their times
without decoding, and once to decode what lies between key frames and the frames that are asked for, less the frames
that no other needs.

EXIF orientation and the rotation flag of phone videos are not applied: the published pipeline does not apply them.
(The library's own loader, which serves `http(s)` sources, does apply EXIF orientation.)
"""

import base64
import binascii
import bisect
import io
import math
import os
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image as library_load_image
from transformers.video_utils import load_video as library_load_video


class MediaError(ValueError):
    """A picture or video that cannot be used: what it is, what was wrong, and what is allowed."""


@dataclass(frozen=True)
class MediaLimits:
    """Upper bounds checked before pixels are decoded. `None` lifts a bound.

    max_bytes: encoded size of one file, in bytes.
    max_image_pixels: width x height of a picture. Pillow refuses more than this default by itself, so a larger value
        also needs a larger `PIL.Image.MAX_IMAGE_PIXELS`.
    max_video_pixels: width x height of one video frame.
    max_video_frames: frames in the whole video, not only the chosen ones.
    max_video_seconds: length of the video in seconds.
    """

    max_bytes: Optional[int] = 2 * 1024**3
    max_image_pixels: Optional[int] = 178_956_970
    max_video_pixels: Optional[int] = 8192 * 4320
    max_video_frames: Optional[int] = 1_000_000
    max_video_seconds: Optional[float] = 4 * 3600.0

    def __post_init__(self):
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise ValueError(f"MediaLimits.{name} must be a positive number or None, got {value!r}")

    def check(self, name: str, value: float, what: str) -> None:
        limit = getattr(self, name)
        if limit is not None and value > limit:
            raise MediaError(f"{what}: {value:g} is over the limit {name}={limit:g}")


# -- sources ----------------------------------------------------------------------------------------------------


def describe(source: Any) -> str:
    """A short name of a source for messages: never the data itself."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"data of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)")
    return f"a {type(source).__name__}"


def is_url(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _decode_base64(text: str, limits: MediaLimits) -> bytes:
    limits.check("max_bytes", len(text) * 3 // 4, "encoded size in bytes")
    if "%" in text:
        text = urllib.parse.unquote(text)
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"not valid base64: {error}") from error


def _decode_data_uri(uri: str, limits: MediaLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise MediaError(f"data URI without a comma: {describe(uri)}")
    if header.lower().rstrip().endswith(";base64"):
        return _decode_base64(payload, limits)
    return urllib.parse.unquote_to_bytes(payload.strip())


def open_source(source: Any, limits: MediaLimits) -> tuple[Any, bool]:
    """A seekable binary file for an encoded picture or video, and whether the caller has to close it.

    `source`: bytes, a path, `file://` URL, data URI, base64 string or binary file object. Anything else raises
    `MediaError`, as does an empty source, a missing file or one over `limits.max_bytes`.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = _decode_data_uri(source, limits)
    elif isinstance(source, str) and source[:7].lower() == "file://":
        source = Path(urllib.request.url2pathname(urllib.parse.urlparse(source).path))
    elif isinstance(source, str) and not os.path.isfile(source):
        if not source.strip():
            raise MediaError("an empty string is not a path, URL or base64 data")
        try:
            source = _decode_base64(source, limits)
        except MediaError as error:
            raise MediaError(
                f"{describe(source)} is not an existing file, and no file://, http(s):// or data: URL or base64 data"
            ) from error

    if isinstance(source, (bytes, bytearray, memoryview)):
        file, owned = io.BytesIO(source), True
    elif isinstance(source, (str, Path)):
        try:
            file, owned = open(source, "rb"), True
        except OSError as error:
            raise MediaError(f"cannot open {describe(source)}: {error.strerror or error}") from error
    elif hasattr(source, "read"):
        seekable = getattr(source, "seekable", lambda: hasattr(source, "seek"))()
        file, owned = (source, False) if seekable else (io.BytesIO(source.read()), True)
    else:
        raise MediaError(f"cannot read {describe(source)}: give a path, bytes, data URI, file object or array")

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        if size == 0:
            raise MediaError(f"{describe(source)} is empty")
        limits.check("max_bytes", size, "encoded size in bytes")
    except MediaError:
        if owned:
            file.close()
        raise
    return file, owned


# -- pictures ---------------------------------------------------------------------------------------------------


def load_image(source: Any, limits: MediaLimits = MediaLimits()) -> Image.Image:
    """A picture as a PIL image in mode RGB (alpha dropped, as `convert("RGB")` does; first frame of an animation).

    `source`: PIL image of any mode; path, `file://`, `http(s)://`, data URI, base64 string, bytes or binary file;
    NumPy array or tensor, (h, w), (h, w, c) or (c, h, w) with 1 to 4 channels, uint8, bool or floats in 0..1.
    Raises `MediaError` when it is no picture, is damaged or truncated, or is over `limits`.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, limits)
    if is_array(source):
        return _array_to_image(_to_numpy(source), limits)
    if is_url(source):
        try:
            return _to_rgb(library_load_image(source, timeout=60.0), limits)
        except MediaError:
            raise
        except Exception as error:  # network, decoder: whatever the loader meets
            raise MediaError(f"cannot load the picture {describe(source)}: {error}") from error
    file, owned = open_source(source, limits)
    try:
        with warnings.catch_warnings():
            # the size is checked below against our own limit; Pillow's warning would say it twice
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        if image.format == "EPS":  # Pillow would start Ghostscript, a program, on the data
            raise MediaError("EPS files are programs and are not run")
        return _to_rgb(image, limits)
    except UnidentifiedImageError as error:
        raise MediaError(f"{describe(source)} is not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{describe(source)} is over Pillow's own limit of pixels: {error}") from error
    except MediaError:
        raise
    except Exception as error:  # a broken header can raise nearly anything
        raise MediaError(f"{describe(source)} is damaged or truncated: {error}") from error
    finally:
        if owned:
            file.close()


def _to_rgb(image: Image.Image, limits: MediaLimits) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise MediaError(f"a picture of {image.width}x{image.height} pixels has no content")
    limits.check("max_image_pixels", image.width * image.height, f"pixels of a {image.width}x{image.height} picture")
    try:
        image.load()
        if image.mode == "RGB":
            return image
        return (image.convert("LA") if image.mode == "La" else image).convert("RGB")
    except Exception as error:  # OSError for cut data, SyntaxError for broken chunks, struct and zlib errors
        raise MediaError(f"the picture is damaged or truncated: {error}") from error


def is_array(value: Any) -> bool:
    """NumPy arrays, tensors and anything else that says how to become an array (PIL images do not count)."""
    if isinstance(value, Image.Image):
        return False
    return isinstance(value, (np.ndarray, torch.Tensor)) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return np.asarray(value)


def _array_to_image(array: np.ndarray, limits: MediaLimits) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or 0 in array.shape:
        raise MediaError(f"an array of shape {array.shape} is no picture: (h, w), (h, w, c) or (c, h, w), c 1 to 4")
    height, width, channels = array.shape
    limits.check("max_image_pixels", width * height, f"pixels of a {width}x{height} picture")
    if channels != 3:  # gray, gray + alpha, RGB + alpha
        array = array[:, :, :3] if channels == 4 else np.broadcast_to(array[:, :, :1], (height, width, 3))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # also false for NaN
            raise MediaError(f"a float picture must lie in 0..1, got {low:g}..{high:g}; use uint8 for 0..255")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer) and array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise MediaError(f"a picture of {array.dtype} must lie in 0..255, got {array.min()}..{array.max()}")
        array = array.astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(f"a picture array must be uint8, bool or float, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


# -- videos -----------------------------------------------------------------------------------------------------

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
    if is_url(source):
        return _from_url(source, choose, limits)
    file, owned = open_source(source, limits)
    try:
        timeline = _read_timeline(file, describe(source), limits)
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
        source = _to_numpy(source)
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


def _from_url(source: str, choose: ChooseFrames, limits: MediaLimits) -> SampledVideo:
    chosen: dict[str, Any] = {}

    def sample(metadata, **_) -> np.ndarray:
        total, fps = int(metadata.total_num_frames), float(metadata.fps)
        if total < 1:
            raise MediaError("the container does not say how many frames it has: download it and give the file")
        _check_video(total, fps, metadata.width, metadata.height, limits)
        chosen.update(total=total, fps=fps, indices=_check_indices(choose(total, fps), total))
        return np.array(chosen["indices"])

    try:
        frames, _ = library_load_video(source, backend="pyav", sample_indices_fn=sample)
    except MediaError:
        raise
    except Exception as error:  # network, decoder: whatever the loader meets
        raise MediaError(f"cannot load the video {describe(source)}: {error}") from error
    if len(frames) != len(chosen["indices"]):
        raise MediaError(f"{describe(source)}: {len(frames)} of {len(chosen['indices'])} frames could be decoded")
    height, width = frames.shape[1:3]
    return SampledVideo(chosen["total"], chosen["fps"], width, height, chosen["indices"], map(np.ascontiguousarray, frames))


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
    stream.thread_type = "AUTO"
    return container, stream


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
