"""A video in which everything moves, made here: a camera over a landscape of noise, four things crossing it, film grain."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image


CODECS = ("libx264", "mpeg4")  # the first that this PyAV can write
THINGS, SIZE, MARGIN = 4, (240, 320), 200  # SIZE: height and width of a thing; MARGIN: how far the camera goes
GRAIN = 3


def make_video(path: Path, seconds: float = 60, width: int = 1920, height: int = 1080, rate: int = 30) -> str:
    """Write the video, with the encoder's own settings. The same sizes give the same frames.

    Returns:
        The name of the encoder.
    """
    codec = next(name for name in CODECS if name in av.codecs_available)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".part{path.suffix}")
    with av.open(str(unfinished), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.thread_type = width, height, "yuv420p", "AUTO"
        for number, pixels in enumerate(frames(round(seconds * rate), width, height, rate)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    unfinished.rename(path)
    return codec


def frames(count: int, width: int, height: int, rate: int) -> Iterator[np.ndarray]:
    """`count` frames, `(height, width, 3)` uint8 each."""
    draw = np.random.default_rng(0)
    landscape = noise(height + 2 * MARGIN, width + 2 * MARGIN, draw)
    tall, wide = min(SIZE[0], height), min(SIZE[1], width)
    things = [noise(tall, wide, draw) for _ in range(THINGS)]
    grain = draw.integers(-GRAIN, GRAIN + 1, (height + 64, width + 64, 1), dtype=np.int16)
    for number in range(count):
        time = number / rate
        top, left = (int(MARGIN * (1 + wave(speed * time))) for wave, speed in ((np.sin, 0.31), (np.cos, 0.23)))
        frame = landscape[top : top + height, left : left + width].astype(np.int16)
        for at, thing in enumerate(things):
            y = int((height - tall) * (0.5 + 0.5 * np.sin((0.5 + 0.2 * at) * time + at)))
            x = int((width - wide) * (0.5 + 0.5 * np.cos((0.4 + 0.15 * at) * time + 2 * at)))
            frame[y : y + tall, x : x + wide] = thing
        y, x = draw.integers(0, 64, 2)
        frame += grain[y : y + height, x : x + width]
        yield frame.clip(0, 255).astype(np.uint8)


def noise(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Colours in patches of all sizes, as nature has them: `(height, width, 3)` uint8."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(9):
        size = (width >> octave) + 2, (height >> octave) + 2
        for channel in range(3):
            coarse = Image.fromarray(draw.standard_normal(size[::-1]).astype(np.float32))
            total[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return ((total - total.min()) * (255 / np.ptp(total))).astype(np.uint8)
