"""A decode step compiled by `torch.compile`, beside the same step without, over static caches, in one process.

    python benchmarks/compiled.py                                  # 128 and 1,024 tokens of context
    python benchmarks/compiled.py --checkpoint FOLDER --steps 300 --json compiled.json
    python benchmarks/compiled.py --device cuda                    # where there is a GPU

All take the same tokens, some steps of each in turn, in rotating order, and over each of three caches in turn, as where memory lies
makes a difference of some percent. Times are medians and lower quartiles, a step ends with the choice of a token. It ends with an error
where more than one graph was made. Before each run of a graph PyTorch looks whether all is as it was when the graph was made;
`torch.compiler.set_stance(skip_guard_eval_unsafe=True)` lets it be trusted.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from time import perf_counter

import torch
from checkpoints import SIZES
from running import check_device, ended, find_checkpoint, publish, started
from text import prompts
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from kimi_k26 import KimiK26ForConditionalGeneration


HERE = Path(__file__).resolve().parent
TURN = 10  # steps of one before the next; of each so many are not counted at the beginning
EAGER, COMPILED, TRUSTED = "eager", "compiled", "compiled, guards skipped"


class Steps:
    """Decode steps of one row over a static cache of its own."""

    def __init__(self, model, row: list[int], steps: int):
        self.at, self.chosen = len(row), []
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=len(row) + steps)
        ids = torch.tensor([row], device=model.device)
        model(ids, past_key_values=self.cache, cache_position=torch.arange(len(row), device=model.device), logits_to_keep=1)

    def one(self, call, token: int, trusted: bool) -> float:
        """Seconds that `call` takes for a step."""
        ids, at = (torch.tensor(value, device=self.cache.layers[0].keys.device) for value in ([[token]], [self.at]))
        with torch.compiler.set_stance(skip_guard_eval_unsafe=trusted):
            start = perf_counter()
            choice = int(call(ids, past_key_values=self.cache, cache_position=at, use_cache=True).logits[0, -1].argmax())
            seconds = perf_counter() - start
        self.chosen.append(choice)
        self.at += 1
        return seconds


@torch.no_grad()
def measure(model, compiled, config: dict, context: int, steps: int) -> list[dict]:
    (row,), (following,) = prompts(config, 1, context), prompts(config, 1, TURN + steps, seed=1)
    kinds = {EAGER: model, COMPILED: compiled, TRUSTED: compiled}
    runs, seconds = [Steps(model, row, len(following)) for _ in kinds], {name: [] for name in kinds}
    for turn, start in enumerate(range(0, len(following), TURN)):
        for n in range(len(runs)):
            name = list(kinds)[(n - turn) % len(runs)]
            for token in following[start : start + TURN]:
                seconds[name].append(runs[n].one(kinds[name], token, name == TRUSTED and turn > 0))
    same = statistics.fmean(len(set(chosen)) == 1 for chosen in zip(*(run.chosen for run in runs)))
    found = []
    for name in kinds:
        taken = sorted(seconds[name][TURN:])
        found.append({"engine": name, "context": context, "count": len(taken), "same": same})
        found[-1] |= {"median": statistics.median(taken), "quartile": taken[len(taken) // 4]}
    return found


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a folder in the published layout; one is made where none is given")
    add("--size", choices=SIZES, default="mid", help="of the checkpoint that is made (%(default)s)")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--contexts", type=int, nargs="+", default=[128, 1024])
    add("--steps", type=int, default=200, help="of each, and context (%(default)s)")
    add("--threads", type=int, default=os.cpu_count())
    add("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    add("--json", type=Path, help="write the results to this file")
    return parser.parse_args(arguments)


def run(args) -> dict:
    check_device(args.device)
    torch.set_num_threads(args.threads)
    folder = find_checkpoint(args.checkpoint, args.work, args.size)
    options = {} if args.device == "cpu" else {"device_map": args.device}
    model = KimiK26ForConditionalGeneration.from_pretrained(folder, dtype="bfloat16", **options).eval()
    config = json.loads((folder / "config.json").read_text())
    results = started(args.device, threads=args.threads, rows=[])
    for context in args.contexts:  # a static cache of another length is another graph
        torch.compiler.reset()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        results["rows"] += measure(model, compiled, config, context, args.steps)
        if counter.frame_count != 1:
            raise RuntimeError(f"{counter.frame_count} graphs were made at {context} tokens of context, one was wanted")
    return ended(results)


def report(results: dict) -> str:
    lines = [f"{results['processor']}, {results['device']}, {results['threads']} threads"]
    lines += ["", f"| | {EAGER} | {COMPILED} | {TRUSTED} | the same choices |", "|---|---|---|---|---|"]
    for rows in zip(*[iter(results["rows"])] * 3):
        for figure in ("median", "quartile"):
            eager, *others = (row[figure] * 1e3 for row in rows)
            cells = [f"{eager:.3f} ms", *(f"{other:.3f} ms ({eager / other:.3f} × as fast)" for other in others)]
            cells.append(f"{min(row['same'] for row in rows):.0%}")
            lines.append(f"| decode, {rows[0]['context']:,} tokens, {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
