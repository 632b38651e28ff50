"""What text.py measured, in words: a Markdown table with ratios, and what follows from it."""

OURS = "kimi_k26"
NAMES = {
    OURS: "this project",
    "llama.cpp-flash": "llama.cpp, flash attention",
    "llama.cpp": "llama.cpp",
    "transformers": "transformers",
}


def report(results: dict) -> str:
    """All there is to say about what `text.run` gave back."""
    return "\n".join([*machine(results), *table(results), "", *summary(results), *profile(results)])


def machine(results: dict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    load = f"load {results['load_before']:.1f} before and {results['load_after']:.1f} after"
    lines = [f"{results['processor']}, {results['device']}, {results['threads']} threads, {load}; {versions}"]
    if results["load_before"] > 0.5:
        lines.append("NOTE: other work was running here before this began; times taken beside it mean little")
    if "machine" in results:
        speeds = results["machine"]
        gigabytes, gigaflops = speeds["bandwidth"] / 1e9, speeds["flops"] / 1e9
        lines.append(f"{gigabytes:.1f} GB/s read from memory, {gigaflops:.0f} GFLOP/s in products of matrices")
    return lines


def beside(value: float, ours: float | None, unit: str) -> str:
    """A peer's figure, and how many times ours it is."""
    return f"{value:.4g} {unit}" + (f" ({value / ours:.2f} ×)" if ours else "")


def table(results: dict) -> list[str]:
    """Medians; in brackets, how many times this project's time or memory that is."""
    engines = results["engines"]
    lines = [f"| | {' | '.join(NAMES[name] for name in engines)} | limit |", "|---" * (len(engines) + 2) + "|"]
    measured: dict = {}
    for row in results["rows"]:
        measured.setdefault((row["batch"], row["what"], row["context"]), {})[row["engine"]] = row
    for (batch, what, context), rows in sorted(measured.items()):
        if what == "prefill" and batch > 1:
            continue
        times = {name: row["median"] * 1e3 for name, row in rows.items()}
        ours = times.get(OURS)
        cells = [beside(times[n], None if n == OURS else ours, "ms") if n in times else "" for n in engines]
        limit = next(iter(rows.values()))["limit"]
        label = f"{what}, {context:,} tokens" + (f", {batch} rows" if batch > 1 else "")
        lines.append(f"| {label} | {' | '.join(cells)} | {limit * 1e3:.3g} ms |")
    whole = {row["engine"]: row for row in results["memory"] if row["budget"] is None}
    ours = whole[OURS]["bytes"] / 2**20 if OURS in whole else None
    cells = [beside(whole[n]["bytes"] / 2**20, None if n == OURS else ours, "MiB") for n in engines]
    lines.append(f"| memory, loading and 50 tokens | {' | '.join(cells)} | {results['weights'] / 2**20:.0f} MiB |")
    for row in results["memory"]:
        if row["budget"] is not None:
            same = "the same tokens" if row["tokens"] == whole[OURS]["tokens"] else "OTHER tokens"
            cells = [f"{row['bytes'] / 2**20:.4g} MiB, {same}" if name == OURS else "" for name in engines]
            lines.append(f"| with a quarter of the experts, {row['budget'] / 2**20:.0f} MiB | {' | '.join(cells)} | |")
    return lines


def summary(results: dict) -> list[str]:
    """Batches, growth, and how far apart the answers are."""
    decodes = [row for row in results["rows"] if row["what"] == "decode"]
    single = {(row["engine"], row["context"]): row for row in decodes if row["batch"] == 1}
    lines = []
    for row in decodes:
        name, context, batch = row["engine"], row["context"], row["batch"]
        if batch > 1:
            rate = f"{batch * single[name, context]['median'] / row['median']:.2f} × the tokens per second of one"
            lines.append(f"{NAMES[name]}: {batch} rows, {rate}, at {context:,} tokens")
    for name in results["engines"][1:]:
        far = [row["apart"] for row in decodes if row["engine"] == name]
        first = NAMES[results["engines"][0]]
        lines.append(f"{NAMES[name]}: logits after the prompts {min(far):.3f} to {max(far):.3f} from those of {first}")
    ours = sorted((context, row) for (name, context), row in single.items() if name == OURS)
    if len(ours) > 1:
        (few, short), (many, long) = ours[0], ours[-1]
        grown, least = long["median"] - short["median"], long["limit"] - short["limit"]
        times = f"{grown * 1e3:.2f} ms, {grown / least:.1f} × reading the cache"
        lines.append(f"{NAMES[OURS]}: growth of decode from {few:,} to {many:,} tokens {times}")
    return lines


def profile(results: dict) -> list[str]:
    """Where this project's time goes."""
    lines = []
    for context, found in results.get("profile", {}).items():
        for what, times in found.items():
            lines.append(f"{what} at {context} tokens, {times['all']:.2f} ms under the profiler")
            parts = ((name, taken) for name, taken in times.items() if name != "all")
            lines += [f"  {taken:10.3f} ms {taken / times['all']:6.1%}  {name}" for name, taken in parts]
    return lines
