"""Pictures and videos made on the spot, whose frames carry their own number."""

import base64
import http.server
import io
import threading
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from PIL import Image

BITS = 10


def numbered_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(height, width, 3) uint8; a row of white and black blocks at the top spells `number` in binary."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = number * 5 % 256
    frame[..., 1] = np.arange(width) * 2 % 256
    block = width // BITS
    for bit in range(BITS):
        frame[:8, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return frame


def number_of(frame) -> int:
    """The number a frame carries, after any lossy codec."""
    pixels = np.asarray(frame)
    block = pixels.shape[1] // BITS
    return sum(1 << bit for bit in range(BITS) if pixels[2:6, bit * block + 2 : (bit + 1) * block - 2].mean() > 127)


def make_video(
    container="mp4", codec="mpeg4", frames=60, rate=30, times=None, tick=Fraction(1, 1000), options=None, **context
) -> bytes:
    """A video of numbered frames. `times`: presentation times in ticks, for a variable rate. `context`: attributes of
    the codec context, such as `gop_size`."""
    buffer, rate = io.BytesIO(), Fraction(rate)
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = tick
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / rate if times is None else tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def make_audio() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
    return buffer.getvalue()


def picture_bytes(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind="image/png", gap="") -> str:
    return f"data:{kind};base64,{gap}{base64.b64encode(data).decode()}"


def golden_picture(width: int, height: int, seed: int) -> np.ndarray:
    """The pictures of golden/media.json, (height, width, 3) uint8."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(x * (7 + seed) + y * 13 + c * 29 + (x * y) // (17 + seed)) % 256 for c in range(3)]
    channels[1] = x * 255 // max(1, width - 1)
    return np.stack(channels, -1).astype(np.uint8)


@contextmanager
def served(**files: bytes):
    """A host on this machine that has these files; gives the address they are below, and a list of what was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = files.get(self.path[1:])
            self.send_response(404 if data is None else 200)
            self.end_headers()
            try:
                self.wfile.write(data or b"")
            except OSError:  # the client has read enough
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
