"""Router and experts against loops over tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

from kimi_k26 import KimiK26Config
from kimi_k26.experts_kimi_k26 import KimiK26Experts, KimiK26MLP, KimiK26MoE, KimiK26Router
from kimi_k26.tests.tiny_models import config_dict, fill


def text_config(**text):
    return KimiK26Config(**config_dict(vision=False, **text)).text_config


def random_moe(seed=0, dtype=None, **text) -> KimiK26MoE:
    moe = fill(KimiK26MoE(text_config(**text)), seed)
    return moe if dtype is None else moe.to(dtype)


def plain_choice(config, scores: list[float], bias: list[float]) -> dict[int, float]:
    """Experts of one token and their weights, in Python numbers."""
    choice = [s + b for s, b in zip(scores, bias)]
    size = len(scores) // config.n_group
    groups = []
    for group in range(config.n_group):
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)[:2]
        groups.append((sum(best), group))
    kept = {group for _, group in sorted(groups, reverse=True)[: config.topk_group]}
    allowed = [i for i in range(len(scores)) if config.n_group == 1 or i // size in kept]
    chosen = sorted(allowed, key=lambda i: choice[i], reverse=True)[: config.num_experts_per_tok]
    weights = {i: scores[i] for i in chosen}
    if config.norm_topk_prob:
        total = sum(weights.values()) + 1e-20
        weights = {i: w / total for i, w in weights.items()}
    return {i: w * config.routed_scaling_factor for i, w in weights.items()}


def weight_of(linear, dtype):
    return linear.weight if hasattr(linear, "weight") else linear.dequantize(dtype)


def plain_mlp(mlp: KimiK26MLP, x: torch.Tensor) -> torch.Tensor:
    gate = weight_of(mlp.gate_proj, x.dtype) @ x
    return weight_of(mlp.down_proj, x.dtype) @ (gate / (1 + (-gate).exp()) * (weight_of(mlp.up_proj, x.dtype) @ x))


def plain_moe(moe: KimiK26MoE, config, x: torch.Tensor) -> torch.Tensor:
    """One token after the other, one expert after the other; `(tokens, hidden)` → the same."""
    outs = []
    for row in x:
        logits = (moe.gate.weight @ row).tolist()
        scores = [1 / (1 + math.exp(-v)) for v in logits]
        out = torch.zeros_like(row)
        for expert, weight in plain_choice(config, scores, moe.gate.e_score_correction_bias.tolist()).items():
            out = out + weight * plain_mlp(moe.experts[expert], row)
        if config.n_shared_experts:
            out = out + plain_mlp(moe.shared_experts, row)
        outs.append(out)
    return torch.stack(outs)


KINDS = {
    "published": {},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "one group of two": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "not normalised": {"norm_topk_prob": False},
    "no shared": {"n_shared_experts": 0},
    "shared absent": {"n_shared_experts": None},
    "two shared": {"n_shared_experts": 2},
    "all experts": {"num_experts_per_tok": 8},
    "one expert": {"num_experts_per_tok": 1},
    "scaling": {"routed_scaling_factor": 0.5},
    "int4": {"quantized": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_moe_against_loops(kind, dtype):
    config = text_config(**kind)
    moe = random_moe(dtype=dtype, **kind)
    x = torch.randn(2, 9, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out, logits = moe(x)
    expected = plain_moe(moe, config, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(logits, (x.flatten(0, 1) @ moe.gate.weight.T).to(logits.dtype))


def test_the_bias_moves_the_choice_and_not_the_weights():
    router = fill(KimiK26Router(text_config()))
    x = torch.randn(6, 32)
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 9, 0, 0, 0, 0, 9]))
    logits, weights, chosen = router(x)
    assert all(sorted(row) == [0, 2, 7] for row in chosen.tolist())
    scores = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True) * 2.827)
    assert weights.dtype == logits.dtype == torch.float32


def test_the_router_works_in_float32_under_low_precision():
    router = fill(KimiK26Router(text_config()), seed=3)
    x = torch.randn(64, 32).bfloat16()
    low = router.bfloat16()
    assert low.e_score_correction_bias.dtype == torch.float32
    logits, weights, _ = low(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, F.linear(x.float(), low.weight.float()))


@pytest.mark.parametrize("tokens", [0, 1, 2, 50])
@torch.no_grad()
def test_any_number_of_tokens(tokens):
    moe = random_moe()
    x = torch.randn(1, tokens, 32)
    out, logits = moe(x)
    assert out.shape == x.shape and logits.shape == (tokens, 8)
    each = [moe(row[None, None])[0] for row in x[0]]
    if each:
        torch.testing.assert_close(out, torch.cat(each, dim=1))


@torch.no_grad()
def test_low_precision_is_near():
    exact, low = random_moe(), random_moe(dtype=torch.bfloat16)
    x = torch.randn(1, 40, 32)
    out, _ = low(x.bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    near = (out.float() - exact(x)[0]).abs().mean() / exact(x)[0].abs().mean()
    assert near < 0.1


def test_an_expert_without_tokens_is_not_asked():
    experts = KimiK26Experts(text_config())
    experts[5].forward = None  # would raise when called
    chosen = torch.tensor([[0, 1, 2], [3, 4, 6]])
    assert experts(torch.randn(2, 32), torch.ones(2, 3), chosen).shape == (2, 32)


@pytest.mark.parametrize("kind", ["published", "groups", "not normalised", "int4"])
def test_gradients(kind):
    """Finite differences in float64, of the input, and of router and expert weights where they can be trained."""
    moe = random_moe(dtype=torch.float64, **KINDS[kind])
    x = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    names = ["gate.weight", "experts.0.gate_proj.weight", "experts.3.down_proj.weight", "shared_experts.up_proj.weight"]
    trained = {n: p.detach().requires_grad_() for n, p in moe.named_parameters() if n in names}
    assert len(trained) == (2 if kind == "int4" else 4)

    def call(x, *weights):
        return torch.func.functional_call(moe, dict(zip(trained, weights)), (x,))

    assert torch.autograd.gradcheck(call, (x, *trained.values()), eps=1e-6, atol=1e-6, fast_mode=True)
    moe(x)[0].sum().backward()
    assert moe.gate.e_score_correction_bias.grad is None and not moe.gate.e_score_correction_bias.requires_grad


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, [0]),
        ({"first_k_dense_replace": 0}, []),
        ({"first_k_dense_replace": 3}, [0, 1, 2]),
        ({"moe_layer_freq": 2}, [0, 1]),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, [1]),
        ({"n_routed_experts": None}, [0, 1, 2]),
    ],
)
def test_which_layers_have_experts(changes, dense):
    config = text_config(**changes)
    assert [i for i in range(3) if not config.is_moe_layer(i)] == dense
