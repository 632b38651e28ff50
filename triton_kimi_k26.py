"""Router and experts on a GPU: a kernel per projection for all experts of a layer, on the checkpoint's tensors as they lie.

A table of addresses tells the kernels where the words and scales (or the plain weights) of each expert are, so nothing
is repacked, copied or stacked. How many rows an expert gets is known on the device only: nothing here waits for it, and
shapes depend on the number of tokens alone, so that CUDA graphs and `torch.compile` hold the whole.

The kernels are in `triton_kernels_kimi_k26`. The reference is [`KimiK26MLP`], expert by expert.
"""

import re
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .quantization_kimi_k26 import VALUES_PER_WORD
from .triton_kernels_kimi_k26 import (
    add_choices,
    arrange_inputs,
    choose_experts,
    down_few,
    down_many,
    gate_up_few,
    gate_up_many,
    router_logits,
    spread_inputs,
    tl,
    triton,
)


class Blocks(NamedTuple):
    """What one program works on: outputs, and words (or plain weights) of each at a time.

    Of words and few tokens, outputs are a multiple of 8 for gate and up. With `stages` above 1, so many less one are read ahead.
    """

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 3


# By whether weights are words: of gate and up, and of down. A warp has 16 bytes a thread of each output at once.
FEW = {
    True: (Blocks(8, 128, warps=1, stages=3), Blocks(4, 256, warps=2, stages=1)),
    False: (Blocks(4, 1024, stages=1), Blocks(4, 1024, stages=1)),
}
MANY = {True: (Blocks(64, 32),) * 2, False: (Blocks(64, 64),) * 2}
FULL = {True: (Blocks(128, 16, warps=8),) * 2, False: (Blocks(64, 64),) * 2}  # where tiles have the most rows
FEW_TOKENS = 8  # up to so many, two pairs seldom share an expert
LEAST_ROWS, MOST_ROWS = 16, 64  # of a tile
TOKENS_AT_ONCE = 8192  # bounds what is kept between the steps
SUM_BLOCK = 1024
SPREAD_BLOCK = 64  # words
LOGITS_BLOCK = 2048
DTYPES = (torch.bfloat16, torch.float32)


class ExpertTable:
    """Where the weights of a layer's experts lie on one device.

    The table holds on to the tensors, so their memory stays theirs, and what is written into them is seen.

    Args:
        experts (`Iterable`): for each expert, in the order of their numbers, the tensors of gate, up and down: words
            and scales of each (six tensors) or plain weights (three). `None` for an expert that is to add nothing.

    Attributes:
        addresses (`torch.Tensor` of shape `(experts, 3, 2)`, int64): of words (or plain weights) and scales of each
            projection; 0 where there is none.
        device, dtype: of the weights; `torch.int32` for words.
        hidden_size, width (`int`): of the experts.
        group_size (`int`): inputs per scale; 0 for plain weights.
        aligned (`bool`): whether every tensor begins at a multiple of 16 bytes.

    Raises:
        ValueError: naming the expert and its tensor that the kernels cannot read.
    """

    def __init__(self, experts):
        # Not the parameters themselves, which can be given other memory.
        self._tensors = [tuple(tensor.detach() for tensor in tensors or ()) for tensors in experts]
        first = next((tensors for tensors in self._tensors if tensors), None)
        if first is None:
            raise ValueError("there is no expert in the list")
        self.device, self.dtype, self.width = first[0].device, first[0].dtype, len(first[0])
        packed = len(first) == 6
        self.hidden_size = len(first[-2 if packed else -1])
        self.group_size = self.hidden_size // first[1].shape[1] if packed else 0
        group = self.group_size
        if group and (group % VALUES_PER_WORD or self.hidden_size % group or self.width % group):
            sizes = f"groups of {group} values in widths of {self.hidden_size} and {self.width}"
            raise ValueError(f"{sizes}: the widths must be multiples of the group, and that one of {VALUES_PER_WORD}")
        expected = list(self._expected())
        for number, tensors in enumerate(self._tensors):
            if tensors and len(tensors) != len(expected):
                raise ValueError(f"expert {number} has {len(tensors)} tensors; the first one has {len(expected)}")
            for tensor, (name, *properties) in zip(tensors, expected):
                problem = _problem(tensor, *properties)
                if problem:
                    raise ValueError(f"{name} of expert {number} {problem}")
        self._addresses = [_addresses(tensors) for tensors in self._tensors]
        self.aligned = not any(address % 16 for each in self._addresses for address in each)
        table = torch.tensor([each or [0] * len(expected) for each in self._addresses]).unflatten(1, (3, -1))
        self.addresses = F.pad(table, (0, 2 - table.shape[2])).to(self.device, non_blocking=True)

    def _expected(self):
        """Name, shape, dtype and device of each tensor of an expert."""
        outputs_and_inputs = ((self.width, self.hidden_size),) * 2 + ((self.hidden_size, self.width),)
        for part, (outputs, inputs) in zip(("gate", "up", "down"), outputs_and_inputs):
            if self.group_size:
                yield f"{part}_proj.weight_packed", (outputs, inputs // VALUES_PER_WORD), torch.int32, self.device
                yield f"{part}_proj.weight_scale", (outputs, inputs // self.group_size), torch.bfloat16, self.device
            else:
                yield f"{part}_proj.weight", (outputs, inputs), self.dtype, self.device

    def lists(self, number: int, tensors) -> bool:
        """Whether these still are the tensors of an expert: their memory, not what is in it."""
        return _addresses(tensors) == self._addresses[number]

    def serves(self, x: torch.Tensor) -> bool:
        """Whether `x` is better given to the kernels: in bfloat16, and without gradients, which they do not have."""
        own = self.group_size or self.dtype == x.dtype
        return bool(own) and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def _addresses(tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors or ()]


def _problem(tensor: torch.Tensor, shape, dtype, device) -> str | None:
    """What hinders the kernels in reading a tensor."""
    if tensor.dtype != dtype:
        return f"has dtype {tensor.dtype}; {dtype} is expected"
    if tuple(tensor.shape) != shape:
        return f"has shape {tuple(tensor.shape)}; {shape} is expected"
    if tensor.device != device:
        return f"is on {tensor.device}; the first expert is on {device}"
    if not tensor.is_contiguous():
        return "is not contiguous"
    if not tensor.data_ptr() or tensor.data_ptr() % tensor.element_size():
        return f"lies at address {tensor.data_ptr()}, where no {dtype} can"
    return None


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU that computes in bfloat16, with triton installed."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def table_for(device: torch.device, experts) -> ExpertTable | None:
    """The table of experts on a device; `None` where kernels do not run there or cannot read them."""
    if not has_kernels(device):
        return None
    try:
        return ExpertTable(experts)
    except ValueError:
        return None


def grouped_experts(
    x, weights, chosen, table: ExpertTable, dtype: torch.dtype | None = None, added: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted sum of each token's experts, as far as they are in the table. Has no gradient.

    For few tokens, unless they are float32, value times scale is not rounded; else it is, to bfloat16, as the format
    says, and multiplied in the dtype of `x`.

    Args:
        x (`torch.Tensor` of shape `(tokens, hidden_size)`): bfloat16 or float32; as plain weights are. For few
            tokens, what is beyond 2**47 becomes infinite.
        weights (`torch.Tensor` of shape `(tokens, top_k)`, float32), chosen (same shape, int64).
        table ([`ExpertTable`]): of the device that `x` is on.
        dtype (`torch.dtype`, *optional*): of the result, that of `x` by default. The sum is float32 before.
        added (`torch.Tensor`, *optional*): of the shape of `x`; is part of the sum.

    Returns:
        `torch.Tensor` of shape `(tokens, hidden_size)`.

    Raises:
        ValueError: `x` is of another width, device or dtype than the experts take.
    """
    if x.device != table.device or x.shape[-1] != table.hidden_size:
        theirs = f"{table.hidden_size} on {table.device}"
        raise ValueError(f"x has width {x.shape[-1]} on {x.device}; the experts have {theirs}")
    if x.dtype not in DTYPES or not table.group_size and x.dtype != table.dtype:
        raise ValueError(f"x has dtype {x.dtype}; the experts have {table.dtype}")
    sizes = (table.width, table.group_size, table.aligned)
    run = _grouped_experts if torch.compiler.is_dynamo_compiling() else _run  # what a graph needs takes its time
    return run(x, weights, chosen, table.addresses, *sizes, dtype or x.dtype, added)


def _run(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    addresses: torch.Tensor,
    width: int,
    group_size: int,
    aligned: bool,
    dtype: torch.dtype,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
    total = torch.empty_like(x, dtype=dtype)
    tensors = (x, weights, chosen, None if added is None else added.contiguous(), total)
    few = len(x) <= FEW_TOKENS and x.dtype != torch.float32  # exact for float32: as the format rounds
    run = _run_few if few else _run_many
    with _on(x.device):
        for part in range(0, len(x), TOKENS_AT_ONCE):
            some = tensors
            if len(x) > TOKENS_AT_ONCE:
                some = [None if tensor is None else tensor[part : part + TOKENS_AT_ONCE] for tensor in tensors]
            run(*some, addresses, width, group_size, aligned)
    return total


# A namespace of this copy of the module's own: remote code and the package may be loaded side by side.
NAMESPACE = re.sub(r"\W", "_", __name__)
_grouped_experts = torch.library.custom_op(f"{NAMESPACE}::grouped_experts", _run, mutates_args=())


@_grouped_experts.register_fake
def _(x, weights, chosen, addresses, width, group_size, aligned, dtype, added=None):
    return x.new_empty(x.shape, dtype=dtype)


def _on(device: torch.device):
    """Kernels are launched on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def picks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether `picked_experts` takes these: few tokens and a router's weight in bfloat16, without gradients."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and len(x) <= FEW_TOKENS
        and not torch.is_grad_enabled()
        and x.device == weight.device == bias.device
        and bias.dtype == torch.float32
        and weight.is_contiguous()
        and bias.is_contiguous()
    )


def picked_experts(x, weight, bias, top_k: int, normalize: bool, scaling: float):
    """What [`KimiK26Router.forward`] gives, in two kernels; for one group of experts. Has no gradient.

    Args:
        x (`torch.Tensor` of shape `(tokens, hidden_size)`, bfloat16).
        weight (`torch.Tensor` of shape `(experts, hidden_size)`, bfloat16), bias (`(experts,)`, float32).
        top_k, normalize, scaling: as the router has them.

    Returns:
        logits `(tokens, experts)` float32, weights `(tokens, top_k)` float32, chosen `(tokens, top_k)` int64.
    """
    run = _picked_experts if torch.compiler.is_dynamo_compiling() else _pick
    return run(x, weight, bias, top_k, normalize, scaling)


def _pick(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, size), experts, x = x.shape, len(weight), x.contiguous()
    logits, factors, chosen = _picked(x, weight, top_k)
    if tokens:
        with _on(x.device):
            router_logits[experts, tokens](x, weight, logits, experts=experts, size=size, block=LOGITS_BLOCK)
            constants = {"experts": experts, "top_k": top_k, "normalize": normalize, "scaling": scaling}
            padded = {"padded": triton.next_power_of_2(experts), "slots": triton.next_power_of_2(top_k)}
            choose_experts[tokens,](logits, bias, factors, chosen, **constants, **padded, num_warps=1)
    return logits, factors, chosen


def _picked(x, weight, top_k):
    """Room for what `picked_experts` gives."""
    tokens, kinds = len(x), {"dtype": torch.float32, "device": x.device}
    logits, factors = torch.empty(tokens, len(weight), **kinds), torch.empty(tokens, top_k, **kinds)
    return logits, factors, torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)


_picked_experts = torch.library.custom_op(f"{NAMESPACE}::picked_experts", _pick, mutates_args=())


@_picked_experts.register_fake
def _(x, weight, bias, top_k, normalize, scaling):
    return _picked(x, weight, top_k)


def _kind(dtype: torch.dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def _settings(x, group_size, aligned, blocks: Blocks) -> dict:
    """What all kernels of the experts are told."""
    run = group_size // VALUES_PER_WORD & -(group_size // VALUES_PER_WORD)
    tuning = {"outputs": blocks.outputs, "block": max(blocks.inputs, run, 4), "num_warps": blocks.warps, "num_stages": blocks.stages}
    return {"group": group_size, "kind": tl.uint32 if group_size else _kind(x.dtype), "aligned": aligned, **tuning}


def _run_few(x, weights, chosen, added, total, addresses, width, group_size, aligned, blocks: tuple | None = None):
    """Each pair for itself; fills `total`. Inside of experts with words, inputs lie as `spread_inputs` puts them."""
    (tokens, size), top_k, per_step = x.shape, chosen.shape[1], VALUES_PER_WORD if group_size else 1
    first, second = (_settings(x, group_size, aligned, each) for each in blocks or FEW[group_size > 0])
    rows = (9, width // VALUES_PER_WORD) if group_size else (width,)
    hidden = x.new_empty(tokens * top_k, *rows, dtype=torch.float32)
    if group_size:
        steps = size // VALUES_PER_WORD
        given, x = x, x.new_empty(tokens, 9, steps, dtype=torch.float32)
        spread_inputs[triton.cdiv(steps, SPREAD_BLOCK), tokens](given, x, steps=steps, block=SPREAD_BLOCK)
    grid = (triton.cdiv(width, first["outputs"]), tokens * top_k)
    sizes = {"top_k": top_k, "steps": size // per_step, "width": width}
    gate_up_few[grid](x, addresses, chosen, weights, hidden, **sizes, **first, stages=first["num_stages"])
    grid = (triton.cdiv(size, second["outputs"]), tokens)
    sizes = {"top_k": top_k, "steps": width // per_step, "width": size}
    down_few[grid](hidden, addresses, chosen, added, total, **sizes, **second, stages=second["num_stages"])


def _run_many(x, weights, chosen, added, total, addresses, width, group_size, aligned, blocks: tuple | None = None):
    """Pairs sorted by expert, in tiles; fills `total`. Inputs of experts with words lie as `arrange_inputs` puts them."""
    (tokens, size), (experts, top_k), pairs = x.shape, (len(addresses), chosen.shape[1]), chosen.numel()
    per_step = VALUES_PER_WORD if group_size else 1
    rows = min(max(triton.next_power_of_2(triton.cdiv(pairs, experts)), LEAST_ROWS), MOST_ROWS)
    schedule, tiles = _schedule(chosen.flatten(), experts, rows)
    # On a CPU this is Triton's interpreter, which has no product of bfloat16.
    multiplied = _kind(torch.float32 if x.device.type == "cpu" else x.dtype)
    every = {"experts": experts, "rows": rows, "multiplied": multiplied}
    blocks = blocks or (FULL if rows == MOST_ROWS else MANY)[group_size > 0]
    first, second = (every | _settings(x, group_size, aligned, each) for each in blocks)
    hidden, outs = x.new_empty(pairs, _arranged(width, group_size)), x.new_empty(pairs, size)
    if group_size:
        row = _arranged(size, group_size)
        given, x = x, x.new_empty(tokens, row)
        grid = (triton.cdiv(row, SUM_BLOCK), tokens)
        arrange_inputs[grid](given, x, steps=size // VALUES_PER_WORD, padded=row, block=SUM_BLOCK)
    grid = (triton.cdiv(width, first["outputs"]), tiles)
    sizes = {"steps": size // per_step, "width": width}
    gate_up_many[grid](x, addresses, *schedule, hidden, top_k=top_k, **sizes, **first)
    grid = (triton.cdiv(size, second["outputs"]), tiles)
    sizes = {"steps": width // per_step, "width": size}
    down_many[grid](hidden, addresses, *schedule, outs, **sizes, **second)
    grid = (triton.cdiv(size, SUM_BLOCK), tokens)
    add_choices[grid](outs, addresses, chosen, weights, added, total, top_k=top_k, width=size, block=SUM_BLOCK)


def _arranged(width: int, group_size: int) -> int:
    """The length of a row of inputs: with words, which go by four, arranged."""
    return -(-width // (4 * VALUES_PER_WORD)) * 4 * VALUES_PER_WORD if group_size else width


def _schedule(chosen: torch.Tensor, experts: int, rows: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """Cut the pairs into tiles of one expert each, without asking the device how many there are.

    Args:
        chosen (`torch.Tensor` of shape `(pairs,)`, int64): the expert of each.
        experts, rows (`int`): how many experts there are; the pairs of a tile, at most.

    Returns:
        order `(pairs,)`: the pairs, sorted by expert; starts `(experts + 1,)`: where in it each expert begins;
        tile_expert `(tiles,)`: whose each tile is, `experts` for those too many; tile_starts `(experts + 1,)`: the
        first tile of each expert. And the largest number of tiles there can be.
    """
    some = min(len(chosen), experts)  # each has a tile with one pair in it at least
    tiles = some + (len(chosen) - some) // rows
    by_expert, order = chosen.sort(stable=True)
    starts = torch.searchsorted(by_expert, torch.arange(experts + 1, device=chosen.device))
    tile_starts = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + rows - 1) // rows, 0, out=tile_starts[1:])
    tile_expert = torch.searchsorted(tile_starts[1:], torch.arange(tiles, device=chosen.device), right=True)
    return (order, starts, tile_expert, tile_starts), tiles
