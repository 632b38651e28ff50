"""Router and experts: which feed-forward networks a token passes through, and the products themselves."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_kimi_k26 import KimiK26TextConfig
from .quantization_kimi_k26 import KeepDtype, KimiK26Int4Linear


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, in which norms, softmax, router and sums are computed; float64 where the model itself is in float64."""
    return torch.promote_types(dtype, torch.float32)


class KimiK26MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`: a dense layer's network, a shared expert, or one routed expert.

    Args:
        hidden_size (`int`), intermediate_size (`int`): widths.
        group_size (`int`, *optional*): inputs per scale when the three weights are INT4 words; `None` for plain ones.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, group_size: int | None = None):
        super().__init__()

        def linear(inputs, outputs):
            if group_size is None:
                return nn.Linear(inputs, outputs, bias=False)
            return KimiK26Int4Linear(inputs, outputs, group_size)

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KimiK26Router(KeepDtype):
    """Scores every expert for every token and picks the experts of each.

    The choice follows `sigmoid(logits) + e_score_correction_bias`; the weights are the plain scores of the chosen
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2: the bias balances load and carries no gradient). With `n_group`
    above 1 only the `topk_group` groups with the largest sum of their two best choices take part.
    """

    kept = ("e_score_correction_bias",)

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalize, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            x (`torch.Tensor` of shape `(tokens, hidden_size)`).

        Returns:
            logits `(tokens, experts)` float32, weights `(tokens, top_k)` float32, chosen `(tokens, top_k)` int64.
        """
        dtype = at_least_float32(x.dtype)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            grouped = choice.unflatten(-1, (self.n_group, -1))  # (tokens, groups, experts of a group)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1, sorted=False).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scaling, chosen


class KimiK26Experts(nn.ModuleList):
    """The routed experts of one layer, each a [`KimiK26MLP`] under its number."""

    def __init__(self, config: KimiK26TextConfig):
        sizes = (config.hidden_size, config.moe_intermediate_size, config.int4_group_size)
        super().__init__(KimiK26MLP(*sizes) for _ in range(config.n_routed_experts))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, added up in float32 in the order of the experts' numbers.

        Args:
            x (`torch.Tensor` of shape `(tokens, hidden_size)`).
            weights (`torch.Tensor` of shape `(tokens, top_k)`, float32), chosen (same shape, int64).

        Returns:
            `torch.Tensor` of shape `(tokens, hidden_size)` in the dtype of `x`.
        """
        # Sort the (token, choice) pairs by expert, so that each expert sees its tokens as one matrix.
        by_expert = chosen.flatten().argsort(stable=True)
        tokens, factors = by_expert // chosen.shape[1], weights.flatten()[by_expert].unsqueeze(-1)
        counts = torch.bincount(chosen.flatten(), minlength=len(self)).tolist()
        total, start = torch.zeros_like(x, dtype=at_least_float32(x.dtype)), 0
        for expert, count in zip(self, counts):
            if count:
                rows = tokens[start : start + count]
                out = expert(x[rows]).to(total.dtype)
                total = total.index_add(0, rows, out * factors[start : start + count])
                start += count
        return total.to(x.dtype)


class KimiK26MoE(nn.Module):
    """Routed experts plus the shared one, which every token passes through."""

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.gate = KimiK26Router(config)
        self.experts = KimiK26Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = KimiK26MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, length, hidden_size)` → the same, and the router's logits `(batch * length, experts)` float32."""
        flat = x.flatten(0, 1)
        logits, weights, chosen = self.gate(flat)
        out = self.experts(flat, weights, chosen)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view_as(x), logits
