"""Experts for the tests of the GPU's kernels, and what these must give: on a GPU where there is one, on Triton's interpreter elsewhere."""

import os

import pytest
import torch
from torch.nn import functional as F

from kimi_k26 import triton_kimi_k26 as kernels
from kimi_k26.experts_kimi_k26 import KimiK26MLP
from kimi_k26.triton_kimi_k26 import Blocks, ExpertTable


pytest.importorskip("triton", reason="the GPU's kernels are written in triton, which is not installed")
needs_triton = [
    pytest.mark.once,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="there is no GPU, and triton's interpreter is off",
    ),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def make_experts(count=6, hidden=160, width=96, group=32, dtype=torch.float32, seed=0) -> list[KimiK26MLP]:
    """Random experts, with INT4 words where there is a group size."""
    generator = torch.Generator().manual_seed(seed)
    experts = []
    for _ in range(count):
        expert = KimiK26MLP(hidden, width, group).requires_grad_(False)
        for projection in expert.children():
            shape = projection.out_features, projection.in_features
            weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            if group:
                projection.set_weight(weight)
            else:
                projection.weight.data = weight.to(dtype)
        experts.append(expert.to(DEVICE))
    return experts


def tensors_of(expert: KimiK26MLP) -> list[torch.Tensor]:
    return [p for name, p in expert.named_parameters() if not name.endswith("weight_shape")]


def table_of(experts) -> ExpertTable:
    return ExpertTable([expert and tensors_of(expert) for expert in experts])


def route(tokens, experts, top_k=3, seed=0):
    """Random weights and choices, each token's experts being different ones."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    return torch.rand(tokens, top_k, generator=generator).to(DEVICE), chosen.to(DEVICE)


def rows(tokens, hidden, dtype, seed=1):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def loops(experts, x, weights, chosen) -> torch.Tensor:
    """One token after the other, one expert after the other, in float64; `None` adds nothing."""
    dense = {}
    for number, expert in enumerate(experts):
        if expert is not None:
            words = hasattr(expert.gate_proj, "weight_packed")
            dense[number] = [p.dequantize(torch.float64) if words else p.weight.double() for p in expert.children()]
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, row in enumerate(x.double()):
        for weight, number in zip(weights[token].double(), chosen[token].tolist()):
            if number in dense:
                gate, up, down = dense[number]
                total[token] += weight * (down @ (F.silu(gate @ row) * (up @ row)))
    return total


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture
def small_blocks(monkeypatch):
    """Fewer and larger programs: the interpreter takes its time for each."""
    for packed in (True, False):
        monkeypatch.setitem(kernels.FEW, packed, (Blocks(64, 16 if packed else 64),) * 2)
        for way in (kernels.MANY, kernels.FULL):
            monkeypatch.setitem(way, packed, (Blocks(128, 16 if packed else 64),) * 2)
