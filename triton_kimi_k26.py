"""Router and experts on a GPU: a kernel per projection for all experts of a layer, on the checkpoint's tensors as they lie.

A table of addresses tells the kernels where the words and scales (or the plain weights) of each expert are, so nothing
is repacked, copied or stacked. How many rows an expert gets is known on the device only: nothing here waits for it, and
shapes depend on the number of tokens alone, so that CUDA graphs and `torch.compile` hold the whole.

- Few tokens: `_logits` and `_choose` find their experts. Each (token, choice) pair goes for itself, through plain
  multiply-adds that keep up with the reading of the words: `_spread` puts the inputs in the order of the words, then
  come `_gate_up_few` and `_down_few`, which adds up the choices of a token.
- Many tokens: pairs are sorted by expert and cut into tiles, which go through the matrix units, their weights unpacked
  on the way: `_arrange` puts the inputs in the order of that, then come `_gate_up_many`, `_down_many`, and `_add_choices`.

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
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
def _small(words, j: tl.constexpr):
    """Value `j`, 0 … 15, of each word as a float32 without conversion: a bit in place p of a subnormal number is 2**(p - 149).

    One shift serves three values, the others are where they are; products with what `_spread` gives are in range again.
    """
    place: tl.constexpr = 4 * j - (12 if j >= 5 else 0)
    return ((words >> (4 * j - place)) & (15 << place)).to(tl.float32, bitcast=True)


@jit
def _store_spread(spread, word, values, steps: tl.constexpr):
    """Write inputs, `(words, 8)` float32, as `_products` takes them: nine rows of `steps` float32.

    Row `j` goes with value `j` of each word, times a power of two that makes up for `_small`: all products come out as
    2**-69 of what they are, exactly. The last row takes off the 8 that stands for zero.
    """
    j = tl.arange(0, 8)[None, :]
    place = tl.where(j < 5, 4 * j, 4 * j - 12)
    power = ((127 + 80 - place) << 23).to(tl.float32, bitcast=True)
    inside = word < steps
    tl.store(spread + j * steps + word[:, None], values * power, mask=inside[:, None])
    tl.store(spread + 8 * steps + word, tl.sum(values, 1) * (-8 * 2.0**-69), mask=inside)


@jit
def _spread(x, spread, steps: tl.constexpr, block: tl.constexpr):
    """The inputs of a token in the order in which words are read: value 0 of all words, value 1 of all words, …"""
    token = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * block + tl.arange(0, block)
    at = token * (steps * 8) + word[:, None] * 8 + tl.arange(0, 8)[None, :]
    values = tl.load(x + at, mask=word[:, None] < steps, other=0).to(tl.float32)
    _store_spread(spread + token * (9 * steps), word, values, steps)


@jit
def _products(
    weights, scales, x, first_out, first, live, steps: tl.constexpr, width: tl.constexpr, group: tl.constexpr,
    outputs: tl.constexpr, block: tl.constexpr, whole: tl.constexpr
):  # fmt: skip
    """Weights times inputs, still to be added up along the block: `(outputs, block)`, or one sum for each scale."""
    outs = tl.minimum(first_out + tl.arange(0, outputs), width - 1)
    at = first + tl.arange(0, block)
    inside = (at < steps) & live
    tile = _load(weights + outs[:, None] * steps + at[None, :], inside[None, :], whole)
    if group:
        # Runs of a power of two of words share a scale. A thread reads one at a time: it has 16 bytes of words for each.
        run: tl.constexpr = (group // 8) & -(group // 8)
        runs: tl.constexpr = block // run
        flat = tl.arange(0, outputs * runs)
        at_scale = first // run + flat % runs
        row = tl.minimum(first_out + flat // runs, width - 1) * (steps * 8 // group)
        there = scales + tl.max_contiguous(row + at_scale // (group // 8 // run), 1)
        scale = _load(there, (at_scale < steps // run) & live, whole).to(tl.float32)
        total = _load(x + 8 * steps + at, inside, whole)[None, :]
        for j in tl.static_range(8):
            total += _small(tile, j) * _load(x + j * steps + at, inside, whole)[None, :]
        products = tl.sum(total.reshape(outputs, runs, run), 2) * scale.reshape(outputs, runs)
    else:
        products = tile.to(tl.float32) * _load(x + at, inside, whole).to(tl.float32)[None, :]
    return products


@jit
def _gate_up_few(
    x,
    table,
    chosen,
    factors,
    hidden,
    top_k: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """`silu(gate) * up`, times the expert's factor, of one pair, for a block of outputs."""
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    if tl.load(table + expert * 6) == 0:
        return
    gate_weights, gate_scales = _lies(table, expert, 0, kind, aligned)
    up_weights, up_scales = _lies(table, expert, 1, kind, aligned)
    first_out = tl.program_id(0) * outputs
    x += (pair // top_k) * (steps * (9 if group else 1))
    sums: tl.constexpr = block // ((group // 8) & -(group // 8)) if group else block
    gate, up = tl.zeros((outputs, sums), tl.float32), tl.zeros((outputs, sums), tl.float32)
    whole: tl.constexpr = steps % block == 0
    for first in tl.range(0, steps, block, num_stages=stages):
        gate += _products(
            gate_weights, gate_scales, x, first_out, first, True, steps, width, group, outputs, block, whole
        )
        up += _products(up_weights, up_scales, x, first_out, first, True, steps, width, group, outputs, block, whole)
    scaled: tl.constexpr = 2.0**69 if group else 1.0
    gate, up = tl.sum(gate, 1) * scaled, tl.sum(up, 1) * scaled
    result = gate / (1 + tl.exp(-gate)) * up * tl.load(factors + pair)
    if group:
        word = tl.program_id(0) * (outputs // 8) + tl.arange(0, outputs // 8)
        _store_spread(hidden + pair * (9 * (width // 8)), word, result.reshape(outputs // 8, 8), width // 8)
    else:
        out = first_out + tl.arange(0, outputs)
        tl.store(hidden + pair * width + out, result, mask=out < width)


@jit
def _down_few(
    hidden,
    table,
    chosen,
    added,
    total,
    top_k: tl.constexpr,
    steps: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    aligned: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """The sum of one token's choices, and of what is `added` if there is, for a block of outputs."""
    token = tl.program_id(1)
    first_out = tl.program_id(0) * outputs
    sums: tl.constexpr = block // ((group // 8) & -(group // 8)) if group else block
    products = tl.zeros((outputs, sums), tl.float32)
    parts: tl.constexpr = (steps + block - 1) // block
    for part in tl.range(0, top_k * parts, num_stages=stages):
        pair = token * top_k + part // parts
        expert = tl.load(chosen + pair)
        weights, scales = _lies(table, expert, 2, kind, aligned)
        live = tl.load(table + expert * 6) != 0  # else nothing was written for this pair, and nothing is read
        row, first = hidden + pair * (steps * (9 if group else 1)), part % parts * block
        products += _products(weights, scales, row, first_out, first, live, steps, width, group, outputs, block, False)
    out = first_out + tl.arange(0, outputs)
    result = tl.sum(products, 1) * (2.0**69 if group else 1.0)
    if added is not None:
        result += tl.load(added + token * width + out, mask=out < width, other=0).to(tl.float32)
    tl.store(total + token * width + out, result.to(total.dtype.element_ty), mask=out < width)


@jit
def _pair(words, scale, zero, j: tl.constexpr, dtype: tl.constexpr):
    """Values `j` and `j` + 4 of each word times its scale, rounded to bfloat16 as the format says, in `dtype`, side by side.

    In bfloat16 both stay in one register: beside the exponent of 2**7, a bit counts 1 in place 0, so that 128 + value is
    there without conversion. If the compiler knew `zero`, masking and this would be two instructions.
    """
    if dtype == tl.bfloat16:
        bits = ((words >> (4 * j)) & 0x000F000F) | (0x43004300 | zero)
        low = (bits & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        result = (tl.join(low, high) - 136.0) * scale[:, :, None]
    else:
        numbers = (tl.join(words >> (4 * j), words >> (4 * j + 16)) & 15).to(tl.float32) - 8
        bits = (numbers * scale[:, :, None].to(tl.float32)).to(tl.uint32, bitcast=True)
        result = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    return result


@jit
def _word_of(at):
    """The word whose value place `at` of an arranged row is: see `_multiply`."""
    return at // 32 * 4 + at % 8 // 2


@jit
def _arrange(x, arranged, steps: tl.constexpr, padded: tl.constexpr, block: tl.constexpr):
    """A row in the order in which `_multiply` has the values of words."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * block + tl.arange(0, block)
    source = _word_of(at) * 8 + at % 32 // 8 + at % 2 * 4
    values = tl.load(x + row * (steps * 8) + source, mask=(at < padded) & (_word_of(at) < steps), other=0)
    tl.store(arranged + row * padded + at, values, mask=at < padded)


@jit
def _multiply(
    weights,
    scales,
    outs,
    x,
    first,
    total,
    zero,
    steps: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
):
    """`total + weights @ x`: `(outputs, rows)` from `x` of shape `(inputs of the block, rows)`.

    Inputs come in the order in which a thread of the matrix units wants them, so that unpacking gives it without moving
    anything between threads: of four words, values 0 and 4 of each, then 1 and 5, 2 and 6, 3 and 7.
    """
    at = first + tl.arange(0, block)[None, :]
    tile = _load(weights + outs[:, None] * steps + at, at < steps, steps % block == 0)
    if group:
        run: tl.constexpr = (group // 8) & -(group // 8)
        runs: tl.constexpr = block // run
        outputs: tl.constexpr = tile.shape[0]
        at_scale = first // run + tl.arange(0, runs)[None, :]
        there = scales + outs[:, None] * (steps * 8 // group) + at_scale // (group // 8 // run)
        scale = _load(there, at_scale < steps // run, steps % block == 0)
        scale = tl.broadcast_to(scale[:, :, None], (outputs, runs, run)).reshape(outputs, block)
        zero = zero[None, :]
        tile = tl.join(
            tl.join(_pair(tile, scale, zero, 0, x.dtype), _pair(tile, scale, zero, 1, x.dtype)),
            tl.join(_pair(tile, scale, zero, 2, x.dtype), _pair(tile, scale, zero, 3, x.dtype)),
        )
        tile = tile.reshape(outputs, block // 4, 4, 2, 2, 2).permute(0, 1, 5, 4, 2, 3).reshape(outputs, block * 8)
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
    """The inputs of a block for each row of a tile, `(inputs of the block, rows)`, in `dtype`; of arranged rows for words."""
    per_step: tl.constexpr = 8 if group else 1
    width: tl.constexpr = (steps + 3) // 4 * 32 if group else steps
    at = first * per_step + tl.arange(0, block * per_step)[:, None]
    inside = live[None, :] & (at < width)
    if group and steps % 4:
        inside &= _word_of(at) < steps
    return tl.load(x + rows[None, :] * width + at, mask=inside, other=0).to(dtype)


@jit
def _gate_up_many(
    x,
    table,
    order,
    starts,
    tile_expert,
    tile_starts,
    hidden,
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
    zero = tl.load(starts + tl.arange(0, 1)).to(tl.uint32)
    for first in range(0, steps, block):
        inputs = _rows_of(x, pairs // top_k, live, first, steps, group, block, multiplied)
        gate = _multiply(gate_weights, gate_scales, outs, inputs, first, gate, zero, steps, group, block)
        up = _multiply(up_weights, up_scales, outs, inputs, first, up, zero, steps, group, block)
    result = (gate / (1 + tl.exp(-gate)) * up).to(hidden.dtype.element_ty)
    if group:  # arranged
        place, row = out // 32 * 32 + out % 4 * 8 + out // 8 % 4 * 2 + out // 4 % 2, (width + 31) // 32 * 32
    else:
        place, row = out, width
    tl.store(hidden + pairs[None, :] * row + place[:, None], result, mask=live[None, :] & (out < width)[:, None])


@jit
def _down_many(
    hidden,
    table,
    order,
    starts,
    tile_expert,
    tile_starts,
    outs_of_pairs,
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
    zero = tl.load(starts + tl.arange(0, 1)).to(tl.uint32)
    for first in range(0, steps, block):
        inputs = _rows_of(hidden, pairs, live, first, steps, group, block, multiplied)
        total = _multiply(weights, scales, outs, inputs, first, total, zero, steps, group, block)
    at = outs_of_pairs + pairs[None, :] * width + out[:, None]
    tl.store(at, total.to(outs_of_pairs.dtype.element_ty), mask=live[None, :] & (out < width)[:, None])


@jit
def _add_choices(
    outs_of_pairs, table, chosen, factors, added, total, top_k: tl.constexpr, width: tl.constexpr, block: tl.constexpr
):
    """The weighted sum of one token's choices, and of what is `added`; nothing was written for those of absent experts."""
    token = tl.program_id(1)
    out = tl.program_id(0) * block + tl.arange(0, block)
    weighted = tl.zeros((block,), tl.float32)
    outs_of_pairs += token.to(tl.int64) * (top_k * width)
    for choice in range(top_k):
        pair = token * top_k + choice
        if tl.load(table + tl.load(chosen + pair) * 6) != 0:
            part = tl.load(outs_of_pairs + choice * width + out, mask=out < width, other=0)
            weighted += tl.load(factors + pair) * part.to(tl.float32)
    if added is not None:
        weighted += tl.load(added + token.to(tl.int64) * width + out, mask=out < width, other=0).to(tl.float32)
    tl.store(total + token * width + out, weighted.to(total.dtype.element_ty), mask=out < width)


@jit
def _logits(x, weight, logits, experts: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """One token's product with one expert's row of the router."""
    expert, token = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((block,), tl.float32)
    for first in tl.static_range(0, size, block):  # all is asked for before anything is waited for
        at = first + tl.arange(0, block)
        row = tl.load(weight + expert * size + at, mask=at < size, other=0).to(tl.float32)
        total += row * tl.load(x + token * size + at, mask=at < size, other=0).to(tl.float32)
    tl.store(logits + token * experts + expert, tl.sum(total, 0))


@jit
def _choose(
    logits,
    bias,
    factors,
    chosen,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    scaling: tl.constexpr,
    padded: tl.constexpr,
    slots: tl.constexpr,
):
    """The experts of one token, best first, and their weights."""
    token = tl.program_id(0)
    logits += token * experts
    expert, slot = tl.arange(0, padded), tl.arange(0, slots)
    scores = 1 / (1 + tl.exp(-tl.load(logits + expert, mask=expert < experts, other=0)))
    left = scores + tl.load(bias + expert, mask=expert < experts, other=0)
    left = tl.where(expert < experts, left, float("-inf"))
    picked = tl.zeros((slots,), tl.int32)
    for k in range(top_k):
        best = tl.minimum(tl.argmax(left, 0), experts - 1)  # one there is, even where nothing is a number
        picked = tl.where(slot == k, best, picked)
        left = tl.where(expert == best, float("-inf"), left)
    weights = 1 / (1 + tl.exp(-tl.load(logits + picked)))
    if normalize:
        weights /= tl.sum(tl.where(slot < top_k, weights, 0), 0) + 1e-20
    tl.store(factors + token * top_k + slot, weights * scaling, mask=slot < top_k)
    tl.store(chosen + token * top_k + slot, picked.to(tl.int64), mask=slot < top_k)


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
        x (`torch.Tensor` of shape `(tokens, hidden_size)`): bfloat16, float16 or float32; as plain weights are. For few
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
    run = _grouped_experts if torch.compiler.is_compiling() else _run  # what a graph needs takes its time
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
    run = _picked_experts if torch.compiler.is_compiling() else _pick
    return run(x, weight, bias, top_k, normalize, scaling)


def _pick(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, size), experts, x = x.shape, len(weight), x.contiguous()
    logits, factors, chosen = _picked(x, weight, top_k)
    if tokens:
        with _on(x.device):
            _logits[experts, tokens](x, weight, logits, experts=experts, size=size, block=LOGITS_BLOCK)
            constants = {"experts": experts, "top_k": top_k, "normalize": normalize, "scaling": scaling}
            padded = {"padded": triton.next_power_of_2(experts), "slots": triton.next_power_of_2(top_k)}
            _choose[tokens,](logits, bias, factors, chosen, **constants, **padded, num_warps=1)
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
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _settings(x, group_size, aligned, blocks: Blocks) -> dict:
    """What all kernels of the experts are told."""
    run = group_size // VALUES_PER_WORD & -(group_size // VALUES_PER_WORD)
    tuning = {"outputs": blocks.outputs, "block": max(blocks.inputs, run, 4), "num_warps": blocks.warps, "num_stages": blocks.stages}
    return {"group": group_size, "kind": tl.uint32 if group_size else _kind(x.dtype), "aligned": aligned, **tuning}


def _run_few(x, weights, chosen, added, total, addresses, width, group_size, aligned, blocks: tuple | None = None):
    """Each pair for itself; fills `total`. Inside of experts with words, inputs lie as `_spread` puts them."""
    (tokens, size), top_k, per_step = x.shape, chosen.shape[1], VALUES_PER_WORD if group_size else 1
    first, second = (_settings(x, group_size, aligned, each) for each in blocks or FEW[group_size > 0])
    rows = (9, width // VALUES_PER_WORD) if group_size else (width,)
    hidden = x.new_empty(tokens * top_k, *rows, dtype=torch.float32)
    if group_size:
        steps = size // VALUES_PER_WORD
        given, x = x, x.new_empty(tokens, 9, steps, dtype=torch.float32)
        _spread[triton.cdiv(steps, SPREAD_BLOCK), tokens](given, x, steps=steps, block=SPREAD_BLOCK)
    grid = (triton.cdiv(width, first["outputs"]), tokens * top_k)
    sizes = {"top_k": top_k, "steps": size // per_step, "width": width}
    _gate_up_few[grid](x, addresses, chosen, weights, hidden, **sizes, **first, stages=first["num_stages"])
    grid = (triton.cdiv(size, second["outputs"]), tokens)
    sizes = {"top_k": top_k, "steps": width // per_step, "width": size}
    _down_few[grid](hidden, addresses, chosen, added, total, **sizes, **second, stages=second["num_stages"])


def _run_many(x, weights, chosen, added, total, addresses, width, group_size, aligned, blocks: tuple | None = None):
    """Pairs sorted by expert, in tiles; fills `total`. Inputs of experts with words lie as `_arrange` puts them."""
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
        _arrange[grid](given, x, steps=size // VALUES_PER_WORD, padded=row, block=SUM_BLOCK)
    grid = (triton.cdiv(width, first["outputs"]), tiles)
    sizes = {"steps": size // per_step, "width": width}
    _gate_up_many[grid](x, addresses, *schedule, hidden, top_k=top_k, **sizes, **first)
    grid = (triton.cdiv(size, second["outputs"]), tiles)
    sizes = {"steps": width // per_step, "width": size}
    _down_many[grid](hidden, addresses, *schedule, outs, **sizes, **second)
    grid = (triton.cdiv(size, SUM_BLOCK), tokens)
    _add_choices[grid](outs, addresses, chosen, weights, added, total, top_k=top_k, width=size, block=SUM_BLOCK)


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
