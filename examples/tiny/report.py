"""What a run leaves beside the weights: the curve, the table, the model card."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from .evaluation import BARS


def draw_curve(history: list[dict], path: Path) -> None:
    """Loss and share of dialogues right to the last token, per skill, over the steps, as a PNG."""
    shown = ("name", "count", "which", "way", "second", "bigger", "kept", "tool")
    figure = Figure(figsize=(11, 4), dpi=80)
    left, right = figure.subplots(1, 2)
    for colour, skill in enumerate(shown):
        points = [(n["step"], *n["scores"][skill]) for n in history if skill in n["scores"]]
        if not points:
            continue
        steps, rights, losses = zip(*points)
        left.plot(steps, losses, label=skill, color=f"C{colour}")
        right.plot(steps, [100 * one for one in rights], label=skill, color=f"C{colour}")
    left.set(title="loss on new dialogues, per word of the assistant", xlabel="step", yscale="log")
    right.set(title="dialogues right to the last word, %", xlabel="step", ylim=(0, 100))
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    right.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def table_lines(results: dict) -> list[str]:
    """The skills as a markdown table: right answers in percent from the INT4 file, and with plain bfloat16 experts."""
    lines = ["| skill | bar | INT4 | bfloat16 experts |", "|---|---|---|---|"]
    for skill, score in results["int4"].items():
        bar = f"{BARS[skill]}" if skill in BARS else ""
        other = results.get("bfloat16", {}).get(skill)
        lines.append(f"| {skill} | {bar} | {score:.1f} | {'' if other is None else f'{other:.1f}'} |")
    return lines


def write_results(results: dict, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def write_card(results: dict, folder: Path) -> None:
    """`README.md` of the checkpoint."""
    run = results["run"]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    lines = [
        "# A small Kimi",
        "",
        f"A checkpoint of {size:.1f} MiB in the layout of Kimi-K2.6: latent attention, {run['experts']} routed experts as",
        f"INT4 words of which {run['experts_used']} answer each token, one shared expert, MoonViT-3D blocks, video clips of",
        "up to 4 frames, the same special tokens and chat template. It was trained from nothing by",
        "`python examples/train_tiny.py --out examples/kimi-k26-tiny` on pictures, videos and dialogues that the script",
        "draws and writes itself. It knows nothing of the world.",
        "",
        "```python",
        "from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor",
        "",
        'processor = KimiK26Processor.from_pretrained("examples/kimi-k26-tiny")',
        'model = KimiK26ForConditionalGeneration.from_pretrained("examples/kimi-k26-tiny", dtype="auto")',
        "```",
        "",
        "The folder holds no code. `kimi-k26 attach` on a copy of it makes the Auto classes load it too.",
        "",
        "## What it can do",
        "",
        f"Right answers in percent, greedy, {run['cases']} generated cases per skill that it was not trained on. Thinking is",
        "on except where the table says instant. The last column has the same weights with the experts not rounded to INT4.",
        "",
        *table_lines(results),
        "",
        "*Not kept* is the same dialogue without `preserve_thinking`: the hidden numbers are not in the prompt, and to name",
        "them would be chance.",
        "",
        f"Least used expert of any layer: {results['least_used_expert']:.2f} of its fair share of the tokens.",
        "",
        "## What it has seen",
        "",
        "- Pictures of 56 to 280 pixels a side, most under 140, with 1 to 5 figures: circle, square, triangle, star, cross in",
        "  red, orange, yellow, green, blue, purple, black. Larger pictures should be made smaller first.",
        "- Videos of 56 to 224 pixels a side, most under 84, of 1 to 8 seconds, with one or two figures.",
        "- Decimals with up to 3 digits before the point and up to 6 after it.",
        "- Tools with 1 to 3 flat parameters: strings, numbers, booleans, enums.",
        "- English and Chinese; tools and kept thinking in English only. Dialogues of two questions at most.",
        "",
        "## How it was made",
        "",
        *_run_lines(run),
        "",
        "Muon for the matrices inside the layers, Adam for the rest; float32 masters of bfloat16 weights; from the middle of",
        "the first run on the experts learn under INT4 rounding. Load is balanced by the correction bias.",
        "",
        *("![loss and accuracy of the first run](curve-before.png)" for _ in folder.glob("curve-before.png")),
        "![loss and accuracy](curve.png)",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _run_lines(run: dict) -> list[str]:
    """What each run did that the checkpoint went through, the first one first."""
    before = _run_lines(run["before"]) if run.get("before") else []
    what = "the last part alone, from the weights of the run above (`--from`)" if before else "from nothing"
    return [
        *before,
        f"- {run['steps']} steps of {run['rows']} dialogues, {what}:",
        f"  {run['core_minutes']:.0f} minutes of work for each of {run['workers']} cores, {run['minutes']:.0f} by the clock, seed {run['seed']}.",
    ]
