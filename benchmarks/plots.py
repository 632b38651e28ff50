"""The pictures of the README, drawn from what the benchmarks measured."""

from pathlib import Path

from report import NAMES


COLOURS = {"kimi_k26": "#0072b2", "llama.cpp-flash": "#d55e00", "llama.cpp": "#e69f00", "transformers": "#7f7f7f"}


def draw_text(results: dict, path: Path):
    """Decode and prefill against context, and memory, side by side: `results` is what `text.run` gives back."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    decode, prefill, memory = figure.subplots(1, 3)
    titles = {"decode": "a decode step, ms", "prefill": "prefill, tokens per second"}
    for axes, (what, title) in zip((decode, prefill), titles.items()):
        for engine in results["engines"]:
            rows = [row for row in results["rows"] if (row["what"], row["engine"], row["batch"]) == (what, engine, 1)]
            rows.sort(key=lambda row: row["context"])
            contexts = [row["context"] for row in rows]
            values = [row["median"] * 1e3 if what == "decode" else row["context"] / row["median"] for row in rows]
            axes.plot(contexts, values, "o-", color=COLOURS[engine], label=NAMES[engine], linewidth=2, markersize=4)
        all_contexts = sorted({row["context"] for row in results["rows"] if row["batch"] == 1})
        axes.set(xscale="log", yscale="log", title=title, xlabel="tokens of context")
        axes.set_xticks(all_contexts, [f"{context:,}" for context in all_contexts], rotation=30)
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=6)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    decode.legend(fontsize=8)
    budgets = ["" if row["budget"] is None else ",\na quarter of the experts" for row in results["memory"]]
    labels = [NAMES[row["engine"]] + budget for row, budget in zip(results["memory"], budgets)]
    sizes = [row["bytes"] / 2**20 for row in results["memory"]]
    bars = memory.barh(labels, sizes, color=[COLOURS[row["engine"]] for row in results["memory"]])
    memory.bar_label(bars, fmt="{:,.0f}", padding=3)
    memory.axvline(results["weights"] / 2**20, color="black", linestyle=":", linewidth=1)
    memory.invert_yaxis()
    memory.margins(x=0.15)
    memory.set(title="peak memory, MiB", xlabel="loading and 50 tokens (dotted: weights)")
    figure.savefig(path)


def draw_bars(rows: list[dict], path: Path):
    """A panel for each `what`, a bar for each of its engines, dotted the limit: rows with `what`, `engine`, `label`, `median`
    and `limit`, in seconds, or in bytes where `unit` is "MiB"."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(4.6 * len(panels), 2.4), dpi=100, layout="constrained")
    for axes, what in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        some = [row for row in rows if row["what"] == what]
        unit = some[0].get("unit", "ms")
        scale = 1e3 if unit == "ms" else 2**-20
        colours = [COLOURS.get(row["engine"], "#7f7f7f") for row in some]
        bars = axes.barh([row["label"] for row in some], [row["median"] * scale for row in some], color=colours)
        axes.bar_label(bars, fmt="{:,.4g}", padding=3)
        if some[0].get("limit"):
            axes.axvline(some[0]["limit"] * scale, color="black", linestyle=":", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(f"{what}, {unit}", fontsize=9)
    figure.savefig(path)
