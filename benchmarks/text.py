"""Text: this project beside transformers 5 and llama.cpp, on the same weights, in one run.

    make bench                                                  # the peers in environments of their own, then this
    python benchmarks/text.py --engines kimi_k26                # this project alone
    python benchmarks/text.py --checkpoint FOLDER --contexts 128 1024 --json results.json --plot results.png
    python benchmarks/text.py --device cuda                     # where there is a GPU; llama.cpp stays out

Measured: a decode step and a prefill at several lengths of context, a decode step of eight rows at once, and the peak
of memory from loading to the fiftieth token. Every engine runs in a process of its own; they are asked in turn, round
after round, with the same token ids, while the others sleep. Figures are medians; only ratios from one run count.
Beside them stands the limit of the machine: the bytes that must be read over the bandwidth of its memory, or the
products over its speed at matrix products, whichever takes longer.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import SIZES, tensors_of
from plots import draw_text
from report import NAMES, OURS, report
from running import check_device, ended, find_checkpoint, publish, started


HERE = Path(__file__).resolve().parent
LONG = 32768
SHARE = 4  # of the experts, one in so many fits the budget


class Engine:
    """An engine in a process of its own (engines.py); `ask` sends a request and waits for its reply."""

    def __init__(self, name: str, python: str, checkpoint: Path, args, *options: str):
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        command = [python, HERE / "engines.py", name, checkpoint, *options]
        command += ["--threads", args.threads, "--device", args.device]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    def ask(self, do: str, **entries) -> dict:
        self.process.stdin.write(json.dumps({"do": do, **entries}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}
        if "error" in reply:
            self.log.seek(0)
            raise RuntimeError(f"{self.name}, {do}: {reply['error']}\n{self.log.read()[-2000:]}")
        return reply

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()


class Limits:
    """Least times of a checkpoint on a machine, in seconds.

    Args:
        folder: the checkpoint.
        machine: `bandwidth` in bytes per second, `flops` per second.
    """

    def __init__(self, folder: Path, machine: dict):
        self.machine, config = machine, json.loads((folder / "config.json").read_text())["text_config"]
        self.chosen = config["num_experts_per_tok"] / config["n_routed_experts"]
        self.cache = 2 * config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])  # a token
        widths = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
        self.per_pair = 2 * config["num_hidden_layers"] * config["num_attention_heads"] * widths
        self.expert_bytes = self.plain_bytes = self.expert_numbers = self.plain_numbers = 0
        for name, tensor in tensors_of(folder).items():
            if not name.startswith("language_model.") or "embed_tokens" in name:
                continue
            numbers = tensor.nbytes * 2 if name.endswith("packed") else tensor.nbytes // 2
            if ".experts." in name:
                self.expert_bytes += tensor.nbytes
                self.expert_numbers += 0 if name.endswith(("scale", "shape")) else numbers
            else:
                self.plain_bytes += tensor.nbytes
                self.plain_numbers += 0 if "lm_head" in name else numbers

    def decode(self, context: int, batch: int = 1) -> float:
        """Reading the weights that a step uses (experts as if drawn at random) and the cache, each once."""
        used = 1 - (1 - self.chosen) ** batch
        return (self.plain_bytes + used * self.expert_bytes + batch * context * self.cache) / self.machine["bandwidth"]

    def prefill(self, context: int) -> float:
        """Two operations to a weight and token, causal attention over expanded keys and values; or all weights read."""
        weights = self.plain_numbers + self.chosen * self.expert_numbers
        products = 2 * context * weights + self.per_pair * context**2 / 2
        used = 1 - (1 - self.chosen) ** context
        read = (self.plain_bytes + used * self.expert_bytes) / self.machine["bandwidth"]
        return max(products / self.machine["flops"], read)


def prompts(config: dict, batch: int, context: int, seed: int = 0) -> list[list[int]]:
    """Rows of random ids of text."""
    draw = random.Random(f"{seed} {batch} {context}")
    last = min(config["text_config"]["vocab_size"] - 256, config["media_placeholder_token_id"])
    return [draw.choices(range(last), k=context) for _ in range(batch)]


def measure(engines: list[Engine], config: dict, sizes: list[tuple[int, int]], rounds: int, steps: int) -> list[dict]:
    """`rounds` times, for each of `sizes` (tokens of context, rows) every engine in turn: a prefill, then `steps` decode steps on it.

    A round has all sizes, so that a machine that slows down meanwhile does so for all of them, and they compare, too.
    """
    prefills, decodes, logits = ({(*size, engine.name): [] for size in sizes for engine in engines} for _ in range(3))
    for number in range(rounds):
        for context, batch in sizes:
            rows = prompts(config, batch, context)
            following = [list(column) for column in zip(*prompts(config, batch, steps, seed=1))]
            for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
                key = context, batch, engine.name
                reply = engine.ask("prefill", rows=rows)
                prefills[key].append(reply["seconds"])
                logits[key] = reply["logits"]
                decodes[key] += engine.ask("decode", steps=following)["seconds"]
                took = f"prefill {reply['seconds']:8.3f} s, decode {statistics.median(decodes[key]) * 1e3:8.2f} ms"
                print(f"{context:6} x {batch}, round {number + 1}: {engine.name:16} {took}", file=sys.stderr)
    found = []
    for context, batch in sizes:
        for what, taken in (("prefill", prefills), ("decode", decodes)):
            for engine in engines:
                seconds = taken[context, batch, engine.name]
                row = {"what": what, "engine": engine.name, "context": context, "batch": batch}
                row |= {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds), "count": len(seconds)}
                row |= {"apart": apart(logits[context, batch, engine.name], logits[context, batch, engines[0].name])}
                found.append(row)
    return found


def apart(one: list[float], other: list[float]) -> float:
    """The relative distance of two lists of logits, each less its mean."""
    one, other = ([value - statistics.fmean(row) for value in row] for row in (one, other))
    return sum((a - b) ** 2 for a, b in zip(one, other)) ** 0.5 / sum(b**2 for b in other) ** 0.5


def memory(start, names: list[str], config: dict, budget: int, tokens: int = 50) -> list[dict]:
    """Peak memory of loading and `tokens` tokens, beyond what is imported; at last this project's with a budget."""
    (prompt,) = prompts(config, 1, 16)
    found, cases = [], [(name, ()) for name in names]
    if OURS in names:
        cases.append((OURS, ("--budget", budget)))
    for name, options in cases:
        with start(name, *options) as engine:
            reply = engine.ask("memory", prompt=prompt, tokens=tokens)
        found.append({"engine": name, "budget": options[1] if options else None, **reply})
        print(f"memory: {name} {' '.join(map(str, options))} {reply['bytes'] / 2**20:.0f} MiB", file=sys.stderr)
    return found


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a folder in the published layout; one is made where none is given")
    add("--size", choices=SIZES, default="mid", help="of the checkpoint that is made (%(default)s)")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    add("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    add("--long", action="store_true", help=f"also {LONG:,} tokens, this project alone: peers take long there")
    add("--batch", type=int, nargs=2, default=[8, 512], metavar=("ROWS", "CONTEXT"))
    add("--rounds", type=int, default=5, help="prefills of each engine and context (%(default)s)")
    add("--steps", type=int, default=12, help="decode steps after each prefill (%(default)s)")
    add("--threads", type=int, default=os.cpu_count())
    add("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    add("--transformers-python", default=sys.executable, help="interpreter of an environment with transformers 5")
    llama = str(HERE.parent / ".venv/llama.cpp/bin/python")
    add("--llama-python", default=llama, help="interpreter of an environment with llama-cpp-python and gguf")
    add("--profile", action="store_true", help="also where this project's time goes")
    add("--json", type=Path, help="write the results to this file")
    add("--plot", type=Path, help="draw them into this file (takes matplotlib)")
    return parser.parse_args(arguments)


def choose_engines(args) -> list[str]:
    """Those that can run here; says which cannot and why."""
    chosen = []
    for name in args.engines:
        if name.startswith("llama.cpp") and args.device != "cpu":
            print(f"{name} is left out: it is built for the CPU", file=sys.stderr)
        elif name.startswith("llama.cpp") and not Path(args.llama_python).exists():
            print(f"{name} is left out: there is no {args.llama_python}; `make bench` sets it up", file=sys.stderr)
        else:
            chosen.append(name)
    return chosen


def run(args) -> dict:
    """Measure; the result is what goes into the JSON file."""
    check_device(args.device)
    names = choose_engines(args)
    if not names:
        sys.exit("no engine is left to measure")
    folder = find_checkpoint(args.checkpoint, args.work, args.size)
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    args.work.mkdir(parents=True, exist_ok=True)
    results = started(args.device, threads=args.threads, engines=names, versions={}, rows=[])
    results["weights"] = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("language_model."))
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    with tempfile.TemporaryDirectory(dir=args.work) as made:
        gguf = Path(made) / "text.gguf"
        if any(name.startswith("llama.cpp") for name in names):
            subprocess.run([args.llama_python, HERE / "gguf_file.py", folder, gguf], check=True)

        def start(name, *options):
            python = {OURS: sys.executable, "transformers": args.transformers_python}.get(name, args.llama_python)
            return Engine(name, python, gguf if name.startswith("llama.cpp") else folder, args, *options)

        results["memory"] = memory(start, names, config, experts // SHARE)
        engines = [start(name) for name in names]
        try:
            for engine in engines:
                reply = engine.ask("load")
                results["versions"] |= reply["versions"]
                warm = prompts(config, 1, 64)
                engine.ask("prefill", rows=warm)
                engine.ask("decode", steps=[[1], [2]])
            on_torch = [engine for engine in engines if not engine.name.startswith("llama.cpp")]
            if on_torch:
                results["machine"] = on_torch[0].ask("machine")
            rows, context = args.batch
            sizes = [*((length, 1) for length in args.contexts), (context, 1), (context, rows)]
            results["rows"] += measure(engines, config, list(dict.fromkeys(sizes)), args.rounds, args.steps)
            ours = [engine for engine in engines if engine.name == OURS]
            if args.long:
                results["rows"] += measure(ours, config, [(LONG, 1)], 1, args.steps)
            if args.profile and ours:
                results["profile"] = {}
                for length in args.contexts:
                    entries = {"rows": prompts(config, 1, length), "steps": prompts(config, args.steps, 1)}
                    results["profile"][length] = ours[0].ask("profile", **entries)
        finally:
            for engine in engines:
                engine.__exit__()
    limits = Limits(folder, results["machine"]) if "machine" in results else None
    for row in results["rows"]:
        sizes = (row["context"], row["batch"]) if row["what"] == "decode" else (row["context"] * row["batch"],)
        row["limit"] = getattr(limits, row["what"])(*sizes) if limits else float("nan")
    return ended(results)


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results), draw_text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
