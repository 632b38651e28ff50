"""The tokenizer beside tiktoken alone, on megabytes of mixed text; and what importing and loading take.

    python benchmarks/tokenizer.py                          # with a vocabulary of the published size, made here
    python benchmarks/tokenizer.py --tokenizer FOLDER       # with that of a checkpoint
    python benchmarks/tokenizer.py --json results.json

Both have the same ranks, split pattern and special tokens, and run in one process, in turn, round after round; the figures
are medians. tiktoken alone gets the text whole, which it encodes on one core; the tokenizer cuts it into pieces of 400,000
characters, as the published one does, and lets tiktoken encode them on all cores. tiktoken alone knows no special tokens to
skip when it decodes. Loading is timed in new processes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixed_text import make_vocabulary, mixed_text
from report import machine
from running import ended, publish, started


HERE = Path(__file__).resolve().parent
NEEDED = ("tiktoken.model", "tokenizer_config.json", "config.json")
# What a new process loads, in this order; `import` is what this project adds to the libraries it is for.
STEPS = {
    "import of torch and transformers": "import torch, transformers",
    "import of kimi_k26": "import kimi_k26",
    "every public name of it": "for name in kimi_k26.__all__: getattr(kimi_k26, name)",
    "tokenizer": "kimi_k26.TikTokenTokenizer.from_pretrained(folder)",
    "processor": "kimi_k26.KimiK26Processor.from_pretrained(folder)",
    "tokenizer, AutoTokenizer": "transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    "processor, AutoProcessor": "transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
}


def raw_tiktoken(tokenizer):
    """tiktoken with the ranks, the pattern and the special tokens of a tokenizer of this project, and nothing else."""
    import tiktoken

    from kimi_k26.vocabulary_kimi import SPLIT_PATTERN, spelled

    tokens = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    first = tokenizer.vocab_size - 256
    ranks = {spelled(token): rank for rank, token in enumerate(tokens[:first])}
    special = {token: first + place for place, token in enumerate(tokens[first:])}
    return tiktoken.Encoding("raw", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def tasks(tokenizer, raw, text: str) -> dict[str, tuple]:
    """What is timed: name → what makes the argument, and by engine what is called with it."""
    data, ids = text.encode(), tokenizer.encode(text)

    def fresh():  # a string keeps its UTF-8 once it has been asked for: no call must profit from the one before
        return data.decode()

    def encode_raw(text):
        return raw.encode(text, allowed_special="all")

    def skip(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    return {
        "encode": (fresh, {"kimi_k26": tokenizer.encode, "tiktoken": encode_raw}),
        "tokenizer(text)": (fresh, {"kimi_k26": tokenizer, "tiktoken": encode_raw}),
        "decode": (lambda: ids, {"kimi_k26": tokenizer.decode, "tiktoken": raw.decode}),
        "decode(skip_special_tokens=True)": (lambda: ids, {"kimi_k26": skip, "tiktoken": raw.decode}),
    }


def check(tokenizer, raw, text: str):
    """The same ids from both, and the text again."""
    ids = tokenizer.encode(text)
    if ids != tokenizer(text)["input_ids"] or tokenizer.decode(ids) != text:
        raise SystemExit("the tokenizer contradicts itself: nothing is measured")
    piece = text[:400_000]  # what the published tokenizer hands to tiktoken at once
    if tokenizer.encode(piece) != raw.encode(piece, allowed_special="all"):
        raise SystemExit("tiktoken gives other ids: nothing is measured")


def measure(timed: dict[str, tuple], rounds: int, size: int) -> list[dict]:
    """`rounds` times, everything in turn."""
    taken = {(what, engine): [] for what, (_, calls) in timed.items() for engine in calls}
    for number in range(rounds):
        for what, (prepare, calls) in timed.items():
            for engine in sorted(calls, reverse=bool(number % 2)):
                given = prepare()
                begun = time.perf_counter()
                result = calls[engine](given)
                taken[what, engine].append(time.perf_counter() - begun)
                del result
    return [
        {"what": what, "engine": engine, "median": statistics.median(seconds), "fastest": min(seconds)}
        | {"slowest": max(seconds), "count": len(seconds), "bytes_per_second": size / statistics.median(seconds)}
        for (what, engine), seconds in taken.items()
    ]


def loading(folder: Path, rounds: int) -> list[dict]:
    """Seconds of each of `STEPS`, in new processes."""
    timed = "".join(f"begun = clock()\n{code}\ntaken.append(clock() - begun)\n" for code in STEPS.values())
    code = f"import json, sys\nfrom time import perf_counter as clock\nfolder, taken = {str(folder)!r}, []\n{timed}"
    found = []
    with tempfile.TemporaryDirectory() as modules:
        # The first process fills the cache of remote code, as a first use on a machine does.
        for _ in range(rounds + 1):
            done = subprocess.run(
                [sys.executable, "-c", code + "print(json.dumps(taken))"],
                capture_output=True,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            )
            if done.returncode:
                raise SystemExit(f"loading {folder} failed:\n{done.stderr[-2000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {"what": what, "median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
        | {"count": len(seconds)}
        for what, seconds in zip(STEPS, zip(*found[1:]))
    ]


def report(results: dict) -> str:
    lines = [*machine(results), f"{results['bytes'] / 1e6:.1f} MB of text, {results['ids']:,} ids", ""]
    lines += ["| | this project | tiktoken alone | speed against it |", "|---|---|---|---|"]
    rows = {(row["what"], row["engine"]): row for row in results["rows"]}
    for what, engine in rows:
        if engine == "kimi_k26":
            ours, raw = (rows[what, name]["bytes_per_second"] / 1e6 for name in ("kimi_k26", "tiktoken"))
            lines.append(f"| `{what}` | {ours:.1f} MB/s | {raw:.1f} MB/s | {ours / raw:.2f} × |")
    lines += ["", "| in a new process, in this order | s |", "|---|---|"]
    return "\n".join(lines + [f"| {row['what']} | {row['median']:.3f} |" for row in results["loading"]])


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tokenizer", type=Path, help="a folder with tiktoken.model and tokenizer_config.json; else one is made")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--megabytes", type=float, default=4.0, help="of text (%(default)s)")
    add("--rounds", type=int, default=7, help="(%(default)s)")
    add("--json", type=Path, help="write the results to this file")
    return parser.parse_args(arguments)


def run(args) -> dict:
    import tiktoken
    import transformers

    from kimi_k26 import TikTokenTokenizer
    from kimi_k26.cli.attach import attach

    results = started("cpu", threads=os.cpu_count())
    results["versions"] = {module.__name__: module.__version__ for module in (tiktoken, transformers)}
    folder = args.tokenizer or args.work / "vocabulary"
    if not args.tokenizer and not (folder / NEEDED[0]).exists():
        make_vocabulary(folder)
    with tempfile.TemporaryDirectory() as copied:
        for name in NEEDED:  # a copy, so that code may be attached to it
            if not (folder / name).exists():
                raise SystemExit(f"{folder}: no {name} here")
            shutil.copyfile(folder / name, Path(copied) / name)
        attach(Path(copied))
        tokenizer, text = TikTokenTokenizer.from_pretrained(copied), mixed_text(int(args.megabytes * 1e6))
        raw = raw_tiktoken(tokenizer)
        check(tokenizer, raw, text)
        results |= {"bytes": len(text.encode()), "ids": len(tokenizer.encode(text)), "ranks": raw.n_vocab - 256}
        results["rows"] = measure(tasks(tokenizer, raw, text), args.rounds, results["bytes"])
        results["loading"] = loading(Path(copied), args.rounds)
    return ended(results)


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
