"""MoonViT at the published size: this project beside transformers 5, on the same weights, in one run.

    python benchmarks/vision.py                                    # a picture of 1024 × 1024, and memory at 16,384 patches
    python benchmarks/vision.py --engines kimi_k26 --profile       # this project alone, and where its time goes
    python benchmarks/vision.py --device cuda --json vision.json --plot vision.png

27 layers of width 1152 and the projector, in bfloat16, random weights. Each engine is a process of its own (engines.py);
they are asked in turn, round after round, with the same patches of noise, while the other sleeps. Times are medians; memory
is the most that a process held beyond what it held before, which is the weights and the patches. Beside the time stands
the limit: the products over the machine's speed at products in bfloat16.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from checkpoints import SIZES
from plots import draw_bars
from report import NAMES, OURS, beside, machine
from running import check_device, ended, find_checkpoint, publish, started
from text import Engine, apart


HERE = Path(__file__).resolve().parent
ENGINES = (OURS, "transformers")


def operations(config: dict, patches: int) -> float:
    """Of the tower and the projector, two to a product: linear layers, and attention of every patch to every other."""
    vision = config["vision_config"]
    width, inner, layers = vision["vt_hidden_size"], vision["vt_intermediate_size"], vision["vt_num_hidden_layers"]
    merged = width * vision["merge_kernel_size"][0] * vision["merge_kernel_size"][1]
    layer = 2 * patches * (4 * width**2 + 2 * width * inner) + 4 * patches**2 * width
    embedding = 2 * patches * width * 3 * vision["patch_size"] ** 2
    projector = 2 * patches * width / merged * (merged**2 + merged * vision["text_hidden_size"])
    return layers * layer + embedding + projector


def measure(engines: list[Engine], grid: list[int], rounds: int) -> list[dict]:
    """`rounds` times, every engine in turn."""
    taken, features = {engine.name: [] for engine in engines}, {}
    for number in range(rounds):
        for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
            reply = engine.ask("see", rows=grid[0], columns=grid[1])
            taken[engine.name].append(reply["seconds"])
            features[engine.name] = reply["features"]
            print(f"round {number + 1}: {engine.name:14} {reply['seconds']:8.3f} s", file=sys.stderr)
    return [
        {"engine": name, "grid": grid, "median": statistics.median(seconds), "fastest": min(seconds)}
        | {"slowest": max(seconds), "count": len(seconds), "apart": apart(features[name], features[engines[0].name])}
        for name, seconds in taken.items()
    ]


def report(results: dict) -> str:
    engines = results["engines"]
    lines = [*machine(results), "", f"| | {' | '.join(NAMES[name] for name in engines)} | limit |"]
    lines += ["|---" * (len(engines) + 2) + "|"]
    for what, unit, scale in (("time", "s", 1), ("memory", "MiB", 2**-20)):
        rows = {row["engine"]: row for row in results[what]}
        values = {name: row["median" if what == "time" else "bytes"] * scale for name, row in rows.items()}
        ours = values.get(OURS)
        cells = [beside(values[n], None if n == OURS else ours, unit) if n in values else "" for n in engines]
        if rows:
            first = next(iter(rows.values()))
            limit = f"{first['limit']:.3g} s" if what == "time" else ""
            label = f"{what}, {first['grid'][0]} × {first['grid'][1]} patches"
            lines.append(f"| {label} | {' | '.join(cells)} | {limit} |")
    for row in results["time"][1:]:
        lines.append(f"\n{NAMES[row['engine']]}: features {row['apart']:.4f} from those of {NAMES[engines[0]]}")
    if "profile" in results:
        times = results["profile"]
        lines.append(f"\na picture, {times['all']:.0f} ms under the profiler")
        parts = ((name, taken) for name, taken in times.items() if name != "all")
        lines += [f"  {taken:10.1f} ms {taken / times['all']:6.1%}  {name}" for name, taken in parts]
    return "\n".join(lines)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="vision", help="of the checkpoint that is made (%(default)s)")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--grid", type=int, nargs=2, default=[74, 74], metavar=("ROWS", "COLUMNS"), help="patches (1024 × 1024 pixels)")
    add("--large", type=int, nargs=2, default=[128, 128], metavar=("ROWS", "COLUMNS"), help="patches of the memory row")
    add("--no-memory", action="store_true", help="leave out the memory row, which takes minutes on a CPU")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=os.cpu_count())
    add("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    add("--transformers-python", default=sys.executable, help="interpreter of an environment with transformers 5")
    add("--profile", action="store_true", help="also where this project's time goes")
    add("--json", type=Path, help="write the results to this file")
    add("--plot", type=Path, help="draw them into this file (takes matplotlib)")
    return parser.parse_args(arguments)


def run(args) -> dict:
    check_device(args.device)
    folder = find_checkpoint(None, args.work, args.size)
    config = json.loads((folder / "config.json").read_text())
    results = started(args.device, threads=args.threads, engines=args.engines, versions={}, memory=[])
    pythons = {OURS: sys.executable, "transformers": args.transformers_python}
    engines = [Engine(name, pythons[name], folder, args) for name in args.engines]
    try:
        for engine in engines:
            results["versions"] |= engine.ask("load")["versions"]
            engine.ask("see", rows=4, columns=4)  # reads the weights
            if not args.no_memory:  # before anything that memory is kept of
                reply = engine.ask("see", rows=args.large[0], columns=args.large[1])
                print(f"memory: {engine.name} {reply['bytes'] / 2**20:.0f} MiB", file=sys.stderr)
                seen = {key: reply[key] for key in ("bytes", "seconds")}
                results["memory"].append({"engine": engine.name, "grid": args.large, **seen})
        results["machine"] = engines[0].ask("machine")
        results["time"] = measure(engines, args.grid, args.rounds)
        if args.profile and engines[0].name == OURS:
            results["profile"] = engines[0].ask("profile_seeing", rows=args.grid[0], columns=args.grid[1])
    finally:
        for engine in engines:
            engine.__exit__()
    for row in results["time"]:
        row["limit"] = operations(config, args.grid[0] * args.grid[1]) / results["machine"]["flops"]
    return ended(results)


def draw(results: dict, path: Path):
    rows = [row | {"what": "MoonViT, a picture"} for row in results["time"]]
    rows += ({"what": "peak memory above weights", "unit": "MiB", "median": row["bytes"], **row} for row in results["memory"])
    draw_bars([row | {"label": NAMES[row["engine"]]} for row in rows], path)


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results), draw)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
