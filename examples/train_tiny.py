"""From nothing to a small Kimi-K2.6 that answers: `python examples/train_tiny.py --out DIR`.

Draws its own pictures and videos and writes its own dialogues (`tiny/`), learns a vocabulary from them, trains a small
model of this class, and writes a checkpoint in the published layout, INT4 experts included, with a table of what it can
do. Nothing is downloaded. `--resume` continues a run that was stopped, with the same data in the same order. `--from`
takes a checkpoint that such a run has written through the last part of training once more.
"""

import argparse
import json
import os
import shutil
import socket
from pathlib import Path
from random import Random

import regex
import torch
import torch.multiprocessing

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor
from kimi_k26.cli.tiny import write_tokenizer
from kimi_k26.vocabulary_kimi import read_ranks
from tiny.case import render
from tiny.evaluation import evaluate
from tiny.export import expert_use, plain_model, write_checkpoint
from tiny.mixes import draw_case
from tiny.report import draw_curve, table_lines, write_card, write_results
from tiny.running import state_path, work
from tiny.vocabulary import learn_ranks

TEMPLATE = Path(__file__).resolve().parents[1] / "chat_template.jinja"
MERGES, CORPUS = 800, 4000  # byte pairs, and the dialogues they are learnt from


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, default=116, help="end after so many minutes at the latest (%(default)s)")
    parser.add_argument("--steps", type=int, default=9200, help="end after so many steps (%(default)s)")
    parser.add_argument("--seeing", type=int, default=1500, help="of them first so many of seeing alone (%(default)s)")
    parser.add_argument("--last", type=int, default=1700, help="and so many in the last part (%(default)s)")
    parser.add_argument("--from", type=Path, dest="start", help="a checkpoint to take through the last part alone")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR-training.pt")
    parser.add_argument("--until", type=int, help="stop at this step as if interrupted, for a later --resume")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each (%(default)s)")
    parser.add_argument("--aux-loss-alpha", type=float, default=0.0, help="weight of a balancing loss, beside the bias")
    parser.add_argument("--matrix-rate", type=float, default=0.012, help="learning rate of Muon (%(default)s)")
    parser.add_argument("--other-rate", type=float, default=0.004, help="learning rate of Adam (%(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="dialogues a step, in each process (%(default)s)")
    parser.add_argument("--parts", type=int, default=4, help="batches they are cut into by length (%(default)s)")
    parser.add_argument("--log-every", type=int, default=100, help="steps between lines of progress (%(default)s)")
    parser.add_argument("--cases", type=int, default=200, help="of each skill in the table (%(default)s)")
    parser.add_argument("--evaluation-seed", type=int, default=1, help="of those cases (%(default)s)")
    parser.add_argument("--only-evaluate", action="store_true", help="print the table of the checkpoint in DIR")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.steps = options.last if options.start else options.steps
    options.until = options.until or options.steps
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options.port = probe.getsockname()[1]
    return options


def learn_vocabulary(seed: int) -> dict[bytes, int]:
    rng = Random(f"vocabulary {seed}")
    texts = []
    for _ in range(CORPUS):
        for text, _ in render(draw_case(rng)):
            texts += [part for part in regex.split(r"<\|[^|]*\|>|</?think>", text) if part]
    return learn_ranks(texts, MERGES)


def finish(options: argparse.Namespace, ranks: dict[bytes, int]) -> None:
    """The checkpoint, the curve and the table, from what training left."""
    state = torch.load(state_path(options.out), weights_only=False)
    write_checkpoint(plain_model(state, len(ranks), quantized=True), options.out, TEMPLATE)
    draw_curve(state["history"], options.out / "curve.png")
    if options.start:
        shutil.copyfile(options.start / "curve.png", options.out / "curve-before.png")
    processor = KimiK26Processor.from_pretrained(options.out)
    model = KimiK26ForConditionalGeneration.from_pretrained(options.out, dtype="auto").eval()
    text = model.config.text_config
    results = {
        "int4": evaluate(model, processor, options.cases, options.evaluation_seed)[0],
        "bfloat16": evaluate(
            plain_model(state, len(ranks), quantized=False), processor, options.cases, options.evaluation_seed
        )[0],
        "least_used_expert": expert_use(model, ranks, options.evaluation_seed),
        "run": {
            "before": json.loads((options.start / "results.json").read_text())["run"] if options.start else None,
            "steps": state["step"],
            "rows": options.rows * options.workers,
            "minutes": state["spent"] / 60,
            "core_minutes": state["worked"] / 60,
            "workers": options.workers,
            "seed": options.seed,
            "cases": options.cases,
            "evaluation_seed": options.evaluation_seed,
            "experts": text.n_routed_experts,
            "experts_used": text.num_experts_per_tok,
        },
    }
    write_results(results, options.out)
    write_card(results, options.out)
    print("\n".join(table_lines(results)))
    print(f"least used expert: {results['least_used_expert']:.2f} of its fair share")


def main() -> None:
    options = arguments()
    if options.only_evaluate:
        processor = KimiK26Processor.from_pretrained(options.out)
        model = KimiK26ForConditionalGeneration.from_pretrained(options.out, dtype="auto").eval()
        table, _ = evaluate(model, processor, options.cases, options.evaluation_seed)
        print("\n".join(table_lines({"int4": table})))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and state_path(options.out).exists():
        ranks = read_ranks(options.out / "tiktoken.model")
    else:
        ranks = read_ranks(options.start / "tiktoken.model") if options.start else learn_vocabulary(options.seed)
        write_tokenizer(options.out, ranks)
    # glibc reads this when a process begins: big pieces of memory come in big pages, whose addresses are found faster.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    torch.multiprocessing.spawn(work, (options.workers, options, ranks), nprocs=options.workers)
    if options.until == options.steps:
        finish(options, ranks)


if __name__ == "__main__":
    main()
