"""The native kernels beside the plain path in float32 on the same bfloat16 weights: they may be off by roundings only."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, decoding_kimi_k26, experts_kimi_k26, native_kimi_k26, text_kimi_k26
from kimi_k26.cache_kimi_k26 import QuantizedLatentCache, layer_of, write_latents
from kimi_k26.experts_kimi_k26 import Routing
from kimi_k26.native_kimi_k26 import attention, dequantize, few_rows, library, many_rows, read_latents
from kimi_k26.quantization_kimi_k26 import dequantize_int4, quantize_int4
from kimi_k26.text_kimi_k26 import AttentionSpan, rotate_pairs

from .tiny_models import config_dict, fill

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")

WIDE = {
    "hidden_size": 96,
    "intermediate_size": 80,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "num_hidden_layers": 2,
}
SHAPES = {
    "as published": {},
    "bfloat16 experts": {"quantized": False},
    "query without a bottleneck": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "two shared experts": {"n_shared_experts": 2},
    "no shared expert": {"n_shared_experts": 0},
    "groups of experts": {"n_group": 4, "topk_group": 2},
    "weights not normalized": {"norm_topk_prob": False},
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "forty-nine heads": {"num_attention_heads": 49, "num_key_value_heads": 49},
    "group size 64": {"group_size": 64, "hidden_size": 128},
    "group size 128": {"group_size": 128, "hidden_size": 128, "moe_intermediate_size": 128},
}


LONG_ROWS = {"group_size": 128, "hidden_size": 640, "moe_intermediate_size": 128}  # longer than the nearest cache has them at once
KINDS = {"tiles": "#define TILES\n", "bfloat16": "#define BFLOAT16_PRODUCTS\n", "integers": "#undef __AVX512BF16__\n"}
compile_kind = functools.cache(lambda kind: native_kimi_k26.load(KINDS[kind] + native_kimi_k26.SOURCE))


def use_kernels(monkeypatch, kind: str):
    assert compile_kind(kind) is not None
    for module in (native_kimi_k26, decoding_kimi_k26, experts_kimi_k26):
        monkeypatch.setattr(module, "library", lambda: compile_kind(kind))


@pytest.fixture(params=KINDS)
def each_kind(request, monkeypatch):
    """With the kernels for AMX and for AVX-512, both emulated where the processor lacks them, and with those for AVX2."""
    use_kernels(monkeypatch, request.param)


def make(changes: dict) -> KimiK26ForConditionalGeneration:
    changes = {"quantized": True, "group_size": 32, **WIDE, **changes}
    quantized, group_size = changes.pop("quantized"), changes.pop("group_size")
    written = config_dict(vision=False, quantized=quantized, **changes)
    if quantized:
        written["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    model = fill(KimiK26ForConditionalGeneration(KimiK26Config(**written)).eval())
    return model.to(torch.bfloat16)


def one_step(layer, x, cos, sin, latents, rotary, padding=None):
    """A layer's answer to one new token per row after the given latents, and what the cache then holds."""
    cache = DynamicCache()
    rows, past = latents.shape[0], latents.shape[2]
    index = layer.self_attn.layer_idx
    held = layer_of(cache, index)
    if past:
        held.update(latents, rotary)
    span = AttentionSpan(torch.tensor([past]), past, padding)
    with torch.no_grad():
        out, _, logits = layer(x, (cos, sin), span, past_key_values=cache)
    assert held.keys.shape == (rows, 1, past + 1, latents.shape[3])
    return out, logits, held.keys, held.values


def inputs(model, rows, past, seed=0):
    config = model.config.text_config
    torch.manual_seed(seed)
    x = torch.randn(rows, 1, config.hidden_size).bfloat16()
    angle = torch.rand(rows, 1, config.qk_rope_head_dim // 2) * 6
    latents = torch.randn(rows, 1, past, config.kv_lora_rank).bfloat16()
    return x, angle.cos(), angle.sin(), latents, torch.randn(rows, 1, past, config.qk_rope_head_dim).bfloat16()


def error(got, want):
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows, past, threads", [(1, 0, 2), (1, 37, 1), (3, 200, 3), (9, 64, 2), (2, 300, 1), (32, 31, 1)])
def test_a_layer_is_the_plain_one(shape, rows, past, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = make(SHAPES[shape])
    plain = copy.deepcopy(model).float()
    given = inputs(model, rows, past)
    for layer, reference in zip(model.language_model.model.layers, plain.language_model.model.layers):
        got = one_step(layer, *given)
        assert layer.native is not None and layer.native.fits
        want = one_step(reference, *(part.float() for part in given))
        assert reference.native is None
        assert error(got[0], want[0]) < 0.02
        assert error(got[2], want[2]) < 0.01 and error(got[3], want[3]) < 0.01
        if want[1] is not None:
            assert error(got[1], want[1]) < 0.02


@pytest.mark.usefixtures("each_kind")
def test_padding_is_not_seen():
    model = make({})
    layer = model.language_model.model.layers[1]
    x, cos, sin, latents, rotary = inputs(model, 3, 70)
    padding = torch.ones(3, 71, dtype=torch.long)
    padding[0, :5], padding[1, :40], padding[2, :70] = 0, 0, 0
    got = one_step(layer, x, cos, sin, latents, rotary, padding)[0]
    assert layer.native is not None
    for row, hidden in enumerate((5, 40, 70)):
        here = slice(row, row + 1)
        alone = one_step(layer, x[here], cos[here], sin[here], latents[here, :, hidden:], rotary[here, :, hidden:])[0]
        assert error(got[here], alone.float()) < 0.01


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", ["as published", "bfloat16 experts", "forty-nine heads"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_rows(shape, threads, monkeypatch):
    """To the last bit: who shares a batch changes nothing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = make(SHAPES[shape])
    layer = model.language_model.model.layers[1]
    given = inputs(model, 11, 50)
    together = one_step(layer, *given)[0]
    for row in range(11):
        alone = one_step(layer, *(part[row : row + 1] for part in given))[0]
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, outputs, inputs_", [(1, 5, 32), (2, 33, 64), (7, 16, 96), (20, 50, 160), (1, 4096, 48), (40, 18, 1120)])
def test_few_rows(rows, outputs, inputs_):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs_).bfloat16(), torch.randn(outputs, inputs_).bfloat16()
    want = x.float() @ weight.float().T
    got = few_rows(x, weight)
    torch.testing.assert_close(got.float(), want, rtol=0.01, atol=0.01 * inputs_**0.5)
    assert all(torch.equal(got[row : row + some], few_rows(x[row : row + some], weight)) for some in (1, 2, 3) for row in range(0, rows, some))


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, outputs, inputs_", [(1, 5, 32), (17, 33, 64), (40, 64, 1120), (600, 70, 544)])
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows(rows, outputs, inputs_, bias):
    """Values of very different sizes, too: what is small beside its neighbours in a stretch is rounded most."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs_) * torch.randn(rows, inputs_).exp(), torch.randn(outputs, inputs_) * torch.rand(outputs, 1)
    x, weight, added = x.bfloat16(), weight.bfloat16(), torch.randn(outputs).bfloat16() if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert error(many_rows(x, weight, added), want) < 1.1 * error(want.bfloat16(), want) + 1e-4


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    x[3, 50] = bad
    broken = ~many_rows(x, weight).isfinite()
    assert broken[3].all() and not broken[:3].any() and not broken[4:].any()
    parts = [torch.randn(1, 40, *size).bfloat16() for size in ((3, 24), (3, 8), (3, 24), (8,), (3, 20))]
    parts[2][0, 30, 1] = bad
    broken = attention(*parts, 0, None, 0.3).isnan()[0]
    assert broken[30:, 1].all() and not broken[:30].any() and not broken[:, [0, 2]].any()
    model = make({})
    given = inputs(model, 3, 40)
    given[3][1, 0, 30, 2] = bad
    finite = one_step(model.language_model.model.layers[1], *given)[0].isfinite()
    assert not finite[1].any() and finite[[0, 2]].all()


@pytest.mark.usefixtures("each_kind")
def test_no_expert_is_chosen_twice():
    """Not even where scores are no numbers: a row would count twice among its expert's."""
    model = make({})
    layer = model.language_model.model.layers[1]
    layer.mlp.gate.e_score_correction_bias.data[[0, 1, *range(3, len(layer.mlp.experts))]] = float("nan")
    assert bool(one_step(layer, *inputs(model, 32, 4))[0].isfinite().all())


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_where_pytorch_is_slow(rows, bias, monkeypatch):
    monkeypatch.setattr(decoding_kimi_k26, "HAS_FAST_PRODUCTS", False)
    monkeypatch.setattr(decoding_kimi_k26, "WIDENED", 4096)  # of the 70 outputs below 42 at a time
    torch.manual_seed(0)
    module = torch.nn.Linear(96, 70, bias=bias).bfloat16()
    x = torch.randn(2, rows, 96).bfloat16()
    with torch.no_grad():
        got, wanted = decoding_kimi_k26.apply_linear(module, x), module.float()(x.float())
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    assert (got - wanted).abs().max() <= wanted.abs().max() / 256  # half a unit in the last place, after rounding once
    hooked = torch.nn.Linear(96, 70).bfloat16()
    hooked.register_forward_hook(lambda *_: "heard")
    with torch.no_grad():
        assert decoding_kimi_k26.apply_linear(hooked, x) == "heard"
    assert decoding_kimi_k26.apply_linear(module.bfloat16(), x).requires_grad  # with gradients it is PyTorch's


def test_a_whole_model_where_pytorch_is_slow(monkeypatch):
    model, ids = make({}), torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        wanted = copy.deepcopy(model).float()(ids).logits
        for fast in (False, True):
            monkeypatch.setattr(decoding_kimi_k26, "HAS_FAST_PRODUCTS", fast)
            assert (model(ids).logits - wanted).norm() < 0.05 * wanted.norm()


def test_all_kinds_round_alike(monkeypatch):
    """What is no product has the same bits from all kinds of kernels; norms and products all but the last."""
    torch.manual_seed(0)
    x, weight, gain = torch.randn(5, 224).bfloat16(), torch.randn(37, 224).bfloat16(), torch.randn(224).bfloat16()
    angles = torch.randn(5, 1, 112)
    parts = [torch.randn(1, 40, 3, 64).bfloat16() for _ in range(2)]
    turning, rotary = torch.randn(1, 40, 3, 32).bfloat16(), torch.randn(1, 40, 32).bfloat16()
    words, scale = quantize_int4(torch.randn(48, 128), 32)
    results = []
    for kind in KINDS:
        use_kernels(monkeypatch, kind)
        plain = torch.empty(48, 128, dtype=torch.bfloat16)
        dequantize(words, scale.bfloat16(), plain)
        turned = native_kimi_k26.rotate(x.view(5, 1, 224), angles.cos(), angles.sin())
        attended = attention(parts[0], turning, parts[1], rotary, parts[1], 0, None, 0.1)
        results.append(((turned, plain), (native_kimi_k26.norm(x, gain, 1e-5), few_rows(x, weight), attended)))
    (same, near), *others = results
    for same_too, near_too in others:
        assert all(map(torch.equal, same, same_too))
        for one, other in zip(near, near_too):
            assert (one.float() - other.float()).abs().max() <= one.abs().max() / 128


@pytest.mark.parametrize("shape", [(1, 50, 16, 64), (2, 7, 3, 6), (5, 4, 72), (1, 1, 1, 64), (2, 3, 1, 34)])
def test_turning_pairs_gives_the_same_bits(shape, monkeypatch):
    """Of a part of longer rows, as a query's rotary part is; and of what lies otherwise, which the plain path turns."""
    torch.manual_seed(sum(shape))
    held = torch.randn(*shape[:-1], shape[-1] + 32, dtype=torch.bfloat16)
    angles = torch.rand(*shape[:-2], 1, shape[-1] // 2) * 6
    own, calls = text_kimi_k26.rotate, []
    monkeypatch.setattr(text_kimi_k26, "rotate", lambda *given: calls.append(1) or own(*given))
    for x in (held[..., 32:], held[..., :-32].transpose(0, -3).contiguous().transpose(0, -3)):
        cos, sin = angles.cos(), angles.sin()
        expected = rotate_pairs(x, cos, sin)  # with gradients on: plainly
        assert not calls
        with torch.no_grad():
            assert torch.equal(rotate_pairs(x, cos, sin), expected)
            calls.clear()
    with torch.no_grad():
        rotate_pairs(held[..., 32:], cos, sin)
    assert calls


@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantizing_gives_the_same_bits(group):
    torch.manual_seed(0)
    words, scale = quantize_int4(torch.randn(37, 256).bfloat16(), group)
    out = torch.empty(37, 256, dtype=torch.bfloat16)
    dequantize(words, scale, out)
    assert torch.equal(out, dequantize_int4(words, scale, torch.bfloat16))


def test_a_static_cache_gives_the_same_bits():
    model = make({})
    layer = model.language_model.model.layers[1]
    x, cos, sin, latents, rotary = inputs(model, 3, 20)
    padding = torch.ones(3, 21, dtype=torch.long)
    padding[0, :7] = 0
    want = one_step(layer, x, cos, sin, latents, rotary, padding)[0]
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    span = AttentionSpan(torch.tensor([20]), None, padding)
    layer.native = None
    with torch.no_grad():
        for at in range(2):
            write_latents(cache, at, latents, rotary, torch.arange(20))
        got = layer(x, (cos, sin), span, past_key_values=cache)[0]
    assert layer.native is not None
    assert torch.equal(got, want) and int(cache.get_seq_length(1)) == 21


def test_a_cache_may_be_cut_and_chosen_from():
    model = make({})
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 13
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([1]))
        got = model(input_ids=ids[1:, 8:9], past_key_values=cache).logits[:, -1]
        fresh = model(input_ids=ids[1:, :8], use_cache=True).past_key_values
        want = model(input_ids=ids[1:, 8:9], past_key_values=fresh).logits[:, -1]
    assert error(got, want.float()) < 0.05


def test_a_weight_that_moved_is_found_again():
    model = make({})
    layer = model.language_model.model.layers[1]
    given = inputs(model, 1, 5)
    before = one_step(layer, *given)[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros_like(layer.self_attn.o_proj.weight))
        for expert in layer.mlp.experts:
            expert.down_proj.weight_scale.data = torch.zeros_like(expert.down_proj.weight_scale)
        layer.mlp.shared_experts.down_proj.weight.zero_()
    after = one_step(layer, *given)[0]
    assert torch.equal(after, given[0]) and not torch.equal(before, after)


@pytest.mark.parametrize("where", ["self_attn.o_proj", "mlp.gate", "mlp.experts.3", "mlp.experts.3.up_proj", "input_layernorm"])
def test_hooks_are_heard(where):
    """What a user hangs on a module runs, wherever it is."""
    model = make({"num_experts_per_tok": 8})
    layer = model.language_model.model.layers[1]
    calls = []
    layer.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    one_step(layer, *inputs(model, 1, 5))
    assert calls


def test_a_copy_has_its_own():
    model = make({})
    layer = model.language_model.model.layers[1]
    given = inputs(model, 1, 5)
    want = one_step(layer, *given)[0]
    other = copy.deepcopy(layer)
    assert other.native is None
    assert torch.equal(one_step(other, *given)[0], want)


def test_float32_and_gradients_take_the_plain_path():
    model = make({})
    ids = torch.tensor([[3]])
    cache = DynamicCache()
    model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache)
    model(input_ids=ids, past_key_values=cache).logits.sum().backward()
    assert all(layer.native is None for layer in model.language_model.model.layers)


QUERIES = [(1, 5, 1), (7, 0, 2), (33, 0, 1), (100, 0, 2), (40, 61, 3), (129, 3, 1)]


def attention_case(queries, past, batch, padded, key, value):
    """Queries over expanded keys and values: what the kernels are given, which of the answers somebody looks at, and those in float32."""
    heads, nope, rope, keys = 3, key.shape[-1], 8, past + queries
    query, turned = torch.randn(batch, queries, heads, nope).bfloat16(), torch.randn(batch, queries, heads, rope).bfloat16()
    rotary = torch.randn(batch, keys, rope).bfloat16()
    mask = torch.ones(batch, keys, dtype=torch.bool)
    if padded:
        mask[0, : keys // 3] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float())
    scores = (scores + torch.einsum("bqhd,bkd->bhqk", turned.float(), rotary.float())) * 0.3
    visible = torch.arange(keys) <= torch.arange(past, keys)[:, None]
    visible = visible & mask[:, None, None]
    weights = scores.masked_fill(~visible, -1e30).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, value.float())
    seen = visible[:, 0].any(-1)  # a token of the padding sees nothing, and nobody looks at it
    return query, turned, rotary, mask if padded else None, seen, want


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("queries, past, batch", QUERIES)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_expanded_keys(queries, past, batch, padded):
    torch.manual_seed(queries)
    key, value = (torch.randn(batch, past + queries, 3, width).bfloat16() for width in (24, 20))
    query, turned, rotary, mask, seen, want = attention_case(queries, past, batch, padded, key, value)
    got = attention(query, turned, key, rotary, value, past, mask, 0.3)
    assert error(got[seen], want[seen]) < 0.01 and bool(got.isfinite().all())


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("queries, past, batch", [*QUERIES, (2, 700, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_latents(queries, past, batch, padded):
    torch.manual_seed(queries)
    room = torch.randn(batch, past + queries + 5, 64).bfloat16()  # a static cache is longer than what it holds
    latent, expansion = room[:, : past + queries], torch.randn(3, 24 + 20, 64).bfloat16() / 8
    key, value = torch.einsum("bkr,hdr->bkhd", latent.float(), expansion.float()).split([24, 20], dim=-1)
    query, turned, rotary, mask, seen, want = attention_case(queries, past, batch, padded, key, value)
    got = read_latents(query, turned, room, rotary, expansion, past, mask, 0.3)
    assert error(got[seen], want[seen]) < 0.015 and bool(got.isfinite().all())


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, new, past", [(1, 7, 0), (1, 32, 50), (2, 5, 600), (3, 10, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_some_tokens_at_once_are_one_after_the_other(rows, new, past, padded):
    """To the last bit, in both kinds of caches, whether somebody looks at the layers or not."""
    model = make({"num_hidden_layers": 3})
    ids = torch.randint(0, 90, (rows, past + new), generator=torch.Generator().manual_seed(new))
    mask = torch.ones_like(ids)
    mask[0, : past // 2] = 1 - padded

    def logits(step, cache, **options):
        places, given = [past, *range(past + step, past + new + 1, step)], []
        if past:
            model(input_ids=ids[:, :past], attention_mask=mask[:, :past], past_key_values=cache)
        for begin, end in zip(places, places[1:]):
            natives = model.language_model.model
            out = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, **options)
            assert natives.native is not None or natives.layers[0].native is not None
            given.append(out.logits)
        return torch.cat(given, dim=1)

    with torch.no_grad():
        want = logits(1, DynamicCache())
        assert torch.equal(logits(new, DynamicCache()), want)
        assert torch.equal(logits(new, DynamicCache(), output_hidden_states=True), want)
        assert torch.equal(logits(new, DynamicCache(), logits_to_keep=1), want[:, -1:])
        if past:
            one, some = (StaticCache(config=model.config.text_config, max_cache_len=past + new + 3) for _ in range(2))
            assert torch.equal(logits(new, some), logits(1, one)) and int(some.get_seq_length()) == past + new


def test_short_turns_and_other_caches_take_the_kernels_too(monkeypatch):
    """Where all layers cannot go in one call, attention over latents is the kernels' all the same."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 90), generator=torch.Generator().manual_seed(0))
    read = []
    monkeypatch.setattr(text_kimi_k26, "read_latents", lambda *given: read.append(given[0].shape[1]) or native_kimi_k26.read_latents(*given))
    with torch.no_grad():
        for cache in (DynamicCache(), QuantizedLatentCache(model.config)):
            read.clear()
            got = [model(input_ids=ids[:, :50], past_key_values=cache).logits]
            got += [model(input_ids=ids[:, 50:89], past_key_values=cache).logits, model(input_ids=ids[:, 89:], past_key_values=cache).logits]
            assert read == ([] if type(cache) is DynamicCache else [1, 1])
            assert error(torch.cat(got, dim=1), plain(input_ids=ids).logits) < 0.05
        for layer in model.language_model.model.layers:
            layer.self_attn.few_queries = 1000
        cache, _ = DynamicCache(), read.clear()
        got = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(45, dim=1)]
        assert read == [45, 45]
        assert error(torch.cat(got, dim=1), plain(input_ids=ids).logits) < 0.02


@torch.no_grad()
def test_what_is_asked_of_a_short_turn_is_what_the_plain_path_gives():
    """Logits of some places, routers' logits, a loss; and places in a static cache that do not follow one another."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def turn(model, cache, places, **options):
        model(input_ids=ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        return model(input_ids=ids[:, 20 : 20 + len(places)], attention_mask=mask, past_key_values=cache, cache_position=places, **options)

    def both(make_cache, places, **options):
        return [turn(each, make_cache(each), torch.tensor(places), **options) for each in (model, plain)]

    for keep in (0, 1, 2, 5, -2, torch.tensor([0, 3])):
        got, want = both(lambda _: DynamicCache(), range(20, 25), logits_to_keep=keep, output_router_logits=True)
        assert got.logits.shape == want.logits.shape and error(got.logits, want.logits) < 0.03
        assert [part.shape for part in got.router_logits] == [part.shape for part in want.router_logits]
        assert all(error(*parts) < 0.03 for parts in zip(got.router_logits, want.router_logits))
    got, want = both(lambda _: DynamicCache(), range(20, 26), labels=ids[:, 20:26])
    assert error(got.loss, want.loss) < 0.01
    for places in (range(20, 24), [20, 22, 21]):
        got, want = both(lambda each: StaticCache(config=each.config.text_config, max_cache_len=30), list(places))
        assert error(got.logits, want.logits) < 0.03


@torch.no_grad()
def test_what_the_kernels_must_not_read_the_plain_path_does():
    """Masks and positions of other shapes, places that are not the next ones, caches that hold a window, no tokens at all."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 80), generator=torch.Generator().manual_seed(0))
    text = model.config.text_config

    def same(past, make_cache=DynamicCache, count=4, rows=2, **options):
        answers = []
        for each in (model, plain):
            cache = make_cache()
            each(input_ids=ids[:rows, :past], past_key_values=cache)
            answers.append(each(input_ids=ids[:rows, past : past + count], past_key_values=cache, **options).logits)
        assert error(*answers) < 0.03

    static = functools.partial(StaticCache, config=text, max_cache_len=40)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, :3] = 0
    same(10, attention_mask=mask)  # of one row for two
    same(10, attention_mask=mask, rows=1)
    same(10, position_ids=torch.full((1, 1), 10), rows=1)
    for places in (range(6, 10), range(14, 18), [10, 12, 13, 14], [12, 11, 10, 9]):
        same(10, cache_position=torch.tensor(list(places)))
    for at in (6, 14):
        same(10, static, cache_position=torch.arange(at, at + 4))
        same(10, static, count=1, cache_position=torch.tensor([at]))
    for chunk in (1, 4, 10):
        same(50, lambda: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=40) for _ in range(2)]), count=chunk)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(input_ids=ids[:, :0], past_key_values=model(input_ids=ids[:, :5]).past_key_values)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert error(compiled(input_ids=ids[:, :5], use_cache=False).logits, plain(input_ids=ids[:, :5]).logits) < 0.03


def test_a_prompt_is_read_as_by_the_plain_path():
    model = make({"num_experts_per_tok": 8})
    for layer in model.language_model.model.layers:
        layer.self_attn.few_queries = 0
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
        want = plain(input_ids=ids, attention_mask=mask).logits
        parts = model(input_ids=ids[:, :50], attention_mask=mask[:, :50], use_cache=True)
        rest = model(input_ids=ids[:, 50:], attention_mask=mask, past_key_values=parts.past_key_values).logits
    assert error(got[mask == 1], want[mask == 1]) < 0.02
    assert error(rest, got[:, 50:].float()) < 0.02


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("changes", [SHAPES["as published"], SHAPES["bfloat16 experts"], SHAPES["group size 64"], LONG_ROWS])
@pytest.mark.parametrize("rows", [2, 5, 40, 300])
def test_experts_on_many_rows(changes, rows):
    model = make(changes)
    experts = model.language_model.model.layers[1].mlp.experts
    reference = copy.deepcopy(experts).float()
    torch.manual_seed(rows)
    x = torch.randn(rows, experts.sizes["hidden"]).bfloat16()
    weights = torch.rand(rows, 3)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(rows)])  # three experts of eight get nothing
    with torch.no_grad():
        got, want = experts(x, weights, chosen), reference(x.float(), weights, chosen)
    assert experts.store.misses == len(chosen.unique()) and reference.store.misses == 0
    assert error(got, want) < 0.01


def test_a_share_of_the_experts():
    """What some experts add and what the others add makes up the whole."""
    model = make({})
    experts = model.language_model.model.layers[1].mlp.experts
    torch.manual_seed(0)
    x, weights = torch.randn(20, 96).bfloat16(), torch.rand(20, 3)
    routing = Routing(weights, torch.stack([torch.randperm(8)[:3] for _ in range(20)]), 8)
    with torch.no_grad():
        parts = experts.native_share(range(3), x, routing).float() + experts.native_share(range(3, 8), x, routing).float()
        assert error(experts.native_share(range(8), x, routing), parts) < 0.01


def test_logits_are_no_farther_from_float32_than_those_of_the_plain_path(monkeypatch):
    model = make({"num_experts_per_tok": 8})  # all experts: no choice hangs on a rounding
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(model):
        out, parts = model(input_ids=ids[:, :10], use_cache=True), []
        for at in range(10, 30):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits.float())
        return torch.cat(parts, dim=1)

    want, fast = logits(plain), logits(model)
    assert model.language_model.model.native is not None
    monkeypatch.setattr("kimi_k26.decoding_kimi_k26.library", lambda: None)
    monkeypatch.setattr("kimi_k26.experts_kimi_k26.library", lambda: None)
    slow = logits(model)
    assert not torch.equal(fast, slow)
    assert error(fast, want) < 1.2 * error(slow, want)


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", ["as published", "bfloat16 experts"])
def test_many_rows_on_several_threads(shape, monkeypatch):
    model = make({**SHAPES[shape], "num_experts_per_tok": 3})
    experts, layer = model.language_model.model.layers[1].mlp.experts, model.language_model.model.layers[1]
    torch.manual_seed(0)
    x, weights = torch.randn(90, experts.sizes["hidden"]).bfloat16(), torch.rand(90, 3)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(90)])
    parts = [torch.randn(2, 70, *size).bfloat16() for size in ((3, 24), (3, 8), (3, 24), (8,), (3, 20))]
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with torch.no_grad():
            step = one_step(layer, *inputs(model, 3, 40))[0]
            results.append((experts(x, weights, chosen), attention(*parts, 0, None, 0.3), step))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        assert error(other[2], results[0][2].float()) < 0.01  # cached tokens are cut in as many pieces as there are threads


def test_all_layers_in_one_call_are_the_layers_one_by_one():
    model = make({"num_hidden_layers": 4, "first_k_dense_replace": 2})
    ids = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    results = []
    for by_layer in (False, True):
        model.expert_store.clear()
        with torch.no_grad():
            out, logits = model(input_ids=ids[:, :6], attention_mask=mask[:, :6]), []
            for at in range(6, 12):
                given = {"input_ids": ids[:, at : at + 1], "attention_mask": mask[:, : at + 1], "output_router_logits": True}
                out = model(**given, past_key_values=out.past_key_values, output_hidden_states=by_layer)
                logits.append(torch.stack((out.logits, *[part.mean() + 0 * out.logits for part in out.router_logits])))
        results.append((torch.stack(logits), model.expert_store.hits, model.expert_store.misses))
    assert model.language_model.model.native is not None and model.language_model.model.layers[3].native is not None
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:] and results[0][1] > 0


def test_a_budget_forgets_experts_after_use():
    model = make({})
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))

    def text():
        return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)

    want, size = text(), sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    experts = model.language_model.model.layers[1].mlp.experts
    assert experts.known._held
    model.set_budget(expert_budget=size // 3)
    assert torch.equal(text(), want)
    assert not experts.known._held and model.expert_store.bytes_held <= size // 3
    model.set_budget(expert_budget=size)
    assert torch.equal(text(), want) and experts.known._held


def test_experts_of_a_prompt_are_known_to_the_tokens_after_it():
    model = make({"num_experts_per_tok": 8})
    experts, store = model.language_model.model.layers[1].mlp.experts, model.expert_store
    with torch.no_grad():
        out = model(input_ids=torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0)), use_cache=True)
        assert sorted(experts.known._held) == list(range(8)) and (store.hits, store.misses) == (0, 8)
        model(input_ids=torch.tensor([[3]]), past_key_values=out.past_key_values)
        assert (store.hits, store.misses) == (8, 8)
        model(input_ids=torch.randint(0, 90, (1, 40)), use_cache=True)
        assert (store.hits, store.misses) == (16, 8)


def test_a_changed_expert_is_seen_at_the_next_prompt():
    model = make({})
    ids = torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))

    def last():
        with torch.no_grad():
            out = model(input_ids=ids[:, :5], use_cache=True)
            return model(input_ids=ids[:, 5:], past_key_values=out.past_key_values).logits

    before, experts = last(), model.language_model.model.layers[1].mlp.experts
    for number in list(experts.known._held)[:1]:
        experts[number].down_proj.weight_scale.data = torch.zeros_like(experts[number].down_proj.weight_scale)
    assert not torch.equal(last(), before)


def going_on(model, ids):
    """Logits of one token after the other, in one sequence."""
    out = model(input_ids=ids[:, :5], use_cache=True)
    for at in range(5, ids.shape[1]):
        yield model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values).logits


@torch.no_grad()
def test_what_is_done_to_all_layers_is_seen_at_the_next_token():
    model = make({"num_hidden_layers": 4})
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    steps = going_on(model, ids)
    for _ in range(3):
        next(steps)
    for layer in model.language_model.model.layers:
        shared = getattr(layer.mlp, "shared_experts", layer.mlp)
        for linear in (layer.self_attn.o_proj, shared.down_proj):
            linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
        for expert in getattr(layer.mlp, "experts", ()):
            expert.down_proj.weight_scale.data = torch.zeros_like(expert.down_proj.weight_scale)
    text = model.language_model
    want = text.lm_head(text.model.norm(text.model.embed_tokens(ids[:, 8:9])))
    assert torch.equal(next(steps), want)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layers.2.self_attn.o_proj", "norm"])
def test_what_is_done_to_one_layer_is_seen_after_as_many_tokens(where):
    model = make({"num_hidden_layers": 4})
    text = model.language_model.model
    steps = going_on(model, torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(0)))
    for _ in range(3):
        next(steps)
    module, known, tokens = text.get_submodule(where), text.native, 0
    module.weight = torch.nn.Parameter(module.weight.clone())
    while text.native is known:
        next(steps)
        tokens += 1
    assert tokens <= 5


@torch.no_grad()
def test_weights_that_move_are_not_kept():
    model = make({})
    steps = going_on(model, torch.randint(0, 90, (1, 7), generator=torch.Generator().manual_seed(0)))
    next(steps)
    assert model.language_model.model.native is not None
    model.to(torch.float32)
    assert model.language_model.model.native is None
