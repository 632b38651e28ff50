"""One layer of experts on a GPU, at the published widths, beside the time that reading its weights takes.

    python benchmarks/gpu_experts.py                    # INT4 words; 1 to 2048 tokens
    python benchmarks/gpu_experts.py --plain            # the experts of a bfloat16 checkpoint (32 GiB)
    python benchmarks/gpu_experts.py --blocks           # what other block sizes of the kernels would give
    python benchmarks/gpu_experts.py --json results.json

Weights and tokens are random, so that nearly every token has experts of its own. A layer is router, eight of 384
experts, and the shared expert. Its limit is the bytes of the weights that it must read, each once, over the bandwidth
of the GPU's memory. The bar is 60 % of that for one token, replayed as a CUDA graph. Exits with status 1 below it, or
where kernels and reference differ by more than 2 %.
"""

import argparse
import json
import statistics
import sys

import torch

from kimi_k26 import KimiK26Config
from kimi_k26 import triton_kimi_k26 as kernels
from kimi_k26.experts_kimi_k26 import KimiK26MoE


BAR = 0.6
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT4 = {"format": "pack-quantized", "quant_method": "compressed-tensors", "ignore": ["re:.*shared_experts.*"]}
INT4 |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}
# Blocks to try for gate and up, and for down: outputs, words or weights, warps, stages; by the blocks they stand for and by
# whether weights are words.
FEW_WORDS = [(8, 128, 1, 1), (8, 128, 1, 2), (8, 128, 1, 3), (8, 256, 2, 1), (16, 128, 2, 1)]
FEW_DOWN = [(4, 256, 2, 1), (4, 128, 1, 1), (4, 256, 2, 3), (8, 256, 2, 1), (8, 256, 2, 3), (8, 512, 4, 1)]
FEW_PLAIN = [(o, i, w, 1) for o in (2, 4) for i, w in ((256, 1), (1024, 4), (2048, 8))]
MANY_WORDS = [(64, 16, 4, s) for s in (3, 4, 5)] + [(64, 32, 4, 3), (128, 16, 4, 3), (128, 16, 8, 3)]
FULL_WORDS = [(64, 16, 4, 3), (64, 16, 4, 4), (128, 16, 8, 3), (128, 16, 8, 4), (128, 32, 8, 2)]
MANY_PLAIN = [(o, i, w, s) for o in (64, 128) for i, w in ((64, 4), (128, 8)) for s in (2, 3, 4)]
OTHERS = {
    ("FEW", True): (FEW_WORDS, FEW_DOWN),
    ("FEW", False): (FEW_PLAIN, FEW_PLAIN),
    ("MANY", True): (MANY_WORDS, MANY_WORDS),
    ("MANY", False): (MANY_PLAIN, MANY_PLAIN),
    ("FULL", True): (FULL_WORDS, FULL_WORDS),
    ("FULL", False): (MANY_PLAIN, MANY_PLAIN),
}
TOKENS = {"FEW": 1, "MANY": 32, "FULL": 2048}


def build(plain: bool) -> KimiK26MoE:
    """One layer of the published sizes in bfloat16, with random words or weights, on the GPU."""
    config = KimiK26Config(text_config={} if plain else {"quantization_config": INT4}).text_config
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        layer = KimiK26MoE(config)
    torch.set_default_dtype(torch.float32)
    layer.to_empty(device="cuda").requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name.endswith("weight_packed"):
            parameter.random_(-(2**31), 2**31)
        elif name.endswith("weight_scale"):  # as of weights with a deviation of 1 / sqrt(inputs)
            parameter.uniform_(0.5, 1.5).mul_(0.2 * (parameter.shape[1] * config.int4_group_size) ** -0.5)
        elif name.endswith("correction_bias"):
            parameter.zero_()
        elif name.endswith("weight"):
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return layer


def bandwidth() -> float:
    """Bytes per second of the GPU's memory: by its own figures where it gives them, else as a copy reaches."""
    properties = torch.cuda.get_device_properties(0)
    rate, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if rate and width:
        return rate * 1e3 * 2 * width / 8
    block = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    there = torch.empty_like(block)
    return 2 * block.nbytes / seconds(lambda: there.copy_(block))


def seconds(work, before=None, times: int = 50) -> float:
    """The median of `times` runs, timed by the GPU."""
    taken = []
    for _ in range(times + 5):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        taken.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in taken[5:]) / 1e3


def graph_of(work):
    """`work` as a CUDA graph."""
    work()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def bytes_read(layer: KimiK26MoE, chosen: torch.Tensor) -> int:
    """Of the router, the shared expert, and the experts that were chosen."""
    parts = [layer.gate, layer.shared_experts, *(layer.experts[number] for number in chosen.unique().tolist())]
    return sum(p.nbytes for part in parts for p in part.parameters())


def difference(layer: KimiK26MoE) -> float:
    """Between kernels and reference, relative, for few and for many tokens; the largest."""
    worst = 0.0
    for tokens in (2, 2 * kernels.FEW_TOKENS, TOKENS["FULL"]):
        x = torch.randn(tokens, layer.gate.weight.shape[1], device="cuda", dtype=torch.bfloat16)
        _, weights, chosen = layer.gate(x)
        got = layer.experts(x, weights, chosen)[:16].float()
        expected = torch.zeros_like(got)
        for token, row in enumerate(x[:16]):
            for weight, number in zip(weights[token], chosen[token].tolist()):
                expected[token] += weight * layer.experts[number](row[None])[0].float()
        worst = max(worst, float((got - expected).norm() / expected.norm()))
    return worst


@torch.no_grad()
def measure(layer: KimiK26MoE, tokens: int, speed: float) -> dict:
    """A layer on so many tokens, other ones each time."""
    x = torch.empty(1, tokens, layer.gate.weight.shape[1], device="cuda", dtype=torch.bfloat16).normal_()
    limit = statistics.median(bytes_read(layer, layer.gate(x[0].normal_())[2]) for _ in range(5)) / speed
    graph = graph_of(lambda: layer(x))
    taken = {"graph": seconds(graph.replay, x.normal_), "eager": seconds(lambda: layer(x), x.normal_)}
    return {"tokens": tokens, "limit": limit, "share": limit / taken["graph"], **taken}


@torch.no_grad()
def try_blocks(layer: KimiK26MoE, way: str, packed: bool):
    """The two products alone, with other blocks for one of them."""
    x = torch.randn(TOKENS[way], layer.gate.weight.shape[1], device="cuda", dtype=torch.bfloat16)
    table, total = layer.experts.table(range(len(layer.experts)), x.device, True), torch.empty_like(x)
    _, weights, chosen = layer.gate(x)
    run = kernels._run_few if way == "FEW" else kernels._run_many
    sizes = (table.addresses, table.width, table.group_size, table.aligned)
    usual = getattr(kernels, way)[packed]
    for place, name in enumerate(("gate and up", "down")):
        found = []
        for other in OTHERS[way, packed][place]:
            blocks = list(usual)
            blocks[place] = kernels.Blocks(*other)

            def work(blocks=blocks):
                run(x, weights, chosen, None, total, *sizes, blocks)

            try:
                taken = seconds(graph_of(work).replay, lambda: chosen.copy_(layer.gate(x.normal_())[2]), 20)
                found.append((taken, blocks[place]))
            except Exception as error:  # more registers or shared memory than there are
                print(f"{blocks[place]}: {type(error).__name__}")
        for taken, blocks in sorted(found, key=lambda one: one[0]):
            usually = "  as it is" if blocks == usual[place] else ""
            print(f"{way} {len(x):5} tokens {taken * 1e6:8.0f} µs  {name}: {blocks}{usually}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 256, 2048])
    parser.add_argument("--plain", action="store_true", help="plain bfloat16 weights instead of INT4 words")
    parser.add_argument("--blocks", action="store_true", help="also try other block sizes")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that PyTorch sees: this measures kernels on one")
    if not kernels.has_kernels(torch.device("cuda", 0)):
        sys.exit("the kernels take triton and a GPU with bfloat16 matrix units (compute capability 8.0 or more)")
    layer, speed = build(args.plain), bandwidth()
    with torch.no_grad():
        apart = difference(layer)
    print(f"{torch.cuda.get_device_name()}, {speed / 1e12:.2f} TB/s; kernels and reference differ by {apart:.2%}")
    print("tokens   limit µs   graph µs   eager µs   share of the limit's speed")
    results = []
    for tokens in args.tokens:
        row = measure(layer, tokens, speed)
        results.append(row)
        times = "".join(f"{row[key] * 1e6:11.0f}" for key in ("limit", "graph", "eager"))
        print(f"{tokens:6}{times}{row['share']:11.0%}")
    if args.json:
        with open(args.json, "w") as file:
            named = {"device": torch.cuda.get_device_name(), "bandwidth": speed, "plain": args.plain}
            json.dump(named | {"difference": apart, "results": results}, file, indent=2)
    if args.blocks:
        for way in TOKENS:
            try_blocks(layer, way, not args.plain)
    one = [row["share"] for row in results if row["tokens"] == 1]
    return int(apart > 0.02 or any(share < BAR for share in one))


if __name__ == "__main__":
    raise SystemExit(main())
