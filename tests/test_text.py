"""The text model against a plain one written out here: full expansion, loops over heads and experts, float64."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, StaticCache

from kimi_k26 import KimiK26Config, attention_kimi_k26
from kimi_k26.attention_kimi_k26 import AttentionSpan, KimiK26Attention, KimiK26RMSNorm, KimiK26RotaryEmbedding, rotate_pairs
from kimi_k26.experts_kimi_k26 import KimiK26MoE
from kimi_k26.tests.tiny_models import (
    ON_EXPANDED,
    ON_LATENTS,
    YARN,
    config_dict,
    fill,
    force_attention,
    make_model,
    words,
)


def plain_rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_frequencies(config) -> list[float]:
    """Rotary frequencies by the formulas of YaRN, in Python numbers."""
    dim, base, rope = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if rope is None or rope["type"] == "default":
        return plain
    if rope["type"] == "linear":
        return [f / rope["factor"] for f in plain]

    def turns(count):  # the dimension that turns so often over the original context
        return dim * math.log(rope["original_max_position_embeddings"] / (count * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turns(rope["beta_fast"])), 0)
    high = min(math.ceil(turns(rope["beta_slow"])), dim - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0), 1) for i in range(dim // 2)]
    return [f / rope["factor"] * r + f * (1 - r) for f, r in zip(plain, ramp)]


def plain_rotate(x, position, frequencies):
    out = x.clone()
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[2 * i] = x[2 * i] * cos - x[2 * i + 1] * sin
        out[2 * i + 1] = x[2 * i] * sin + x[2 * i + 1] * cos
    return out


def linear(x, module):
    return x @ module.weight.T + (module.bias if module.bias is not None else 0)


def plain_attention(attention, config, x, positions, visible):
    """One row, `(length, hidden)`; `visible[i][j]`: whether token i sees token j. Keys and values of every head are made."""
    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    frequencies = plain_frequencies(config)
    if config.q_lora_rank is None:
        queries = linear(x, attention.q_proj)
    else:
        queries = linear(plain_rms(linear(x, attention.q_a_proj), attention.q_a_layernorm.weight, 1e-6), attention.q_b_proj)
    down = linear(x, attention.kv_a_proj_with_mqa)
    latent = plain_rms(down[:, :rank], attention.kv_a_layernorm.weight, 1e-6)
    up = linear(latent, attention.kv_b_proj)
    turned = torch.stack([plain_rotate(k, p, frequencies) for k, p in zip(down[:, rank:], positions)])
    scale = (nope + rope) ** -0.5
    if config.rope_scaling and config.rope_scaling.get("mscale_all_dim"):
        scale *= (0.1 * config.rope_scaling["mscale_all_dim"] * math.log(config.rope_scaling["factor"]) + 1) ** 2
    outs = []
    for head in range(config.num_attention_heads):
        query = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        turned_query = torch.stack([plain_rotate(q, p, frequencies) for q, p in zip(query[:, nope:], positions)])
        pair = up[:, head * (nope + config.v_head_dim) : (head + 1) * (nope + config.v_head_dim)]
        scores = (query[:, :nope] @ pair[:, :nope].T + turned_query @ turned.T) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outs.append(weights @ pair[:, nope:])
    return linear(torch.cat(outs, dim=-1), attention.o_proj)


def plain_mlp(mlp, x):
    gate = linear(x, mlp.gate_proj)
    return linear(gate * gate.sigmoid() * linear(x, mlp.up_proj), mlp.down_proj)


def plain_moe(moe, config, x):
    out = []
    for row in x:
        scores = (moe.gate.weight @ row).sigmoid()
        choice = (scores + moe.gate.e_score_correction_bias).topk(config.num_experts_per_tok).indices.tolist()
        total = sum(scores[i] for i in choice)
        routed = sum(scores[i] / total * config.routed_scaling_factor * plain_mlp(moe.experts[i], row) for i in choice)
        out.append(routed + plain_mlp(moe.shared_experts, row))
    return torch.stack(out)


@torch.no_grad()
def plain_logits(model, ids, positions=None, visible=None):
    """Logits `(length, vocabulary)` of one row."""
    config, text = model.config.text_config, model.language_model.model
    length = len(ids)
    positions = range(length) if positions is None else positions
    visible = torch.ones(length, length, dtype=torch.bool).tril() if visible is None else visible
    x = text.embed_tokens.weight[ids]
    for layer in text.layers:
        normed = plain_rms(x, layer.input_layernorm.weight, config.rms_norm_eps)
        x = x + plain_attention(layer.self_attn, config, normed, positions, visible)
        normed = plain_rms(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        moe = isinstance(layer.mlp, KimiK26MoE)
        x = x + (plain_moe(layer.mlp, config, normed) if moe else plain_mlp(layer.mlp, normed))
    return plain_rms(x, text.norm.weight, config.rms_norm_eps) @ model.language_model.lm_head.weight.T


# Angles are float32 in the model, so even its float64 agrees with exact angles no better than this.
NEAR = {"rtol": 0, "atol": 2e-5}
KINDS = {
    "published": {},
    "full query": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "no scaling": {"rope_scaling": None},
    "default scaling": {"rope_scaling": {"type": "default"}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn without mscale": {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}},
    "wide values": {"v_head_dim": 20},
    "narrow rope": {"qk_rope_head_dim": 2},
    "wide rope": {"qk_rope_head_dim": 32, "rope_scaling": YARN | {"original_max_position_embeddings": 4096}},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "every second layer": {"moe_layer_freq": 2},
    "all dense": {"first_k_dense_replace": 3},
    "experts from the start": {"first_k_dense_replace": 0},
}
WAYS = {
    "latents": ("eager", ON_LATENTS),
    "expanded, eager": ("eager", ON_EXPANDED),
    "expanded, sdpa": ("sdpa", ON_EXPANDED),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def text_model(way=("eager", None), seed=0, dtype=torch.float64, **changes):
    return make_model(attn=way[0], few_queries=way[1], seed=seed, dtype=dtype, vision=False, **changes)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@every_way
@torch.no_grad()
def test_logits_against_the_plain_model(kind, way):
    if "yarn" in str(kind) and kind["rope_scaling"]["mscale"] == 0:
        kind = {"rope_scaling": {k: v for k, v in kind["rope_scaling"].items() if "mscale" not in k} | {"attention_factor": 1.0}}
    model = text_model(way, **kind)
    ids = words(1, 13)
    torch.testing.assert_close(model(input_ids=ids).logits[0], plain_logits(model, ids[0]), **NEAR)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_lower_precision_is_near(way, dtype):
    ids = words(2, 20)
    exact = text_model(way)(input_ids=ids).logits
    logits = text_model(way, dtype=dtype)(input_ids=ids).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    limit = 1e-4 if dtype == torch.float32 else 0.15
    assert (logits.double() - exact).abs().mean() < limit * exact.abs().mean()


def test_norm():
    norm, x = fill(KimiK26RMSNorm(12, 1e-5)), torch.randn(3, 12)
    torch.testing.assert_close(norm(x), plain_rms(x, norm.weight, 1e-5))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert norm(torch.zeros(1, 12).bfloat16()).isfinite().all()


def test_rotation_turns_interleaved_pairs():
    x, angles = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    turned = rotate_pairs(x, angles.cos(), angles.sin())
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.view_as_real(as_complex).flatten(-2))
    assert torch.autograd.gradcheck(lambda x: rotate_pairs(x, angles.cos(), angles.sin()), (x.requires_grad_(),))


@pytest.mark.parametrize("kind", ["published", "no scaling", "default scaling", "linear", "wide rope"])
def test_angles(kind):
    config = KimiK26Config(**config_dict(vision=False, **KINDS[kind])).text_config
    cos, sin = KimiK26RotaryEmbedding(config)(torch.tensor([[0, 1, 5, 100]]))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 4, config.qk_rope_head_dim // 2)
    expected = torch.tensor([[p * f for f in plain_frequencies(config)] for p in (0, 1, 5, 100)], dtype=torch.float64)
    torch.testing.assert_close(cos[0].double(), expected.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0].double(), expected.sin(), rtol=0, atol=1e-5)


def test_plain_frequencies_are_those_of_the_library():
    # Linear scaling by 1 is the library's own computation of them; near position 200,000 a last bit would show.
    def angles(rope):
        config = KimiK26Config(**config_dict(vision=False, qk_rope_head_dim=16, rope_scaling=rope)).text_config
        return KimiK26RotaryEmbedding(config)(torch.tensor([[3, 199_999]]))

    for plain, scaled in zip(angles(None), angles({"type": "linear", "factor": 1.0})):
        assert torch.equal(plain, scaled)


def test_angles_do_not_depend_on_the_dtype_of_the_model():
    model, positions = text_model(), torch.tensor([[199_987]])
    before = model.language_model.model.rotary_emb(positions)
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        after = cast(copy.deepcopy(model)).language_model.model.rotary_emb(positions)
        assert torch.equal(before[0], after[0]) and after[0].dtype == torch.float32


@every_way
@torch.no_grad()
def test_long_inputs_in_blocks(way, monkeypatch):
    """Blocks of scores and heads so small that every loop runs more than once."""
    model, ids = text_model(way), words(2, 24)
    whole = model(input_ids=ids).logits
    monkeypatch.setattr(attention_kimi_k26, "SCORE_BLOCK", 200)
    monkeypatch.setattr(attention_kimi_k26, "EXPANSION_BLOCK", 1200)
    torch.testing.assert_close(model(input_ids=ids).logits, whole)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :7] = 0
    in_blocks = model(input_ids=ids, attention_mask=mask).logits
    monkeypatch.undo()
    torch.testing.assert_close(in_blocks[0], whole[0])
    torch.testing.assert_close(in_blocks, model(input_ids=ids, attention_mask=mask).logits)


@every_way
@pytest.mark.parametrize("positions", ["given", "counted"])
@torch.no_grad()
def test_padded_batches(way, positions):
    model = text_model(way)
    rows = [words(length, seed=length) for length in (5, 9, 12)]
    for side in ("left", "right"):
        pads = [(12 - len(row), 0) if side == "left" else (0, 12 - len(row)) for row in rows]
        ids = torch.stack([F.pad(row, pad, value=99) for row, pad in zip(rows, pads)])
        mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads)])
        given = {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)} if positions == "given" else {}
        logits = model(input_ids=ids, attention_mask=mask, **given).logits
        assert logits.isfinite().all()
        for row, kept, out in zip(rows, mask, logits):
            torch.testing.assert_close(out[kept.bool()], plain_logits(model, row), **NEAR)


@every_way
@torch.no_grad()
def test_packed_sequences(way):
    """Positions that start again begin another text, as `DataCollatorWithFlattening` packs them."""
    model = text_model(way)
    rows = [words(length, seed=length) for length in (4, 7, 1, 5)]
    ids = torch.cat(rows).unsqueeze(0)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    expected = torch.cat([plain_logits(model, row) for row in rows])
    for use_cache in (False, True):
        logits = model(input_ids=ids, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(logits[0], expected, **NEAR)
    logits = model(input_ids=ids, position_ids=positions, past_key_values=DynamicCache()).logits  # one text with gaps
    torch.testing.assert_close(logits[0], plain_logits(model, ids[0], positions=positions[0].tolist()), **NEAR)


@every_way
@torch.no_grad()
def test_masks_of_four_axes(way):
    model, ids = text_model(way), words(1, 10)
    visible = torch.ones(10, 10, dtype=torch.bool).tril()
    visible[6:, 1:4] = False
    visible[3, :3] = False
    expected = plain_logits(model, ids[0], visible=visible)
    assert (expected - plain_logits(model, ids[0])).abs().max() > 0.1
    added = torch.zeros(10, 10, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    for mask in (visible, added, added.float(), added.clamp(min=float("-inf")).masked_fill(~visible, float("-inf"))):
        logits = model(input_ids=ids, attention_mask=mask[None, None]).logits
        torch.testing.assert_close(logits[0], expected, **NEAR)
    forward = torch.ones(10, 10, dtype=torch.bool)  # a mask of four axes decides alone, even to look ahead
    logits = model(input_ids=ids, attention_mask=forward[None, None]).logits
    torch.testing.assert_close(logits[0], plain_logits(model, ids[0], visible=forward), **NEAR)


@every_way
@torch.no_grad()
def test_far_and_uneven_positions(way):
    model, ids = text_model(way, max_position_embeddings=262144), words(1, 8)
    positions = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    torch.testing.assert_close(model(input_ids=ids, position_ids=positions).logits, model(input_ids=ids).logits, **NEAR)
    gaps = torch.tensor([[0, 2, 3, 7, 8, 9, 20, 21]])
    mask = torch.ones_like(ids)  # a mask says that gaps are gaps, not new texts
    logits = model(input_ids=ids, position_ids=gaps, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], plain_logits(model, ids[0], positions=gaps[0].tolist()), **NEAR)


@pytest.mark.parametrize("way", list(WAYS.values())[:2], ids=list(WAYS)[:2])
def test_gradients_of_attention(way):
    """Both ways to attend, against finite differences in float64; input, latents' and expansion's weights."""
    model = text_model(way)
    attention, rotary = model.language_model.model.layers[1].self_attn, model.language_model.model.rotary_emb
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    angles = rotary(torch.arange(5).unsqueeze(0))
    names = ["q_a_proj.weight", "q_a_layernorm.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    def call(x, *weights):
        span = AttentionSpan(torch.arange(5), 0, mask)
        return torch.func.functional_call(attention, dict(zip(names, weights)), (x, angles, span))[0]

    weights = [attention.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)


@every_way
def test_gradients_of_the_whole_model(way):
    """The slope of the loss along a random direction through all weights, by finite differences in float64."""
    model, ids = text_model(way), words(2, 9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]

    def loss():  # the library's own would round the logits to float32
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    slopes = [(p.grad * d).sum() for p, d in zip(parameters, direction) if p.grad is not None]

    @torch.no_grad()
    def loss_at(step):
        for parameter, d in zip(parameters, direction):
            parameter += step * d
        value = loss()
        for parameter, d in zip(parameters, direction):
            parameter -= step * d
        return value

    step = 1e-6
    torch.testing.assert_close((loss_at(step) - loss_at(-step)) / (2 * step), sum(slopes), rtol=1e-6, atol=1e-7)


# Flash attention cannot run without a GPU. What its function of the library is handed is tested with one that reads
# the arguments the same way, registered under a name of its own.


def emulated_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention by the conventions of the library's flash attention functions, in plain loops.

    The mask is `(batch, keys)`; queries are aligned with the last keys; `cu_seq_lens_q` cuts the
    flattened batch into texts or clips. Output is `(batch, queries, heads, head_dim)`.
    """
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] <= 256
    assert set(kwargs) <= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal"}
    causal = kwargs.get("is_causal", module.is_causal)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    assert attention_mask is None or attention_mask.shape == (batch, keys)
    visible = torch.ones(batch, queries, keys, dtype=torch.bool)
    if causal:
        visible &= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if attention_mask is not None:
        visible &= attention_mask[:, None].bool()
    if "cu_seq_lens_q" in kwargs:
        ends = kwargs["cu_seq_lens_q"]
        assert ends.dtype == torch.int32 and ends.tolist() == kwargs["cu_seq_lens_k"].tolist()
        assert attention_mask is None and queries == keys and int(ends[-1]) == batch * queries
        assert kwargs["max_length_q"] == int(ends.diff().max())
        part = torch.bucketize(torch.arange(batch * queries), ends[1:].long(), right=True).view(batch, queries)
        visible &= part[:, :, None] == part[:, None, :]
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            scores = query[b, h] @ key[b, h].T * scaling
            weights = scores.masked_fill(~visible[b], float("-inf")).softmax(-1).nan_to_num()
            out[b, h] = weights @ value[b, h]
    return out.transpose(1, 2), None


AttentionInterface.register("emulated_attention", emulated_attention)
FLASH = ("emulated_attention", ON_EXPANDED)


@torch.no_grad()
def test_flash_attention_gets_plain_text():
    model, ids = text_model(FLASH), words(1, 11)
    assert model.config.text_config._attn_implementation == "emulated_attention"
    torch.testing.assert_close(model(input_ids=ids).logits[0], plain_logits(model, ids[0]), **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_flash_attention_gets_padding(side):
    model, row = text_model(FLASH), words(6)
    pad = (5, 0) if side == "left" else (0, 5)
    ids = torch.stack((F.pad(row, pad, value=99), words(11, seed=3)))
    mask = torch.stack((F.pad(torch.ones_like(row), pad), torch.ones(11, dtype=torch.long)))
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0][mask[0].bool()], plain_logits(model, row), **NEAR)
    torch.testing.assert_close(logits[1], plain_logits(model, ids[1]), **NEAR)


@torch.no_grad()
def test_flash_attention_gets_packed_texts():
    model = text_model(FLASH)
    rows = [words(length, seed=length) for length in (4, 1, 6)]
    positions = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    positions = torch.cat((positions, torch.arange(11).unsqueeze(0)))
    ids = torch.stack((torch.cat(rows), words(11, seed=9)))
    logits = model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(logits[0], torch.cat([plain_logits(model, row) for row in rows]), **NEAR)
    torch.testing.assert_close(logits[1], plain_logits(model, ids[1]), **NEAR)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_flash_attention_with_a_cache(kind):
    model, ids = text_model(FLASH), words(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    for start, stop in ((0, 6), (6, 7), (7, 12)):
        out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        torch.testing.assert_close(out.logits[1], whole[1, start:stop])
        torch.testing.assert_close(out.logits[0][mask[0, start:stop].bool()], whole[0, start:stop][mask[0, start:stop].bool()])
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    for start, stop in ((0, 6), (6, 12)):  # without padding
        out = model(input_ids=ids[:, start:stop], past_key_values=cache).logits
        torch.testing.assert_close(out[1], whole[1, start:stop])


def test_flash_attention_refuses_masks_of_four_axes():
    model = text_model(FLASH)
    with pytest.raises(ValueError, match=r"emulated_attention.*\(1, 1, 4, 4\)"):
        model(input_ids=words(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@torch.no_grad()
def test_attention_weights_of_every_way():
    ids = words(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    seen = []
    for way in WAYS.values():
        out = text_model(way)(input_ids=ids, attention_mask=mask, output_attentions=True)
        assert len(out.attentions) == 3 and all(w.shape == (2, 4, 7, 7) for w in out.attentions)
        for weights in out.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=weights.dtype))
            assert not weights.triu(1).any() and not weights[0, :, 2:, :2].any()
        seen.append(torch.stack(out.attentions))
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[2], seen[0])


def test_the_way_is_chosen_by_cost(golden):
    published = KimiK26Config.from_pretrained(golden / "vocab").text_config
    published.num_hidden_layers = 1
    with torch.device("meta"):
        few = KimiK26Attention(published, 0).few_queries
    assert 1 < few < 1024
    wide = text_model(qk_nope_head_dim=64, v_head_dim=64).language_model.model.layers[0].self_attn
    assert wide.few_queries > 10**6  # latents are cheaper for any number of queries
    assert force_attention(text_model(), 3).language_model.model.layers[0].self_attn.few_queries == 3
