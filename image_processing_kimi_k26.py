"""The published picture and video pipeline: RGB frames -> patches, and the image processor around it.

First the arithmetic (target size, padding, frame choice, time stamps, normalised patches), then its settings as
`preprocessor_config.json` keeps them, then `KimiK26ImageProcessor`.
"""

import copy
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Optional, Union

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .media_kimi_k26 import MediaError, MediaLimits, is_array, load_image
from .scaling_kimi_k26 import Picture, cut, fill_patches, parts_for, scaled
from .video_kimi_k26 import read_video

# Not used here: see the same lines in `processing_kimi_k26`.
from .compiling_kimi_k26 import compiled  # noqa: F401


# -- arithmetic -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fit:
    """Size of a picture for the vision tower, in pixels and patches."""

    width: int  # after scaling
    height: int
    columns: int  # patches after padding
    rows: int


def fit(width: int, height: int, patch_limit: int, patch: int, merge: tuple[int, int], side_limit: int) -> Fit:
    """Size after scaling down (never up) to `patch_limit` patches and `side_limit` patches a side, and the patch grid
    after padding right and bottom to whole merged blocks. `merge` is (rows, columns). Published formula."""
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1, got {width}x{height}")
    area = max(1, width // patch) * max(1, height // patch)
    side = side_limit * patch
    scale = min(1.0, math.sqrt(patch_limit / area), side / width, side / height)
    new_width = min(max(1, int(width * scale)), side)
    new_height = min(max(1, int(height * scale)), side)
    rows = -(-new_height // (patch * merge[0])) * merge[0]
    columns = -(-new_width // (patch * merge[1])) * merge[1]
    return Fit(new_width, new_height, columns, rows)


def choose_frames(total: int, fps: float, sample_fps: float, max_frames: Optional[int] = None) -> list[int]:
    """Indices of the frames to look at, evenly spread from the first to the last. Published formula."""
    count = max(round(total * min(sample_fps, fps) / fps), 1)
    if max_frames is not None:
        count = min(count, max_frames)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


TIMESTAMP_MODES = ("hh:mm:ss.fff", "mm:ss.fff", "mm:ss")


def timestamp(seconds: float, mode: str) -> str:
    """A time as text; milliseconds are cut, not rounded, and leading minutes or hours grow past two digits."""
    whole, thousandths = int(seconds), int((seconds % 1) * 1000)
    if mode == "hh:mm:ss.fff":
        return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{thousandths:03d}"
    text = f"{whole // 60:02d}:{whole % 60:02d}"
    return f"{text}.{thousandths:03d}" if mode == "mm:ss.fff" else text


PATCHES_FOR_A_THREAD = 1024  # fewer are done before another thread has begun


def write_patches(
    picture: Picture,
    target: Fit,
    patch: int,
    mean: list[float],
    std: list[float],
    out: torch.Tensor,
    parts: int = 1,
    run: Callable = map,
) -> None:
    """Scales, pads, normalises and cuts one RGB picture into `out`, float32 (rows x columns, 3, patch, patch).

    That is `(x / 255 - mean) / std`, rounded once, with zero pixels padded before it. The work is cut into `parts`, or
    more where it is large, which `run` may do at once, as the `map` of a pool of threads does; the result is the same to the last bit.
    """
    ordered = out.numpy().reshape(target.rows, target.columns, 3, patch, patch)
    table = np.stack([(np.arange(256) / 255 - m) / s for m, s in zip(mean, std)]).astype(np.float32)
    pixels = scaled(picture, target.width, target.height, parts, run)
    bands = cut(target.rows, parts_for(target.width, target.height, parts))

    def fill(band: tuple[int, int]) -> None:
        top, bottom = (min(row * patch, target.height) for row in band)
        fill_patches(pixels(top, bottom), table, ordered[slice(*band)])

    list(run(fill, bands))


def new_patches(count: int, patch: int) -> torch.Tensor:
    """Room for `count` patches, float32. NumPy asks for large pages: PyTorch's memory takes longer to come than to fill."""
    return torch.from_numpy(np.empty((count, 3, patch, patch), np.float32))


# -- settings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaConfig:
    """The values of `media_proc_cfg`, with the published names and defaults, checked.

    in_patch_limit, in_patch_limit_each_frame: patches of a picture and of a video frame before padding.
    in_patch_limit_video: patches of all frames of a video together (shared evenly), or None.
    patch_limit_on_one_side: patches along one side. patch_size: pixels along a patch.
    image_mean, image_std: of colours in 0..1, one number or one for each of red, green, blue.
    merge_kernel_size: patches along a side of the block that becomes one token, or (rows, columns).
    fixed_output_tokens: tokens of every picture and clip whatever its size, or None for one per merged block. The
        pixels do not change: it is for models that pool to a fixed number, which Kimi-K2.6 as published is not.
    sample_fps: frames looked at per second of video. max_num_frames_each_video: at most so many, or None.
    temporal_merge_kernel_size: frames of one clip. timestamp_mode: how a clip's time is written.
    """

    in_patch_limit: int = 16384
    patch_size: int = 14
    image_mean: Any = (0.5, 0.5, 0.5)
    image_std: Any = (0.5, 0.5, 0.5)
    merge_kernel_size: Any = 2
    fixed_output_tokens: Optional[int] = None
    patch_limit_on_one_side: int = 512
    in_patch_limit_each_frame: int = 4096
    in_patch_limit_video: Optional[int] = None
    sample_fps: float = 2.0
    max_num_frames_each_video: Optional[int] = None
    temporal_merge_kernel_size: int = 4
    timestamp_mode: str = "hh:mm:ss.fff"

    def __post_init__(self):
        optional = ("fixed_output_tokens", "in_patch_limit_video", "max_num_frames_each_video")
        for name in ("in_patch_limit", "patch_size", "patch_limit_on_one_side", "in_patch_limit_each_frame",
                     "temporal_merge_kernel_size", *optional):  # fmt: skip
            value = getattr(self, name)
            if not (_is_count(value) or (value is None and name in optional)):
                kind = "a positive integer" + (" or null" if name in optional else "")
                raise ValueError(f"media_proc_cfg: {name} must be {kind}, got {value!r}")
        merge = self.merge_kernel_size
        pair = isinstance(merge, (list, tuple)) and len(merge) == 2 and all(map(_is_count, merge))
        if not (_is_count(merge) or pair):
            raise ValueError(f"media_proc_cfg: merge_kernel_size must be a positive integer or two, got {merge!r}")
        if any(self.patch_limit_on_one_side % side for side in self.merge):
            raise ValueError(
                "media_proc_cfg: patch_limit_on_one_side must be a multiple of merge_kernel_size, got"
                f" {self.patch_limit_on_one_side} and {merge!r}"
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if len(values) not in (1, 3) or not all(_is_finite(v) and (v > 0 or name == "image_mean") for v in values):
                kind = "finite" if name == "image_mean" else "positive"
                raise ValueError(f"media_proc_cfg: {name} must be one or three {kind} numbers, got {value!r}")
        if not (_is_finite(self.sample_fps) and self.sample_fps > 0):
            raise ValueError(f"media_proc_cfg: sample_fps must be a positive number, got {self.sample_fps!r}")
        if self.timestamp_mode not in TIMESTAMP_MODES:
            allowed = ", ".join(TIMESTAMP_MODES)
            raise ValueError(f"media_proc_cfg: timestamp_mode must be one of {allowed}, got {self.timestamp_mode!r}")

    @property
    def merge(self) -> tuple[int, int]:
        """(rows, columns) of patches in one token."""
        size = self.merge_kernel_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def mean(self) -> list[float]:
        return _three(self.image_mean)

    @property
    def std(self) -> list[float]:
        return _three(self.image_std)

    def fit_image(self, width: int, height: int) -> Fit:
        return fit(width, height, self.in_patch_limit, self.patch_size, self.merge, self.patch_limit_on_one_side)

    def fit_frame(self, width: int, height: int, frames: int) -> Fit:
        """Size of each of `frames` chosen frames of a video."""
        limit = self.in_patch_limit_each_frame
        if self.in_patch_limit_video is not None:
            limit = max(1, min(limit, self.in_patch_limit_video // frames))
        return fit(width, height, limit, self.patch_size, self.merge, self.patch_limit_on_one_side)

    def choose(self, total: int, fps: float) -> list[int]:
        return choose_frames(total, fps, self.sample_fps, self.max_num_frames_each_video)

    def tokens(self, target: Fit) -> int:
        """Tokens of one picture or clip."""
        if self.fixed_output_tokens is not None:
            return self.fixed_output_tokens
        return (target.rows // self.merge[0]) * (target.columns // self.merge[1])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _three(value: Any) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [float(v) for v in (values * 3 if len(values) == 1 else values)]


MEDIA_KEYS = frozenset(field.name for field in fields(MediaConfig))


# -- inputs in any nesting ---------------------------------------------------------------------------------------


def is_image(value: Any) -> bool:
    """One picture, in any form `media_kimi_k26.load_image` takes."""
    if is_array(value):
        return len(value.shape) < 4
    return value is not None and not isinstance(value, (list, tuple, Mapping))


def is_video(value: Any) -> bool:
    """One video: a file in any form, or decoded frames (a list or array of pictures, or a mapping with them)."""
    if is_array(value):
        return len(value.shape) in (3, 4)
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(v, Image.Image) or (is_array(v) and len(v.shape) < 4) for v in value)
    return value is not None


def nest(value: Any, is_one: Callable[[Any], bool], batch_of: int = 0) -> tuple[list[Any], Optional[list[int]]]:
    """Flattens one, a list or a list per sample. Gives the items, and their number per sample where that was said.

    `is_one` tells a single item; an array with one axis more is a list of items. None inside a list per sample means
    no item. Raises `TypeError` for anything else.
    """
    if value is None:
        return [], None
    if is_one(value):
        return [value], None
    if is_array(value) and len(value.shape) in (4, 5):
        return list(value), None
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a picture or video, a list of them or a list of lists, got {type(value).__name__}")
    if all(is_one(item) for item in value):
        return list(value), None
    samples = [nest(item, is_one)[0] for item in value]
    counts = [len(sample) for sample in samples]
    return [item for sample in samples for item in sample], counts if batch_of == len(samples) else None


# -- the processor -----------------------------------------------------------------------------------------------


@dataclass
class EncodedMedia:
    """A picture or video ready for the model.

    pixel_values: float32 (patches, 3, patch, patch), clip after clip, frame after frame, row after row.
    grid_thws: (frames, patch rows, patch columns) of each clip; a picture is one clip of one frame.
    tokens: tokens of each clip. timestamps: time of each clip as text, empty for a picture.
    """

    pixel_values: torch.Tensor
    grid_thws: list[list[int]]
    tokens: list[int]
    timestamps: list[str]


class KimiK26ImageProcessor(BaseImageProcessor):
    """Pictures and videos to `pixel_values` and `grid_thws`, by the values of `media_proc_cfg`.

    Args:
        media_proc_cfg: values by their published names; missing ones take the published defaults, unknown ones are
            kept for saving and not used.
        media_limits: a `MediaLimits` or a dict of its fields: what may be read at all.
        kwargs: single values of `media_proc_cfg` by name, and anything else a `preprocessor_config.json` holds, which
            is written back as it was.

    Every value can also be given by name in a call, for that call. Raises `ValueError` naming a wrong value's key.
    """

    model_input_names = ["pixel_values", "grid_thws"]

    def __init__(
        self,
        media_proc_cfg: Optional[dict[str, Any]] = None,
        media_limits: Union[MediaLimits, dict[str, Any], None] = None,
        **kwargs,
    ):
        super().__init__()
        if media_proc_cfg is not None and not isinstance(media_proc_cfg, Mapping):
            raise ValueError(f"media_proc_cfg must be an object, got {media_proc_cfg!r}")
        single = {key: kwargs.pop(key) for key in list(kwargs) if key in MEDIA_KEYS}
        self.media_proc_cfg = {**(media_proc_cfg or {}), **single}
        config = self.media_config()
        for field in fields(MediaConfig):
            value = getattr(config, field.name)
            self.media_proc_cfg.setdefault(field.name, list(value) if isinstance(value, tuple) else value)
        self.media_limits = _limits(media_limits)
        self.auto_map = dict(kwargs.pop("auto_map", None) or {})
        # class names are written anew by `to_dict`
        self.other_values = {k: v for k, v in kwargs.items() if k not in ("image_processor_type", "processor_class")}

    def media_config(self, **overrides) -> MediaConfig:
        """The checked settings, with `overrides` by name."""
        unknown = set(overrides) - MEDIA_KEYS
        if unknown:
            raise TypeError(f"unknown setting {sorted(unknown)}, allowed are {sorted(MEDIA_KEYS)}")
        known = {key: value for key, value in self.media_proc_cfg.items() if key in MEDIA_KEYS}
        return MediaConfig(**{**known, **overrides})

    # -- one picture, one video -----------------------------------------------------------------------------------

    def encode_image(
        self, image: Any, media_limits: Union[MediaLimits, dict, None] = None, **overrides
    ) -> EncodedMedia:
        """One picture in any form `load_image` takes. Raises `MediaError`."""
        config = self.media_config(**overrides)
        picture = load_image(image, self.media_limits if media_limits is None else _limits(media_limits))
        target, patch = config.fit_image(*picture.size), config.patch_size
        pixels = new_patches(target.rows * target.columns, patch)
        threads = max(1, min(torch.get_num_threads(), len(pixels) // PATCHES_FOR_A_THREAD))
        with ThreadPoolExecutor(threads) as pool:
            write_patches(picture, target, patch, config.mean, config.std, pixels, threads, pool.map)
        return EncodedMedia(pixels, [[1, target.rows, target.columns]], [config.tokens(target)], [])

    def encode_video(
        self,
        video: Any,
        fps: Optional[float] = None,
        media_limits: Union[MediaLimits, dict, None] = None,
        **overrides,
    ) -> EncodedMedia:
        """One video in any form `read_video` takes; `fps` is the rate of decoded frames. Raises `MediaError`.

        A clip's time is the index of its first frame divided by the frame rate, as in the published pipeline: where
        frames are unevenly spaced that is the time at the average rate.
        """
        config = self.media_config(**overrides)
        limits = self.media_limits if media_limits is None else _limits(media_limits)
        opened = read_video(video, config.choose, fps, limits)
        count, step, patch = len(opened.indices), config.temporal_merge_kernel_size, config.patch_size
        target = config.fit_frame(opened.width, opened.height, count)
        area = target.rows * target.columns
        pixels = new_patches(count * area, patch)
        threads, waiting = torch.get_num_threads(), deque()
        with ThreadPoolExecutor(threads) as pool:  # while the next frames are decoded
            for at, frame in enumerate(opened.frames):
                if len(waiting) == 2 * threads:  # so many decoded frames are held
                    waiting.popleft().result()
                out = pixels[at * area : (at + 1) * area]
                waiting.append(pool.submit(write_patches, frame, target, patch, config.mean, config.std, out))
            for job in waiting:
                job.result()
        starts = range(0, count, step)
        return EncodedMedia(
            pixels,
            [[min(step, count - start), target.rows, target.columns] for start in starts],
            [config.tokens(target)] * len(starts),
            [timestamp(opened.indices[start] / opened.fps, config.timestamp_mode) for start in starts],
        )

    # -- the library's face ---------------------------------------------------------------------------------------

    def __call__(self, images: Any = None, videos: Any = None, **kwargs) -> BatchFeature:
        return self.preprocess(images, videos, **kwargs)

    def preprocess(
        self,
        images: Any = None,
        videos: Any = None,
        fps: Union[float, list[float], None] = None,
        return_tensors: Optional[str] = None,
        media_limits: Union[MediaLimits, dict, None] = None,
        **overrides,
    ) -> BatchFeature:
        """All pictures, then all videos, in one batch.

        Args:
            images, videos: one, a list, or a list of lists.
            fps: frames per second of videos given as decoded frames; one number or one per video.
            return_tensors: "pt", "np" or None, which gives tensors too.
            media_limits, overrides: limits and values of `media_proc_cfg` for this call.

        Returns `pixel_values` float32 (patches, 3, patch, patch) and `grid_thws` int64 (clips, 3) = frames, patch rows,
        patch columns. Raises `MediaError` naming the picture or video, `ValueError` or `TypeError` for a wrong setting.
        """
        pictures, _ = nest(images, is_image, 0)
        films, _ = nest(videos, is_video, 0)
        if not pictures and not films:
            raise ValueError("no picture and no video was given")
        rates = spread_fps(fps, films)
        encoded = []
        for at, picture in enumerate(pictures):
            with located(f"images[{at}]"):
                encoded.append(self.encode_image(picture, media_limits, **overrides))
        for at, (film, rate) in enumerate(zip(films, rates)):
            with located(f"videos[{at}]"):
                encoded.append(self.encode_video(film, rate, media_limits, **overrides))
        return BatchFeature(join(encoded), tensor_type=return_tensors)

    # -- counting without processing --------------------------------------------------------------------------------

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: Optional[dict] = None) -> int:
        """Patches (rows of `pixel_values`) of a picture of this size in pixels."""
        target = self.media_config(**(images_kwargs or {})).fit_image(width, height)
        return target.rows * target.columns

    def get_num_image_tokens(self, height: int, width: int, **overrides) -> int:
        """Media tokens of a picture of this size in pixels."""
        config = self.media_config(**overrides)
        return config.tokens(config.fit_image(width, height))

    def media_tokens_calculator(self, media: dict[str, Any]) -> int:
        """Media tokens of `{"type": "image", "image": picture}`, in any form `load_image` takes. The published name and
        form, in which other engines ask. Raises `MediaError`, and `ValueError` for anything but a picture."""
        picture = load_image(picture_of(media, "media"), self.media_limits)
        return self.get_num_image_tokens(picture.height, picture.width)

    def get_num_video_tokens(self, height: int, width: int, num_frames: int, fps: float, **overrides) -> int:
        """Media tokens of a video: the `<|media_pad|>` of all its clips, without the text around them (time stamps and
        markers). `num_frames` is the number of frames in the video and `fps` their rate, before any are chosen."""
        if not _is_count(num_frames):
            raise ValueError(f"num_frames must be a positive integer, got {num_frames!r}")
        if not (_is_finite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps!r}")
        config = self.media_config(**overrides)
        frames = len(config.choose(num_frames, fps))
        clips = math.ceil(frames / config.temporal_merge_kernel_size)
        return clips * config.tokens(config.fit_frame(width, height, frames))

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As the library's, but a local folder without the file has the published values, not an error."""
        folder = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder", ""))
        names = ("preprocessor_config.json", "processor_config.json")
        if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in names):
            return {}, kwargs
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """From the content of `preprocessor_config.json`; `kwargs` may override values by name."""
        give_rest = kwargs.pop("return_unused_kwargs", False)
        values = copy.deepcopy(image_processor_dict)
        if not isinstance(values.get("media_proc_cfg", {}), Mapping):
            raise ValueError(f"media_proc_cfg must be an object, got {values['media_proc_cfg']!r}")
        for key in list(kwargs):
            if key in MEDIA_KEYS or key in ("media_proc_cfg", "media_limits"):
                values[key] = kwargs.pop(key)
        processor = cls(**values)
        return (processor, kwargs) if give_rest else processor

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`: published form, unknown keys kept."""
        output = {**copy.deepcopy(self.other_values), "media_proc_cfg": copy.deepcopy(self.media_proc_cfg)}
        if self.media_limits != MediaLimits():
            output["media_limits"] = dict(vars(self.media_limits))
        if self.auto_map:
            output["auto_map"] = dict(self.auto_map)
        # the library's Auto classes look for these where no config.json is beside
        output["image_processor_type"] = type(self).__name__
        output["processor_class"] = "KimiK26Processor"
        return output


def _limits(value: Union[MediaLimits, dict[str, Any], None]) -> MediaLimits:
    if value is None:
        return MediaLimits()
    if isinstance(value, MediaLimits):
        return value
    names = {field.name for field in fields(MediaLimits)}
    if not isinstance(value, Mapping) or set(value) - names:
        raise ValueError(f"media_limits must be a MediaLimits or an object with keys of {sorted(names)}, got {value!r}")
    return MediaLimits(**value)


@contextmanager
def located(place: str):
    """A block in which a `MediaError` gets the place of the picture or video in front of its message."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{place}: {error}") from error


def picture_of(media: Any, place: str) -> Any:
    """The picture in `{"type": "image", "image": picture}`. Raises `ValueError` naming `place`."""
    if not (isinstance(media, Mapping) and media.get("type") == "image" and media.get("image") is not None):
        raise ValueError(f"{place} must be {{'type': 'image', 'image': picture}}, got {media!r:.100}")
    return media["image"]


def spread_fps(fps: Union[float, list, None], videos: list[Any]) -> list[Optional[float]]:
    """One rate per video. A single number goes to the videos given as decoded frames; a list has one per video."""
    if isinstance(fps, (list, tuple)):
        if len(fps) != len(videos):
            raise ValueError(f"fps: {len(fps)} rates were given for {len(videos)} videos")
        return list(fps)
    decoded = [isinstance(video, (list, tuple)) or is_array(video) for video in videos]
    if fps is not None and not any(decoded):
        raise ValueError("fps is the rate of videos given as decoded frames, and there are none; see sample_fps")
    return [fps if is_decoded else None for is_decoded in decoded]


def join(encoded: list[EncodedMedia]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `grid_thws` of a batch, in the given order."""
    pixels = [media.pixel_values for media in encoded]
    if len({tuple(part.shape[1:]) for part in pixels}) > 1:
        raise ValueError("pictures and videos of one batch need the same patch_size")
    grids = [grid for media in encoded for grid in media.grid_thws]
    return {
        "pixel_values": pixels[0] if len(pixels) == 1 else torch.cat(pixels),
        "grid_thws": torch.tensor(grids, dtype=torch.int64),
    }
