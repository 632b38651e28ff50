"""Pictures: from whatever a user has (bytes, paths, data URIs, arrays) to RGB; and where any media come from, with limits.

Sizes are checked before pixels are decoded, and anything that is damaged, of the wrong kind or over a stated limit
raises `MediaError`. `video_kimi_k26` has videos.

EXIF orientation is not applied: the published pipeline does not apply it.
"""

import base64
import binascii
import http.client
import io
import os
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


FETCH_SECONDS = 60.0  # for which a host may be silent


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
        """Raises `MediaError`, saying `what` is too large, where `value` is over the limit of that name."""
        limit = getattr(self, name)
        if limit is not None and value > limit:
            raise MediaError(f"{what}: {value:,} is over the limit {name}={limit:,}")


# -- sources ----------------------------------------------------------------------------------------------------


def short_name(source: Any) -> str:
    """A short name of a source for messages: never the data itself."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"data of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)")
    return f"a {type(source).__name__}"


def is_url(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _fetch(url: str, limits: MediaLimits) -> bytes:
    """What is behind an address, no more of it than `limits.max_bytes` allow."""
    request = urllib.request.Request(url, headers={"User-Agent": "kimi-k26"})  # some hosts refuse the default one
    try:
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
            data = answer.read() if limits.max_bytes is None else answer.read(int(limits.max_bytes) + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        raise MediaError(f"cannot load {short_name(url)}: {error}") from error
    limits.check("max_bytes", len(data), "encoded size in bytes")
    return data


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
        raise MediaError(f"data URI without a comma: {short_name(uri)}")
    if header.lower().rstrip().endswith(";base64"):
        return _decode_base64(payload, limits)
    return urllib.parse.unquote_to_bytes(payload.strip())


def open_source(source: Any, limits: MediaLimits) -> tuple[Any, bool]:
    """A seekable binary file for an encoded picture or video, and whether the caller has to close it.

    `source`: bytes, a path, `file://` or `http(s)://` URL, data URI, base64 string or binary file object. Anything else
    raises `MediaError`, as does an empty source, a missing file or one over `limits.max_bytes`.
    """
    if isinstance(source, os.PathLike):
        source = Path(source)
    if is_url(source):
        source = _fetch(source, limits)
    elif isinstance(source, str) and source[:5].lower() == "data:":
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
                f"{short_name(source)} is not an existing file, and no file://, http(s):// or data: URL or base64 data"
            ) from error

    if isinstance(source, (bytes, bytearray, memoryview)):
        file, owned = io.BytesIO(source), True
    elif isinstance(source, (str, Path)):
        try:
            file, owned = open(source, "rb"), True
        except OSError as error:
            raise MediaError(f"cannot open {short_name(source)}: {error.strerror or error}") from error
    elif hasattr(source, "read"):
        seekable = getattr(source, "seekable", lambda: hasattr(source, "seek"))()
        file, owned = (source, False) if seekable else (io.BytesIO(source.read()), True)
    else:
        raise MediaError(f"cannot read {short_name(source)}: give a path, bytes, data URI, file object or array")

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        if size == 0:
            raise MediaError(f"{short_name(source)} is empty")
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
        return _array_to_image(to_numpy(source), limits)
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
        raise MediaError(f"{short_name(source)} is not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{short_name(source)} is over Pillow's own limit of pixels: {error}") from error
    except MediaError:
        raise
    except Exception as error:  # a broken header can raise nearly anything
        raise MediaError(f"{short_name(source)} is damaged or truncated: {error}") from error
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


def to_numpy(value: Any) -> np.ndarray:
    """An array or tensor as NumPy's, floating point of 16 bits as of 32."""
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
