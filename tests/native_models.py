"""Small models for the tests of the native kernels, and all kinds of these."""

import functools

import pytest
import torch
from transformers import DynamicCache

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, decoding_kimi_k26, experts_kimi_k26, graph_kimi_k26, native_kimi_k26
from kimi_k26.attention_kimi_k26 import AttentionSpan
from kimi_k26.cache_kimi_k26 import layer_of
from kimi_k26.native_kimi_k26 import library

from .tiny_models import config_dict, fill


needs_kernels = pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")

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
KINDS = {"tiles": "#define TILES\n", "bfloat16": "#define BFLOAT16_PRODUCTS\n", "integers": "#undef __AVX512BF16__\n"}
compile_kind = functools.cache(lambda kind: native_kimi_k26.load(KINDS[kind] + native_kimi_k26.SOURCE))


def use_kernels(monkeypatch, kind: str):
    assert compile_kind(kind) is not None
    for module in (native_kimi_k26, decoding_kimi_k26, experts_kimi_k26, graph_kimi_k26):
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
