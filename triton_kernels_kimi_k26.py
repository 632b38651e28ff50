"""The GPU's kernels, in Triton: router and experts, on tables of addresses. `triton_kimi_k26` launches them.

- Few tokens: `router_logits` and `choose_experts` find their experts. Each (token, choice) pair goes for itself, through plain
  multiply-adds that keep up with the reading of the words: `spread_inputs` puts the inputs in the order of the words, then
  come `gate_up_few` and `down_few`, which adds up the choices of a token.
- Many tokens: pairs are sorted by expert and cut into tiles, which go through the matrix units, their weights unpacked
  on the way: `arrange_inputs` puts the inputs in the order of that, then come `gate_up_many`, `down_many`, and `add_choices`.

Sums are float32 and always in the same order.
"""

from __future__ import annotations  # the kernels' `tl.constexpr` may not be there


try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton = tl = None

    def jit(function):
        return function


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

    One shift serves three values, the others are where they are; products with what `spread_inputs` gives are in range again.
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
def spread_inputs(x, spread, steps: tl.constexpr, block: tl.constexpr):
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
def gate_up_few(
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
def down_few(
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
def arrange_inputs(x, arranged, steps: tl.constexpr, padded: tl.constexpr, block: tl.constexpr):
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
def _rows_of_tile(order, starts, tile_starts, expert, rows: tl.constexpr):
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
def gate_up_many(
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
    pairs, live = _rows_of_tile(order, starts, tile_starts, expert, rows)
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
def down_many(
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
    pairs, live = _rows_of_tile(order, starts, tile_starts, expert, rows)
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
def add_choices(
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
def router_logits(x, weight, logits, experts: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """One token's product with one expert's row of the router."""
    expert, token = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((block,), tl.float32)
    for first in tl.static_range(0, size, block):  # all is asked for before anything is waited for
        at = first + tl.arange(0, block)
        row = tl.load(weight + expert * size + at, mask=at < size, other=0).to(tl.float32)
        total += row * tl.load(x + token * size + at, mask=at < size, other=0).to(tl.float32)
    tl.store(logits + token * experts + expert, tl.sum(total, 0))


@jit
def choose_experts(
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
