"""Pictures and a video to `pixel_values`, beside the published arithmetic in NumPy and beside decoding alone.

    python benchmarks/media.py                                  # two sizes of pictures, a minute of video made here
    python benchmarks/media.py --video FILE --rounds 3 --json media.json --plot media.png

Pictures are PIL images already. The peer scales them with Pillow, as everyone must for the same pixels, and pads,
normalises and cuts them with NumPy, as published: divided in float64. `numpy-float32` is the same without float64.
For the video the peer is PyAV, which decodes up to the last frame that is looked at, on all its threads, and turns the
frames that are looked at into RGB arrays, and no more. `pyav-spare` also leaves out the frames that no other is made from.
All run in one process, in turn, round after round; the figures are medians. The results are compared to 1e-6 first.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from time import perf_counter

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from moving import make_video
from PIL import Image
from plots import draw_bars
from report import OURS, beside, machine
from running import ended, publish, started


HERE = Path(__file__).resolve().parent
PEERS = {
    "numpy": "NumPy as published",
    "numpy-float32": "NumPy, float32 throughout",
    "pyav": "PyAV, decoding alone",
    "pyav-spare": "PyAV, decoding the least",
}


def published(image: Image.Image, config, target, dtype=np.float64) -> np.ndarray:
    """The published arithmetic: `(patches, 3, patch, patch)` float32."""
    patch = config.patch_size
    scaled = np.asarray(image.resize((target.width, target.height), Image.Resampling.BICUBIC))
    down, right = target.rows * patch - target.height, target.columns * patch - target.width
    pixels = np.pad(scaled, ((0, down), (0, right), (0, 0)))
    pixels = (pixels / dtype(255)).astype(np.float32, copy=False)
    pixels -= np.array(config.mean, np.float32)
    pixels *= 1 / np.array(config.std, np.float32)
    ordered = pixels.reshape(target.rows, patch, target.columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return ordered.reshape(-1, 3, patch, patch)


def decoded(path: Path, indices: list[int]):
    """The frames of `indices` as RGB arrays, one after the other, each by itself in memory."""
    wanted, reformatter = set(indices), VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield reformatter.reformat(frame, format="rgb24").to_ndarray()
            if number == indices[-1]:
                return


def decoded_sparingly(path: Path, indices: list[int]):
    """The same, the decoder being told which frames are not looked at: it leaves out those no other is made from."""
    with av.open(str(path)) as container:
        times = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    wanted, reformatter = {times[index] for index in indices}, VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for packet in container.demux(stream):
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                if frame.pts in wanted:
                    yield reformatter.reformat(frame, format="rgb24").to_ndarray()
                if frame.pts == times[indices[-1]]:
                    return


def measure(what: str, calls: dict, rounds: int) -> list[dict]:
    """`rounds` times all calls in turn, after one that is not counted."""
    taken = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in sorted(calls, reverse=bool(number % 2)):
            begun = perf_counter()
            result = calls[name]()
            seconds = perf_counter() - begun
            del result
            if number:
                taken[name].append(seconds)
                print(f"{what}, round {number}: {name:14} {seconds * 1e3:9.1f} ms", file=sys.stderr)
    return [
        {"what": what, "engine": name, "median": statistics.median(seconds), "fastest": min(seconds)}
        | {"slowest": max(seconds), "count": len(seconds)}
        for name, seconds in taken.items()
    ]


def best(work, rounds: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(rounds):
        begun = perf_counter()
        work()
        taken.append(perf_counter() - begun)
    return min(taken)


def same(given: torch.Tensor, expected: np.ndarray, what: str):
    apart = float(np.abs(given.numpy() - expected).max())
    if not apart <= 1e-6:
        raise SystemExit(f"{what}: pixels are {apart} apart: nothing is measured")


def copying() -> float:
    """Bytes per second that this machine writes while it reads as many."""
    block = torch.ones(2**26)
    copy = torch.empty_like(block)
    return block.nbytes / best(lambda: copy.copy_(block), 5)


def picture(processor, size: tuple[int, int], rounds: int, threads: int, copied: float) -> list[dict]:
    """Rows of one size of pictures; the limit is the scaling on all threads, and the patches written once."""
    from kimi_k26.scaling_kimi_k26 import scaled

    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    config, what = processor.media_config(), f"picture {size[0]:,} × {size[1]:,}"
    target = config.fit_image(*size)
    given = processor.encode_image(image).pixel_values
    same(given, published(image, config, target), what)
    calls = {
        OURS: lambda: processor.encode_image(image),
        "numpy": lambda: published(image, config, target),
        "numpy-float32": lambda: published(image, config, target, np.float32),
    }
    pixels = np.asarray(image)
    scaling = best(lambda: scaled(pixels, target.width, target.height)(0, target.height))
    limit = scaling / threads + given.nbytes / copied
    return [row | {"limit": limit, "scaling": scaling} for row in measure(what, calls, rounds)]


def video(processor, path: Path, rounds: int, threads: int, copied: float) -> list[dict]:
    """Rows of a video; the limit is the least decoding, and of each frame its scaling on all threads and its patches."""
    from kimi_k26.scaling_kimi_k26 import scaled
    from kimi_k26.video_kimi_k26 import read_video

    config, given = processor.media_config(), processor.encode_video(path)
    opened = read_video(path, config.choose)
    opened.frames.close()
    count, indices = len(opened.indices), opened.indices
    target = config.fit_frame(opened.width, opened.height, count)
    area = target.rows * target.columns
    for decode in (decoded, decoded_sparingly):
        number = -1
        for number, frame in enumerate(decode(path, indices)):
            if number in (0, 1, count // 2, count - 1):
                expected = published(Image.fromarray(frame), config, target)
                same(given.pixel_values[number * area : (number + 1) * area], expected, f"frame {indices[number]}")
        if number + 1 != count:
            raise SystemExit(f"{decode.__name__}: {number + 1} of {count} frames: nothing is measured")
    written = given.pixel_values.nbytes
    del given, expected
    calls = {
        OURS: lambda: processor.encode_video(path),
        "pyav": lambda: sum(1 for _ in decoded(path, indices)),
        "pyav-spare": lambda: sum(1 for _ in decoded_sparingly(path, indices)),
    }
    what = f"video, {opened.total_frames / opened.fps:.3g} s of {opened.width:,} × {opened.height:,}, {count} frames of it"
    rows = measure(what, calls, rounds)
    least = next(row["median"] for row in rows if row["engine"] == "pyav-spare")
    scaling = best(lambda: scaled(frame, target.width, target.height)(0, target.height))
    limit = least + count * scaling / threads + written / copied
    return [row | {"limit": limit, "scaling": count * scaling} for row in rows]


def report(results: dict) -> str:
    lines = [*machine(results), f"{results['copied'] / 1e9:.1f} GB/s copied", ""]
    lines += ["| | this project | beside | limit |", "|---|---|---|---|"]
    for what in dict.fromkeys(row["what"] for row in results["rows"]):
        rows = {row["engine"]: row for row in results["rows"] if row["what"] == what}
        ours = rows.pop(OURS)
        times = [f"{PEERS[name]} {beside(row['median'] * 1e3, ours['median'] * 1e3, 'ms')}" for name, row in rows.items()]
        lines.append(f"| {what} | {ours['median'] * 1e3:.4g} ms | {'; '.join(times)} | {ours['limit'] * 1e3:.3g} ms |")
    return "\n".join(lines)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pictures", nargs="*", default=["1920x1080", "4000x3000"], help="sizes (%(default)s)")
    add("--video", type=Path, help="a video file; else one is made")
    add("--seconds", type=float, default=60, help="of the video that is made; 0: none (%(default)s)")
    add("--size", default="1920x1080", help="of the video that is made (%(default)s)")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--rounds", type=int, default=7, help="of pictures (%(default)s)")
    add("--video-rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=os.cpu_count())
    add("--json", type=Path, help="write the results to this file")
    add("--plot", type=Path, help="draw them into this file (takes matplotlib)")
    return parser.parse_args(arguments)


def size_of(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def run(args) -> dict:
    from kimi_k26 import KimiK26ImageProcessor

    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):  # FFmpeg takes as many threads as it sees processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    results = started("cpu", threads=args.threads, rows=[])
    modules = {"av": av, "numpy": np, "Pillow": Image, "torch": torch}
    results["versions"] = {name: module.__version__ for name, module in modules.items()}
    path = args.video
    if path is None and args.seconds:
        path = args.work / f"{args.seconds:g}s-{args.size}.mp4"
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            make_video(path, args.seconds, *size_of(args.size))
    results["copied"] = copied = copying()
    images = KimiK26ImageProcessor()
    for text in args.pictures:
        results["rows"] += picture(images, size_of(text), args.rounds, args.threads, copied)
    if path is not None:
        results["rows"] += video(images, path, args.video_rounds, args.threads, copied)
    return ended(results)


def draw(results: dict, path: Path):
    labels = {OURS: "this project"} | PEERS
    draw_bars([row | {"label": labels[row["engine"]]} for row in results["rows"]], path)


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results), draw)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
