"""Routed experts on a GPU: a kernel per projection for all experts of a layer, on the checkpoint's tensors as they lie.

A table of addresses tells the kernels where the words and scales (or the plain weights) of each expert are, so nothing
is repacked, copied or stacked. How many rows an expert gets is known on the device only: nothing here waits for it, and
shapes depend on the number of tokens alone, so that CUDA graphs and `torch.compile` hold the whole.

- Few tokens: each (token, choice) pair goes for itself, through plain multiply-adds that keep up with the reading of
  the words: `_gate_up_few`, then `_down_few`, which adds up the choices of a token.
- Many tokens: pairs are sorted by expert and cut into tiles, which go through the matrix units, their weights unpacked
  on the way: `_gate_up_many`, `_down_many`, then `_add_choices`.

Sums are float32 and always in the same order. The reference is [`KimiK26MLP`], expert by expert.
"""

from __future__ import annotations  # the kernels' `tl.constexpr` may not be there

import re
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .quantization_kimi_k26 import VALUES_PER_WORD


try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton = None

    def jit(function):
        return function


class Blocks(NamedTuple):
    """What one program works on: outputs, and words (or plain weights) of each at a time."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 3


# By whether weights are words.
FEW = {True: Blocks(4, 128, 1), False: Blocks(4, 512)}
MANY = {True: Blocks(64, 16), False: Blocks(64, 64)}
FEW_TOKENS = 8  # up to so many, two pairs seldom share an expert
LEAST_ROWS, MOST_ROWS = 16, 64  # of a tile
TOKENS_AT_ONCE = 8192  # bounds what is kept between the steps
SUM_BLOCK = 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# See `_number`. An argument of the kernels: if the compiler knew it, masking and this would be two instructions.
MAGIC = 0x43000000


@jit
def _number(words, magic, j: tl.constexpr):
    """Value `j`, 0 … 15, of each word, as the float32 `bias + value`; and the bias that stands for zero, -8 included.

    No conversion is needed: beside the exponent of 2**7, 2**11 or 2**15 (`magic` and four more each), a bit counts 1
    in place 16, 12 or 8. Each word is shifted twice to bring all its values there.
    """
    place: tl.constexpr = 4 * j + (8 if j < 2 else 0 if j < 5 else -12)
    shifted = (words << 8) if j < 2 else words if j < 5 else (words >> 12)
    bits = (shifted & (15 << place)) | (magic + (((16 - place) // 4) << 25))
    return bits.to(tl.float32, bitcast=True), 2.0 ** (23 - place) + 8.0


@jit
def _load(pointers, inside, whole: tl.constexpr):
    """What is there, 0 outside; without looking where all is inside."""
    return tl.load(pointers) if whole else tl.load(pointers, mask=inside, other=0)


@jit
def _lies(table, expert, projection: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr):
    """Where words (or plain weights) and scales of an expert's gate, up or down projection (0, 1, 2) begin."""
    entry = table + expert * 6 + projection * 2
    weights = tl.load(entry).to(tl.pointer_type(kind))
    scales = tl.load(entry + 1).to(tl.pointer_type(tl.bfloat16))
    if aligned:  # so that 16 bytes are read at a time
        weights, scales = tl.multiple_of(weights, 16), tl.multiple_of(scales, 16)
    return weights, scales


@jit
def _inputs(x, first, steps: tl.constexpr, group: tl.constexpr, block: tl.constexpr):
    """The inputs that `block` words from word `first` on are multiplied with, one tensor for each value of a word."""
    if group:
        at = first * 8 + tl.arange(0, block * 8)
        flat = _load(x + at, at < steps * 8, steps % block == 0).to(tl.float32)
        even, odd = tl.split(flat.reshape(block, 4, 2))
        even_a, even_b = tl.split(even.reshape(block, 2, 2))
        odd_a, odd_b = tl.split(odd.reshape(block, 2, 2))
        x0, x4 = tl.split(even_a)
        x2, x6 = tl.split(even_b)
        x1, x5 = tl.split(odd_a)
        x3, x7 = tl.split(odd_b)
        inputs = x0, x1, x2, x3, x4, x5, x6, x7
    else:
        at = first + tl.arange(0, block)
        inputs = (_load(x + at, at < steps, steps % block == 0).to(tl.float32),)
    return inputs


@jit
def _products(
    weights, scales, outs, inputs, first, magic, steps: tl.constexpr, group: tl.constexpr, block: tl.constexpr
):
    """Weights times inputs, `(outputs, block)` float32: still to be added up along the block."""
    at = first + tl.arange(0, block)[None, :]
    tile = _load(weights + outs[:, None] * steps + at, at < steps, steps % block == 0)
    if group:
        total = tl.zeros(tile.shape, tl.float32)
        for j in tl.static_range(8):
            number, bias = _number(tile, magic, j)
            total += (number - bias) * inputs[j][None, :]
        at_scale = outs[:, None] * (steps * 8 // group) + at // (group // 8)
        scale = _load(scales + at_scale, at < steps, steps % block == 0)
        products = total * scale.to(tl.float32)
    else:
        products = tile.to(tl.float32) * inputs[0][None, :]
    return products


@jit
def _gate_up_few(
    x,
    table,
    chosen,
    factors,
    hidden,
    magic,
    top_k: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
):
    """`silu(gate) * up`, times the expert's factor, of one pair, for a block of outputs."""
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    if tl.load(table + expert * 6) == 0:
        return
    gate_weights, gate_scales = _lies(table, expert, 0, kind, aligned)
    up_weights, up_scales = _lies(table, expert, 1, kind, aligned)
    out = tl.program_id(0) * outputs + tl.arange(0, outputs)
    outs = tl.minimum(out, width - 1)
    x += (pair // top_k) * (steps * (8 if group else 1))
    gate, up = tl.zeros((outputs, block), tl.float32), tl.zeros((outputs, block), tl.float32)
    for first in range(0, steps, block):
        inputs = _inputs(x, first, steps, group, block)
        gate += _products(gate_weights, gate_scales, outs, inputs, first, magic, steps, group, block)
        up += _products(up_weights, up_scales, outs, inputs, first, magic, steps, group, block)
    gate, up = tl.sum(gate, 1), tl.sum(up, 1)
    result = gate / (1 + tl.exp(-gate)) * up * tl.load(factors + pair)
    tl.store(hidden + pair * width + out, result, mask=out < width)


@jit
def _down_few(
    hidden,
    table,
    chosen,
    total,
    magic,
    top_k: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
):
    """The sum of one token's choices, for a block of outputs."""
    token = tl.program_id(1)
    out = tl.program_id(0) * outputs + tl.arange(0, outputs)
    outs = tl.minimum(out, width - 1)
    added = tl.zeros((outputs, block), tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        expert = tl.load(chosen + pair)
        if tl.load(table + expert * 6) != 0:
            weights, scales = _lies(table, expert, 2, kind, aligned)
            row = hidden + pair * (steps * (8 if group else 1))
            for first in range(0, steps, block):
                inputs = _inputs(row, first, steps, group, block)
                added += _products(weights, scales, outs, inputs, first, magic, steps, group, block)
    tl.store(total + token * width + out, tl.sum(added, 1).to(total.dtype.element_ty), mask=out < width)


@jit
def _unpacked(tile, scale, magic, j: tl.constexpr, dtype: tl.constexpr):
    """Value `j` of each word times its scale, rounded to bfloat16 as the format says, in `dtype`."""
    number, bias = _number(tile, magic, j)
    exact = number * scale - bias * scale  # each of the three fits into a float32
    if dtype == tl.float32:
        bits = exact.to(tl.uint32, bitcast=True)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = exact.to(tl.bfloat16).to(dtype)
    return rounded


@jit
def _multiply(
    weights,
    scales,
    outs,
    x,
    first,
    total,
    magic,
    steps: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
):
    """`total + weights @ x`: `(outputs, rows)` from `x` of shape `(inputs of the block, rows)`."""
    at = first + tl.arange(0, block)[None, :]
    tile = _load(weights + outs[:, None] * steps + at, at < steps, steps % block == 0)
    if group:
        at_scale = outs[:, None] * (steps * 8 // group) + at // (group // 8)
        scale = _load(scales + at_scale, at < steps, steps % block == 0).to(tl.float32)
        even = tl.join(
            tl.join(_unpacked(tile, scale, magic, 0, x.dtype), _unpacked(tile, scale, magic, 4, x.dtype)),
            tl.join(_unpacked(tile, scale, magic, 2, x.dtype), _unpacked(tile, scale, magic, 6, x.dtype)),
        )
        odd = tl.join(
            tl.join(_unpacked(tile, scale, magic, 1, x.dtype), _unpacked(tile, scale, magic, 5, x.dtype)),
            tl.join(_unpacked(tile, scale, magic, 3, x.dtype), _unpacked(tile, scale, magic, 7, x.dtype)),
        )
        tile = tl.join(even, odd).reshape(outs.shape[0], block * 8)
    return tl.dot(tile.to(x.dtype), x, total, input_precision="ieee")


@jit
def _rows_of_tile(order, starts, tile_expert, tile_starts, expert, rows: tl.constexpr):
    """The pairs of this program's tile, and which of them there are."""
    first = tl.load(starts + expert) + (tl.program_id(1) - tl.load(tile_starts + expert)) * rows
    slots = first + tl.arange(0, rows)
    live = slots < tl.load(starts + expert + 1)
    return tl.load(order + slots, mask=live, other=0), live


@jit
def _rows_of(x, rows, live, first, steps: tl.constexpr, group: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr):
    """The inputs of a block for each row of a tile, `(inputs of the block, rows)`, in `dtype`."""
    per_step: tl.constexpr = 8 if group else 1
    at = first * per_step + tl.arange(0, block * per_step)[:, None]
    inside = live[None, :] & (at < steps * per_step)
    return tl.load(x + rows[None, :] * (steps * per_step) + at, mask=inside, other=0).to(dtype)


@jit
def _gate_up_many(
    x,
    table,
    order,
    starts,
    tile_expert,
    tile_starts,
    hidden,
    magic,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    multiplied: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
):
    """`silu(gate) * up` of the pairs of a tile, for a block of outputs."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert == experts:  # there are fewer tiles than there could be
        return
    if tl.load(table + expert * 6) == 0:
        return
    gate_weights, gate_scales = _lies(table, expert, 0, kind, aligned)
    up_weights, up_scales = _lies(table, expert, 1, kind, aligned)
    pairs, live = _rows_of_tile(order, starts, tile_expert, tile_starts, expert, rows)
    out = tl.program_id(0) * outputs + tl.arange(0, outputs)
    outs = tl.minimum(out, width - 1)
    gate, up = tl.zeros((outputs, rows), tl.float32), tl.zeros((outputs, rows), tl.float32)
    for first in range(0, steps, block):
        inputs = _rows_of(x, pairs // top_k, live, first, steps, group, block, multiplied)
        gate = _multiply(gate_weights, gate_scales, outs, inputs, first, gate, magic, steps, group, block)
        up = _multiply(up_weights, up_scales, outs, inputs, first, up, magic, steps, group, block)
    result = (gate / (1 + tl.exp(-gate)) * up).to(hidden.dtype.element_ty)
    tl.store(hidden + pairs[None, :] * width + out[:, None], result, mask=live[None, :] & (out < width)[:, None])


@jit
def _down_many(
    hidden,
    table,
    order,
    starts,
    tile_expert,
    tile_starts,
    outs_of_pairs,
    magic,
    experts: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    multiplied: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
):
    """The experts' outputs for the pairs of a tile, for a block of outputs."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert == experts:
        return
    if tl.load(table + expert * 6) == 0:
        return
    weights, scales = _lies(table, expert, 2, kind, aligned)
    pairs, live = _rows_of_tile(order, starts, tile_expert, tile_starts, expert, rows)
    out = tl.program_id(0) * outputs + tl.arange(0, outputs)
    outs = tl.minimum(out, width - 1)
    total = tl.zeros((outputs, rows), tl.float32)
    for first in range(0, steps, block):
        inputs = _rows_of(hidden, pairs, live, first, steps, group, block, multiplied)
        total = _multiply(weights, scales, outs, inputs, first, total, magic, steps, group, block)
    at = outs_of_pairs + pairs[None, :] * width + out[:, None]
    tl.store(at, total.to(outs_of_pairs.dtype.element_ty), mask=live[None, :] & (out < width)[:, None])


@jit
def _add_choices(
    outs_of_pairs, table, chosen, factors, total, top_k: tl.constexpr, width: tl.constexpr, block: tl.constexpr
):
    """The weighted sum of one token's choices; nothing was written for those of absent experts."""
    token = tl.program_id(1)
    out = tl.program_id(0) * block + tl.arange(0, block)
    weighted = tl.zeros((block,), tl.float32)
    outs_of_pairs += token.to(tl.int64) * (top_k * width)
    for choice in range(top_k):
        pair = token * top_k + choice
        if tl.load(table + tl.load(chosen + pair) * 6) != 0:
            part = tl.load(outs_of_pairs + choice * width + out, mask=out < width, other=0)
            weighted += tl.load(factors + pair) * part.to(tl.float32)
    tl.store(total + token * width + out, weighted.to(total.dtype.element_ty), mask=out < width)


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


def grouped_experts(x, weights, chosen, table: ExpertTable, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weighted sum of each token's experts, as far as they are in the table. Has no gradient.

    For few tokens, unless they are float32, value times scale is not rounded; else it is, to bfloat16, as the format
    says, and multiplied in the dtype of `x`.

    Args:
        x (`torch.Tensor` of shape `(tokens, hidden_size)`): bfloat16, float16 or float32; as plain weights are.
        weights (`torch.Tensor` of shape `(tokens, top_k)`, float32), chosen (same shape, int64).
        table ([`ExpertTable`]): of the device that `x` is on.
        dtype (`torch.dtype`, *optional*): of the result, that of `x` by default. The sum is float32 before.

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
    return _grouped_experts(x, weights, chosen, table.addresses, *sizes, dtype or x.dtype)


# A namespace of this copy of the module's own: remote code and the package may be loaded side by side.
@torch.library.custom_op(re.sub(r"\W", "_", __name__) + "::grouped_experts", mutates_args=())
def _grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    addresses: torch.Tensor,
    width: int,
    group_size: int,
    aligned: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
    total = torch.empty_like(x, dtype=dtype)
    few = len(x) <= FEW_TOKENS and x.dtype != torch.float32  # exact for float32: as the format rounds
    run = _run_few if few else _run_many
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for part in range(0, len(x), TOKENS_AT_ONCE):
            tensors = (tensor[part : part + TOKENS_AT_ONCE] for tensor in (x, weights, chosen, total))
            run(*tensors, addresses, width, group_size, aligned)
    return total


@_grouped_experts.register_fake
def _(x, weights, chosen, addresses, width, group_size, aligned, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _kind(dtype: torch.dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _settings(x, group_size, aligned, blocks: Blocks) -> dict:
    """What all kernels of the experts are told."""
    kind = tl.uint32 if group_size else _kind(x.dtype)
    tuning = {"outputs": blocks.outputs, "block": blocks.inputs, "num_warps": blocks.warps, "num_stages": blocks.stages}
    return {"magic": MAGIC, "group": group_size, "kind": kind, "aligned": aligned, **tuning}


def _run_few(x, weights, chosen, total, addresses, width, group_size, aligned, blocks: Blocks | None = None):
    """Each pair for itself; fills `total`."""
    (tokens, size), top_k, per_step = x.shape, chosen.shape[1], VALUES_PER_WORD if group_size else 1
    settings = _settings(x, group_size, aligned, blocks or FEW[group_size > 0])
    hidden = x.new_empty(tokens * top_k, width, dtype=torch.float32)
    grid = (triton.cdiv(width, settings["outputs"]), tokens * top_k)
    sizes = {"top_k": top_k, "steps": size // per_step, "width": width}
    _gate_up_few[grid](x, addresses, chosen, weights, hidden, **sizes, **settings)
    grid = (triton.cdiv(size, settings["outputs"]), tokens)
    sizes = {"top_k": top_k, "steps": width // per_step, "width": size}
    _down_few[grid](hidden, addresses, chosen, total, **sizes, **settings)


def _run_many(x, weights, chosen, total, addresses, width, group_size, aligned, blocks: Blocks | None = None):
    """Pairs sorted by expert, in tiles; fills `total`."""
    (tokens, size), (experts, top_k), pairs = x.shape, (len(addresses), chosen.shape[1]), chosen.numel()
    per_step = VALUES_PER_WORD if group_size else 1
    settings = _settings(x, group_size, aligned, blocks or MANY[group_size > 0])
    rows = min(max(triton.next_power_of_2(triton.cdiv(pairs, experts)), LEAST_ROWS), MOST_ROWS)
    schedule, tiles = _schedule(chosen.flatten(), experts, rows)
    # On a CPU this is Triton's interpreter, which has no product of bfloat16.
    multiplied = _kind(torch.float32 if x.device.type == "cpu" else x.dtype)
    settings |= {"experts": experts, "rows": rows, "multiplied": multiplied}
    hidden, outs = x.new_empty(pairs, width), x.new_empty(pairs, size)
    grid = (triton.cdiv(width, settings["outputs"]), tiles)
    sizes = {"steps": size // per_step, "width": width}
    _gate_up_many[grid](x, addresses, *schedule, hidden, top_k=top_k, **sizes, **settings)
    grid = (triton.cdiv(size, settings["outputs"]), tiles)
    sizes = {"steps": width // per_step, "width": size}
    _down_many[grid](hidden, addresses, *schedule, outs, **sizes, **settings)
    grid = (triton.cdiv(size, SUM_BLOCK), tokens)
    _add_choices[grid](outs, addresses, chosen, weights, total, top_k=top_k, width=size, block=SUM_BLOCK)


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
