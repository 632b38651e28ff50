"""The GPU's kernels against loops over tokens."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kimi_k26
from kimi_k26 import triton_kimi_k26 as kernels
from kimi_k26.triton_kimi_k26 import Blocks, ExpertTable, grouped_experts

from .triton_models import DEVICE, error, loops, make_experts, needs_triton, route, rows, small_blocks, table_of, tensors_of  # noqa: F401: a fixture


pytestmark = needs_triton

SHAPES = {  # hidden size, width, values per scale
    "groups of 32": (160, 96, 32),
    "groups of 64": (192, 64, 64),
    "groups of 128": (256, 128, 128),
    "groups of 8": (72, 40, 8),
    "plain": (160, 96, None),
    "plain, odd widths": (61, 37, None),
}


# Not all with all: the interpreter takes its time, and float32 goes one way however few the tokens are.
CASES = [(tokens, torch.bfloat16, shape) for tokens in (3, 17) for shape in SHAPES]
CASES += [(tokens, torch.float32, shape) for tokens in (1, 17) for shape in ("groups of 32", "groups of 128", "plain")]
CASES += [(1, torch.bfloat16, "groups of 32"), (1, torch.bfloat16, "plain")]
CASES += [(200, torch.bfloat16, "plain"), (200, torch.float32, "groups of 32")]


@pytest.mark.parametrize(("tokens", "dtype", "shape"), CASES)
def test_against_loops(tokens, dtype, shape, small_blocks):
    hidden, width, group = SHAPES[shape]
    experts = make_experts(6, hidden, width, group, dtype)
    x, (weights, chosen) = rows(tokens, hidden, dtype), route(tokens, 6)
    got = grouped_experts(x, weights, chosen, table_of(experts))
    assert got.dtype == dtype
    assert error(got, loops(experts, x, weights, chosen)) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("group", [32, None])
def test_with_the_blocks_as_they_are(group):
    experts = make_experts(2, 64, 32, group, torch.bfloat16)
    x, (weights, chosen) = rows(1, 64, torch.bfloat16), route(1, 2, top_k=2)
    assert error(grouped_experts(x, weights, chosen, table_of(experts)), loops(experts, x, weights, chosen)) < 0.02


@pytest.mark.parametrize("blocks", [Blocks(16, 4), Blocks(32, 16)], ids=["whole blocks in a width", "wider than all"])
@pytest.mark.parametrize("tokens", [2, 20])
def test_any_blocks(blocks, tokens, monkeypatch):
    for way in (kernels.FEW, kernels.MANY):
        monkeypatch.setitem(way, True, (blocks, blocks))
    experts = make_experts(3, 64, 32)
    x, (weights, chosen) = rows(tokens, 64, torch.bfloat16), route(tokens, 3, top_k=2)
    assert error(grouped_experts(x, weights, chosen, table_of(experts)), loops(experts, x, weights, chosen)) < 0.02


def test_few_tokens_are_multiplied_without_rounding(small_blocks):
    """Up to the rounding of the format itself, which the reference here leaves out too."""
    experts = make_experts()
    for expert in experts:
        for projection in expert.children():  # scales that let value times scale fit into bfloat16
            projection.weight_scale.copy_(torch.exp2(projection.weight_scale.float().log2().round()))
    x, (weights, chosen) = rows(2, 160, torch.bfloat16), route(2, 6)
    got = grouped_experts(x, weights, chosen, table_of(experts), dtype=torch.float32)
    assert got.dtype == torch.float32 and error(got, loops(experts, x, weights, chosen)) < 1e-5


ROUTINGS = {
    "one expert takes all": torch.full((40, 1), 2),
    "two experts take all": torch.tensor([[5, 1]]).expand(40, 2),
    "all experts for each": torch.arange(6).expand(20, 6),
    "each for one": torch.arange(6).unsqueeze(1),
    "the last has one": torch.cat((torch.zeros(33, 1, dtype=torch.int64), torch.tensor([[5]]))),
}


@pytest.mark.parametrize("chosen", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_ragged_routing(chosen, small_blocks):
    dtype = torch.float32 if len(chosen) > kernels.FEW_TOKENS else torch.bfloat16
    experts = make_experts()
    x, weights = rows(len(chosen), 160, dtype), torch.rand(chosen.shape, device=DEVICE)
    chosen = chosen.to(DEVICE)  # some of them no contiguous tensors
    got = grouped_experts(x, weights, chosen, table_of(experts))
    assert error(got, loops(experts, x, weights, chosen)) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("tokens", [4, 30])
def test_absent_experts_add_nothing(tokens, group, small_blocks):
    experts = make_experts(group=group, dtype=torch.bfloat16)
    here, there = [None, *experts[1:3], None, None, experts[5]], [experts[0], None, None, *experts[3:5], None]
    x, (weights, chosen) = rows(tokens, 160, torch.bfloat16), route(tokens, 6)
    chosen[1] = torch.tensor([0, 3, 4])
    parts = [grouped_experts(x, weights, chosen, table_of(some), dtype=torch.float32) for some in (here, there)]
    assert not parts[0][1].any() and parts[1][1].all()
    for some, part in zip((here, there), parts):
        assert error(part, loops(some, x, weights, chosen)) < 0.02
    assert error(parts[0] + parts[1], loops(experts, x, weights, chosen)) < 0.02


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("where", ["odd places of one storage", "a mapped file"])
def test_weights_that_lie_anywhere(where, tokens, small_blocks, tmp_path):
    """Between other bytes, at multiples of their item size only, as in a file of tensors."""
    experts = make_experts()
    raw, places = bytearray(4), []
    for expert in experts:
        for tensor in tensors_of(expert):
            raw += bytes(-len(raw) % 4 + 4 if tensor.dtype == torch.int32 else 2)
            places.append(len(raw))
            raw += tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if where == "a mapped file":
        if DEVICE.type == "cuda":
            pytest.skip("a GPU does not read the pages of files")
        (tmp_path / "weights").write_bytes(raw)
        with open(tmp_path / "weights", "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        storage = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        storage = torch.frombuffer(raw, dtype=torch.uint8).to(DEVICE)
    moved, places = [], iter(places)
    for expert in experts:
        moved.append([])
        for tensor in tensors_of(expert):
            place = next(places)
            view = storage[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            assert torch.equal(view, tensor)
            moved[-1].append(view)
    table = ExpertTable(moved)
    assert not table.aligned and table_of(experts).aligned
    x, (weights, chosen) = rows(tokens, 160, torch.bfloat16), route(tokens, 6)
    expected = grouped_experts(x, weights, chosen, table_of(experts))
    assert torch.equal(grouped_experts(x, weights, chosen, table), expected)


def test_inputs_need_not_be_contiguous(small_blocks):
    experts = make_experts()
    x, (weights, chosen) = rows(20, 160, torch.bfloat16), route(20, 6)
    expected = grouped_experts(x, weights, chosen, table_of(experts))
    turned = [t.t().contiguous().t() for t in (x, weights, chosen)]
    assert torch.equal(grouped_experts(*turned, table_of(experts)), expected)


def test_many_tokens_go_in_portions(monkeypatch, small_blocks):
    experts = make_experts(3)
    x, (weights, chosen) = rows(20, 160, torch.float32), route(20, 3, top_k=2)
    whole = grouped_experts(x, weights, chosen, table_of(experts))
    monkeypatch.setattr(kernels, "TOKENS_AT_ONCE", 8)
    torch.testing.assert_close(grouped_experts(x, weights, chosen, table_of(experts)), whole)


def test_no_tokens():
    weights, chosen = route(0, 6)
    assert grouped_experts(rows(0, 160, torch.bfloat16), weights, chosen, table_of(make_experts())).shape == (0, 160)


@pytest.mark.parametrize("limit", [16, 64])
@pytest.mark.parametrize("chosen", [*ROUTINGS.values(), torch.randint(0, 6, (500, 3))], ids=[*ROUTINGS, "random"])
def test_the_schedule(chosen, limit):
    flat = chosen.flatten()
    (order, starts, tile_expert, tile_starts), tiles = kernels._schedule(flat, 6, limit)
    counts = flat.bincount(minlength=6).tolist()
    assert flat[order].tolist() == sorted(flat.tolist())
    expected = [number for number, count in enumerate(counts) for _ in range(-(-count // limit))]
    assert len(expected) <= tiles == len(tile_expert)
    assert tile_expert.tolist() == expected + [6] * (tiles - len(expected))
    seen = []
    for tile, number in enumerate(expected):
        first = int(starts[number]) + (tile - int(tile_starts[number])) * limit
        seen += order[first : min(first + limit, int(starts[number + 1]))].tolist()
    assert sorted(seen) == list(range(len(flat)))


def test_the_schedule_asks_the_device_for_nothing():
    """Tensors without values: what depended on them would raise."""
    with FakeTensorMode():
        schedule, tiles = kernels._schedule(torch.empty(96, dtype=torch.int64), 384, 16)
    shapes = [tuple(tensor.shape) for tensor in schedule]
    assert shapes == [(96,), (385,), (96,), (385,)] and tiles == 96


def test_a_graph_holds_the_whole(small_blocks):
    table = table_of(make_experts())

    def layer(x, weights, chosen):
        return grouped_experts(x * 2, weights, chosen, table, torch.float32) + 1

    x, (weights, chosen) = rows(2, 160, torch.bfloat16), route(2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weights, chosen), layer(x, weights, chosen))
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = kernels._grouped_experts(x, weights, chosen, table.addresses, 96, 32, True, torch.float32)
    assert out.shape == x.shape and out.dtype == torch.float32


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes a GPU")
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_cuda_graph_holds_the_whole(tokens):
    experts = make_experts()
    table, x, (weights, chosen) = table_of(experts), rows(tokens, 160, torch.bfloat16), route(tokens, 6)
    grouped_experts(x, weights, chosen, table)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_experts(x, weights, chosen, table)
    x.copy_(rows(tokens, 160, torch.bfloat16, seed=5))
    chosen.copy_(route(tokens, 6, seed=5)[1])
    graph.replay()
    assert error(out, loops(experts, x, weights, chosen)) < 0.02


def test_the_table_knows_its_tensors():
    experts = make_experts(2)
    table = table_of([experts[0], None, experts[1]])
    assert table.lists(0, tensors_of(experts[0])) and table.lists(1, None) and table.lists(2, tensors_of(experts[1]))
    assert not table.lists(0, tensors_of(experts[1])) and not table.lists(1, tensors_of(experts[1]))
    assert not table.lists(2, None)
    experts[0].down_proj.weight_packed.zero_()
    assert table.lists(0, tensors_of(experts[0]))
    experts[0].down_proj.weight_packed.data = experts[0].down_proj.weight_packed.clone()
    assert not table.lists(0, tensors_of(experts[0]))
    assert not table.addresses[1].any() and (table.addresses[[0, 2]] != 0).all()


def changed(experts, number, place, change):
    tensors = [tensors_of(expert) for expert in experts]
    tensors[number][place] = change(tensors[number][place])
    return tensors


REFUSED = {
    "dtype": (lambda t: t.long(), "has dtype torch.int64; torch.int32 is expected"),
    "shape": (lambda t: t[:-1].contiguous(), r"has shape \(159, 12\); \(160, 12\) is expected"),
    "strides": (lambda t: t.t().contiguous().t(), "is not contiguous"),
    "device": (lambda t: t.to("meta"), "is on meta; the first expert is on"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_cannot_be_read_are_named(change, words):
    with pytest.raises(ValueError, match="down_proj.weight_packed of expert 1 " + words):
        ExpertTable(changed(make_experts(2), 1, 4, change))


def test_lists_that_are_no_experts_are_refused():
    packed, plain = make_experts(1), make_experts(1, group=None)
    with pytest.raises(ValueError, match="there is no expert in the list"):
        ExpertTable([None, None])
    with pytest.raises(ValueError, match="expert 1 has 3 tensors; the first one has 6"):
        table_of(packed + plain)
    with pytest.raises(ValueError, match="groups of 12 values in widths of 24 and 24"):
        table_of(make_experts(1, 24, 24, 12))


def test_inputs_that_do_not_fit_are_refused():
    packed, plain = table_of(make_experts(2)), table_of(make_experts(2, group=None, dtype=torch.bfloat16))
    weights, chosen = route(2, 2, top_k=1)
    with pytest.raises(ValueError, match="x has width 159 on .*; the experts have 160 on"):
        grouped_experts(rows(2, 159, torch.bfloat16), weights, chosen, packed)
    with pytest.raises(ValueError, match="x has dtype torch.float64"):
        grouped_experts(rows(2, 160, torch.float64), weights, chosen, packed)
    with pytest.raises(ValueError, match="x has dtype torch.float32; the experts have torch.bfloat16"):
        grouped_experts(rows(2, 160, torch.float32), weights, chosen, plain)


def test_where_kernels_run():
    assert not kernels.has_kernels(torch.device("cpu"))
    assert kernels.has_kernels(DEVICE) == (DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0))


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kimi_k26 import triton_kimi_k26 as kernels
from kimi_k26.triton_kimi_k26 import Blocks

POINTERS = {"x": "*bf16", "table": "*i64", "chosen": "*i64", "factors": "*fp32", "total": "*bf16", "order": "*i64"}
POINTERS |= dict.fromkeys(("starts", "tile_expert", "tile_starts"), "*i64") | {"outs_of_pairs": "*bf16", "added": "*fp32"}
POINTERS |= {"weight": "*bf16", "logits": "*fp32", "bias": "*fp32", "spread": "*fp32", "arranged": "*bf16"}


def built(kernel, blocks=Blocks(0, 0), x="*bf16", hidden="*bf16", **constants):
    constants |= {"outputs": blocks.outputs, "stages": blocks.stages} | ({"block": blocks.inputs} if blocks.inputs else {})
    types = {name: (POINTERS | {"x": x, "hidden": hidden}).get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    code = compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(code.asm["cubin"]))
    return code.asm["ttgir"]


for group in (32, 0):
    step, words = (8, True) if group else (1, False)
    common = {"group": group, "kind": tl.uint32 if group else tl.bfloat16, "aligned": True, "top_k": 8, "experts": 384}
    up, down = {"steps": 7168 // step, "width": 2048}, {"steps": 2048 // step, "width": 7168}
    few = {"x": "*fp32" if group else "*bf16", "hidden": "*fp32"}
    built(kernels.gate_up_few, kernels.FEW[words][0], **few, **common, **up)
    built(kernels.down_few, kernels.FEW[words][1], **few, **common, **down)
    many = common | {"rows": 16, "multiplied": tl.bfloat16}
    for kernel, blocks, sizes in zip((kernels.gate_up_many, kernels.down_many), kernels.MANY[words], (up, down)):
        ir = built(kernel, blocks, **many, **sizes)
        assert "warp_group_dot" in ir, ir  # the matrix units multiply
built(kernels.add_choices, width=7168, top_k=8, block=kernels.SUM_BLOCK)
built(kernels.spread_inputs, steps=896, block=kernels.SPREAD_BLOCK)
built(kernels.arrange_inputs, steps=896, padded=7168, block=kernels.SUM_BLOCK)
built(kernels.router_logits, experts=384, size=7168, block=kernels.LOGITS_BLOCK)
rule = {"experts": 384, "top_k": 8, "normalize": True, "scaling": 2.5, "padded": 512, "slots": 8}
built(kernels.choose_experts, Blocks(0, 0, warps=1), **rule)
"""


def test_they_compile_for_a_gpu_at_the_published_sizes(tmp_path):
    root = str(Path(kimi_k26.__file__).resolve().parent.parent)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, *sys.path)))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 13
