"""What it takes to begin: importing, loading a tokenizer and a processor, and the memory of loading and 50 tokens.

    python benchmarks/startup.py                            # with a checkpoint and a vocabulary made here
    python benchmarks/startup.py --checkpoint FOLDER --tokenizer FOLDER
    python benchmarks/startup.py --json results.json

Every figure comes from new processes, one case after the other, round after round; medians. Seconds count from where
the modules named in "after" have been imported. Memory is the peak of what is resident: anonymous pages and the pages of
mapped files, so the weights that were read count, and so does what the library imports on the way. It is given beyond
`import torch, transformers`, and beyond the library's own base classes, without which it runs no model at all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkpoints import SIZES, tensors_of
from engines import resident
from mixed_text import make_vocabulary
from report import machine
from running import ended, find_checkpoint, publish, started
from text import prompts


HERE = Path(__file__).resolve().parent
TOKENS = 50
LIBRARIES = "import torch, transformers"
BASES = (
    "from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizer\n"
    "from transformers.image_processing_utils import BaseImageProcessor\n"
    "from transformers.modeling_layers import GradientCheckpointingLayer\n"
    "from transformers.processing_utils import ProcessorMixin"
)
OURS = "from kimi_k26 import *"
# What is timed → what was imported before, in words and as code, and the code.
TIMED = {
    "`import torch, transformers`": ("nothing", "", LIBRARIES),
    "the library's base classes": ("torch, transformers", LIBRARIES, BASES),
    "`import kimi_k26`": ("torch, transformers", LIBRARIES, "import kimi_k26"),
    "`from kimi_k26 import *`": ("the base classes", f"{LIBRARIES}\n{BASES}", OURS),
    "tokenizer": ("all of these", f"{LIBRARIES}\n{BASES}\n{OURS}", "TikTokenTokenizer.from_pretrained(folder)"),
    "processor": ("all of these", f"{LIBRARIES}\n{BASES}\n{OURS}", "KimiK26Processor.from_pretrained(folder)"),
}
BEYOND = ("torch, transformers", "the base classes")  # what memory is counted beyond
PARTS = {"weights": "of its files", "anonymous": "anonymous"}  # of what is resident in the end


def seconds(what: str, folder: Path) -> dict:
    """In this process: the seconds that one of `TIMED` takes."""
    _, before, code = TIMED[what]
    names = {"folder": str(folder)}
    exec(before, names)
    begun = time.perf_counter()
    exec(code, names)
    return {"seconds": time.perf_counter() - begun}


def memory(folder: Path, prompt: list[int], threads: int) -> dict:
    """In this process: bytes resident after the imports, and at most from there to the last of the tokens.

    Returns:
        `beyond`: by `BEYOND`, how far the peak lies above it. `weights`: how many bytes of the checkpoint's files are
        resident in the end. `anonymous`: how many bytes, beyond the base classes, are in no file.
    """
    names: dict = {}
    exec(LIBRARIES, names)
    libraries = resident()
    exec(BASES, names)
    bases, anonymous = resident(), resident("RssAnon")
    resident(reset=True)
    from kimi_k26 import KimiK26ForConditionalGeneration

    torch = names["torch"]
    torch.set_num_threads(threads)
    names["transformers"].utils.logging.disable_progress_bar()
    model = KimiK26ForConditionalGeneration.from_pretrained(folder, dtype="bfloat16")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    peak = resident("VmHWM")
    found = {"beyond": dict(zip(BEYOND, (peak - libraries, peak - bases))), "weights": resident_of(folder)}
    return found | {"anonymous": resident("RssAnon") - anonymous, "tokens": ids.shape[1] - len(prompt)}


def resident_of(folder: Path) -> int:
    """Bytes of the files in a folder that are resident in this process as memory maps."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # the head of a map: addresses … path
            counts = len(rest) == 5 and Path(rest[4]).parent == folder
        elif counts and first == "Rss:":
            found += 1024 * int(rest[0])
    return found


def in_new_process(**request) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--request", json.dumps(request)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{request} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict) -> str:
    lines = [*machine(results), "", "| | after | s |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['after']} | {row['median']:.3f} |" for row in results["rows"]]
    size, found = results["checkpoint"], results["memory"]
    lines += ["", f"| loading and {TOKENS} tokens, peak beyond | MiB | times the checkpoint |", "|---|---|---|"]
    for what, count in found["beyond"].items():
        lines.append(f"| {what} | {count / 2**20:.0f} | {count / size:.2f} |")
    parts = ", ".join(f"{found[part] / 2**20:.0f} MiB {words}" for part, words in PARTS.items())
    lines += ["", f"The checkpoint has {size / 2**20:.0f} MiB; resident in the end, beyond the base classes: {parts}"]
    return "\n".join(lines)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a folder in the published layout; one is made where none is given")
    add("--size", choices=SIZES, default="mid", help="of the checkpoint that is made (%(default)s)")
    add("--tokenizer", type=Path, help="a folder with tiktoken.model and tokenizer_config.json; else one is made")
    add("--work", type=Path, default=HERE / "work", help="folder for what is made (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=os.cpu_count())
    add("--json", type=Path, help="write the results to this file")
    add("--request", type=json.loads, help=argparse.SUPPRESS)  # what a new process is for
    return parser.parse_args(arguments)


def run(args) -> dict:
    """Measure; the result is what goes into the JSON file."""
    folder = find_checkpoint(args.checkpoint, args.work, args.size)
    vocabulary = (args.tokenizer or args.work / "vocabulary").resolve()
    if not (vocabulary / "tiktoken.model").exists():
        if args.tokenizer:
            sys.exit(f"{vocabulary}: no tiktoken.model here")
        make_vocabulary(vocabulary)
    (prompt,) = prompts(json.loads((folder / "config.json").read_text()), 1, 16)
    results = started("cpu", threads=args.threads, versions=versions())
    results["checkpoint"] = sum(file.stat().st_size for file in {tensor.file for tensor in tensors_of(folder).values()})
    taken, peaks = {what: [] for what in TIMED}, []
    for number in range(args.rounds):
        for what, all_taken in taken.items():
            all_taken.append(in_new_process(seconds=what, folder=str(vocabulary))["seconds"])
        peaks.append(in_new_process(prompt=prompt, folder=str(folder), threads=args.threads))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    results["rows"] = [
        {"what": what, "after": TIMED[what][0], "median": statistics.median(found), "fastest": min(found)}
        | {"slowest": max(found), "count": len(found)}
        for what, found in taken.items()
    ]
    median = statistics.median
    results["memory"] = {part: median(peak[part] for peak in peaks) for part in (*PARTS, "tokens")}
    results["memory"]["beyond"] = {what: median(peak["beyond"][what] for peak in peaks) for what in BEYOND}
    return ended(results)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tiktoken")}


def main(arguments=None) -> int:
    args = parse(arguments)
    if args.request:
        folder, what = Path(args.request.pop("folder")), args.request.pop("seconds", None)
        print(json.dumps(seconds(what, folder) if what else memory(folder, **args.request)))
        return 0
    results = run(args)
    publish(args, results, report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
