"""Latent attention, and what it stands on: the norm, rotary positions, and who sees whom.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): each token leaves one latent and one rotary
key in the cache, shared by all heads. Few queries are answered on the latents themselves (the expansion moves into
the query and the output); many queries expand the latents to keys and values of each head, a few heads at a time.
"""

from functools import cached_property
from types import SimpleNamespace
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_kimi_k26 import write_latents
from .configuration_kimi_k26 import KimiK26TextConfig
from .decoding_kimi_k26 import apply_linear, linear, serves_attention, serves_latents, serves_norm, serves_rotation
from .experts_kimi_k26 import at_least_float32
from .native_kimi_k26 import attention, norm, read_latents, rotate
from .parallel_kimi_k26 import Peers, check_split, local


LATENT_NORM_EPS = 1e-6  # of the two norms inside attention; the config has only the layers' own
# Elements held at once by one block of scores, and by the expanded keys and values of one block of heads.
SCORE_BLOCK = 2**25
EXPANSION_BLOCK = 2**26
NATIVE_GAIN = 1.5  # by which the CPU's kernels read expanded keys faster than latents


class KimiK26RMSNorm(nn.Module):
    """`x / rms(x) * weight`, computed in float32 and returned in the dtype of `x`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if serves_norm(x, self.weight):
            return norm(x, self.weight, self.eps)
        normed = F.rms_norm(x.to(at_least_float32(x.dtype)), self.weight.shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs (0,1), (2,3), … of the last axis; computed in float32, returned in `x.dtype`.

    Args:
        x (`torch.Tensor` of shape `(..., dim)`), cos and sin (broadcastable to `(..., dim / 2)`, float32).
    """
    if serves_rotation(x, cos, sin):
        return rotate(x, cos, sin)
    first, second = x.to(at_least_float32(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class KimiK26RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles; the frequencies come from the library's own initialisers."""

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        rope = dict(config.rope_scaling or {})
        rope["rope_theta"] = config.rope_theta
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        # Both major versions of the library find here what they read: 4 the attributes, 5 `rope_parameters`.
        reads = SimpleNamespace(
            rope_theta=config.rope_theta,
            rope_scaling=rope,
            rope_parameters=rope,
            standardize_rope_params=lambda: None,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.qk_rope_head_dim,
            max_position_embeddings=config.max_position_embeddings,
        )
        with torch.device("cpu"):  # the model may be being built on `meta`
            if rope["rope_type"] == "default":
                dim = config.qk_rope_head_dim
                # The reciprocal of a power, as the library computes it: far out the last bit of a frequency shows.
                frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
                self.attention_scaling = 1.0
            else:
                frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reads, "cpu")
        # Not a buffer: it is no part of the checkpoint, and must stay float32 under any cast of the model.
        self._frequencies = {torch.device("cpu"): frequencies.float()}

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, length)` positions → cos and sin, each `(batch, length, qk_rope_head_dim / 2)` float32."""
        device = position_ids.device
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        angles = position_ids.unsqueeze(-1) * self._frequencies[device]
        cos, sin = angles.cos(), angles.sin()
        scaling = self.attention_scaling
        return (cos, sin) if scaling == 1 else (cos * scaling, sin * scaling)


class AttentionSpan:
    """Which keys each query of one forward pass may see, without holding the square of it.

    Args:
        query_index (`torch.Tensor` of shape `(queries,)`, int64): place of each query in the cache.
        first (`int`, *optional*): `query_index[0]`, where it is known without asking the device.
        attention_mask (`torch.Tensor`, *optional*): `(batch, keys)`, 0 for padding; or `(batch, 1, queries, keys)`,
            boolean (true = visible) or added to the scores, which then decides alone. `ValueError` for others of four axes.
        documents (`torch.Tensor` of shape `(batch, queries)`, *optional*): number of the packed sequence of a token.
    """

    def __init__(self, query_index, first=None, attention_mask=None, documents=None):
        self.query_index, self.first, self.documents = query_index, first, documents
        self.padding = self.given = None
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
                raise ValueError(f"an attention_mask of four axes must be boolean or floating point, not {attention_mask.dtype}")
            self.given = attention_mask
        elif attention_mask is not None:
            self.padding = attention_mask.to(torch.bool)
        self._whole, self._elsewhere = {}, {}

    def to(self, device, non_blocking: bool = False) -> "AttentionSpan":
        """The same on another device: with layers on several, the library moves what a layer is given by its `to`."""
        device = torch.device(device)
        if device == self.query_index.device:
            return self
        if device not in self._elsewhere:
            mask = self.padding if self.given is None else self.given
            moved = (t if t is None else t.to(device, non_blocking=non_blocking) for t in (mask, self.documents))
            query_index = self.query_index.to(device, non_blocking=non_blocking)
            self._elsewhere[device] = AttentionSpan(query_index, self.first, *moved)
        return self._elsewhere[device]

    @cached_property
    def begin(self) -> int:
        """`query_index[0]`; where it is not known the device is asked."""
        return int(self.query_index[0]) if self.first is None else self.first

    @cached_property
    def follows(self) -> bool:
        """Whether the queries are known to stand one after the other; main memory is looked at, another device is not asked."""
        if torch.compiler.is_dynamo_compiling() or self.query_index.device.type != "cpu":
            return self.first is not None
        places = torch.arange(self.begin, self.begin + len(self.query_index), device="cpu")
        return torch.equal(self.query_index, places)

    def knows_padding(self, batch: int, queries: int) -> bool:
        """Whether it is known of each key up to these queries' own whether it is padding."""
        return self.padding is None or self.padding.shape[0] == batch and self.padding.shape[1] >= self.begin + queries

    def is_causal(self, keys: int) -> bool:
        """Whether the whole pattern is: the last queries of `keys` tokens, each seeing all up to itself."""
        constrained = self.padding is not None or self.given is not None or self.documents is not None
        return not constrained and self.first is not None and self.first + len(self.query_index) == keys

    @cached_property
    def packing(self) -> dict:
        """Where packed sequences begin and end in the flattened batch, as flash attention functions take it."""
        if self.documents is None:
            return {}
        begins = F.pad(self.documents.diff(dim=-1) != 0, (1, 0), value=True).flatten()
        ends = F.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
        longest = int(ends.diff().max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def rows(self, start: int, stop: int, keys: int) -> Optional[torch.Tensor]:
        """What queries `start … stop` see of the first `keys` keys.

        Returns:
            `None` where they see all; else `(batch or 1, 1, stop - start, keys)`, boolean (true = visible) or, if the
            mask given was one to add, floating point.
        """
        if self.is_causal(keys) and stop - start == 1 and self.first + start == keys - 1:
            return None
        whole = (start, stop) == (0, len(self.query_index))
        if whole and keys in self._whole:
            return self._whole[keys]
        rows = self._rows(start, stop, keys)
        if whole:  # every layer asks for the same
            self._whole[keys] = rows
        return rows

    def _rows(self, start, stop, keys):
        if self.given is not None:
            return self.given[:, :, start:stop, :keys]
        query = self.query_index[start:stop].unsqueeze(-1)
        key = torch.arange(keys, device=query.device)
        visible = (key <= query)[None, None]
        if self.documents is not None:
            same = self.documents[:, start:stop, None] == self.documents[:, None, :]
            visible = visible & same.unsqueeze(1)
        if self.padding is not None:
            known = F.pad(self.padding, (0, max(0, keys - self.padding.shape[1])), value=True)[:, :keys]
            # Padding sees itself, so that no row of the softmax is empty and no NaN is made.
            visible = visible & known[:, None, None, :] | (key == query)[None, None]
        return visible


def add_mask(scores: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """`scores` with what must not be seen at the lowest value of their dtype."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask.to(scores.dtype)


def current_weight(linear: nn.Module) -> torch.Tensor:
    """The weight, `(outputs, inputs)`, by which a bias-free linear layer multiplies now.

    A layer that is wrapped (adapters) or whose weight is elsewhere until it is called (offloading hooks) is asked for
    it: its answer to the unit matrix is its weight, transposed.
    """
    if type(linear) is nn.Linear and not hasattr(linear, "_hf_hook"):
        return local(linear.weight)
    reference = next(linear.parameters())
    dtype = reference.dtype if reference.dtype.is_floating_point else torch.get_default_dtype()
    device = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)
    device = reference.device if device is None else device
    return linear(torch.eye(linear.in_features, dtype=dtype, device=device)).transpose(0, 1)


class KimiK26Attention(nn.Module):
    """Multi-head latent attention over an ordinary cache of the library that holds latents and rotary keys."""

    def __init__(self, config: KimiK26TextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.scaling = config.kv_lora_rank, config.softmax_scale
        self.is_causal = True  # read by the library's attention functions
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = KimiK26RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = KimiK26RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=bias)
        # A query costs 2·rank + rope per key on latents and nope + rope + v_dim on expanded keys and values, whose
        # expansion costs rank · (nope + v_dim) per key, once: below this many queries the latents are cheaper.
        saved = 2 * self.rank - self.nope - self.v_dim
        self.few_queries = self.rank * (self.nope + self.v_dim) // saved if saved > 0 else torch.iinfo(torch.int64).max
        self.peers: Optional[Peers] = None  # the processes that have the heads, where those are several

    def split(self, peers: Peers):
        """Keep the heads of this process alone; latents, and so the cache, are every process's own."""
        check_split(self.config, peers.size)
        self.peers, self.heads = peers, len(peers.mine(self.heads))

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        span: AttentionSpan,
        past_key_values: Optional[Cache] = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        Args:
            x (`torch.Tensor` of shape `(batch, queries, hidden_size)`).
            rotary: cos and sin, each `(batch, queries, qk_rope_head_dim / 2)` float32.

        Returns:
            output, as `x`; and the attention weights `(batch, heads, queries, keys)`, if asked for.
        """
        cos, sin = (part.unsqueeze(2) for part in rotary)
        if self.config.q_lora_rank is None:
            query = apply_linear(self.q_proj, x)
        else:
            query = apply_linear(self.q_b_proj, self.q_a_layernorm(apply_linear(self.q_a_proj, x)))
        query = query.unflatten(-1, (self.heads, -1))  # (batch, queries, heads, nope + rope)
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)
        query_rope = rotate_pairs(query_rope, cos, sin)

        latent, rotary_key = apply_linear(self.kv_a_proj_with_mqa, x).split([self.rank, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)  # (batch, 1, queries, rank)
        rotary_key = rotate_pairs(rotary_key.unsqueeze(2), cos, sin).transpose(1, 2)
        if self.peers is not None:
            latent, rotary_key = self.peers.sum_gradients(latent, rotary_key)
        if past_key_values is not None:
            latent, rotary_key = write_latents(past_key_values, self.layer_idx, latent, rotary_key, span.query_index)
        latent, rotary_key = latent.squeeze(1), rotary_key.squeeze(1)  # (batch, keys, rank or rope)

        expansion = current_weight(self.kv_b_proj).unflatten(0, (self.heads, -1))  # (heads, nope + v_dim, rank)
        query_nope, query_rope = query_nope.transpose(1, 2), query_rope.transpose(1, 2)  # (batch, heads, queries, …)
        given = (query_nope, query_rope, latent, rotary_key, expansion, span)
        natively = not output_attentions and self.config._attn_implementation != "eager" and serves_attention(self, query_nope, latent, rotary_key, span)
        few = self.are_few(query_nope.shape[2], span.begin) if natively else query_nope.shape[2] <= self.few_queries
        if few and natively and serves_latents(self, query_nope, latent, rotary_key, expansion):
            out, weights = self.on_latents_natively(*given), None
        elif few:
            out, weights = self.on_latents(*given, output_attentions)
        elif natively:
            out, weights = self.on_expanded_natively(*given), None
        else:
            out, weights = self.on_expanded(*given, output_attentions)
        return apply_linear(self.o_proj, out.flatten(2)), weights

    def are_few(self, queries: int, past: int) -> bool:
        """Whether the native kernels answer so many queries faster over latents than over expanded keys: expanding costs as much for a
        query as for a key, so without a past nothing is saved."""
        keys, few = past + queries, self.few_queries / NATIVE_GAIN
        return queries * (few + keys) < few * keys

    def on_latents(self, query_nope, query_rope, latent, rotary_key, expansion, span, output_attentions):
        """Attention with the expansion moved into the query and the output; latents are read as they are cached."""
        batch, heads, queries, _ = query_nope.shape
        keys = latent.shape[1]
        to_key, to_value = expansion.split([self.nope, self.v_dim], dim=1)
        # One product per head, rows of all the batch together: broadcasting would copy the weights instead.
        query_latent = torch.bmm(query_nope.transpose(0, 1).flatten(1, 2), to_key)  # (heads, batch * queries, rank)
        query_latent = query_latent.unflatten(1, (batch, -1)).transpose(0, 1)
        step = queries if output_attentions else max(1, SCORE_BLOCK // (batch * heads * keys))
        outs, all_weights = [], []
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            of_rope = query_rope[:, :, start:stop].flatten(1, 2) @ rotary_key.transpose(1, 2)
            scores = torch.baddbmm(  # (batch, heads * step, keys)
                of_rope,
                query_latent[:, :, start:stop].flatten(1, 2),
                latent.transpose(1, 2),
                beta=self.scaling,
                alpha=self.scaling,
            )
            scores = add_mask(scores.unflatten(1, (heads, -1)), span.rows(start, stop, keys))
            weights = self.dropout(scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(latent.dtype))
            read = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, -1))  # (batch, heads, step, rank)
            read = torch.bmm(to_value, read.transpose(0, 1).flatten(1, 2).transpose(1, 2))  # (heads, v_dim, …)
            outs.append(read.unflatten(-1, (batch, -1)).permute(2, 0, 3, 1))
            all_weights.append(weights)
        out = torch.cat(outs, dim=2).transpose(1, 2)
        return out, all_weights[0] if output_attentions else None

    def on_latents_natively(self, query_nope, query_rope, latent, rotary_key, expansion, span):
        """The same by the CPU's own kernel."""
        queries = query_nope.transpose(1, 2), query_rope.transpose(1, 2)
        return read_latents(*queries, latent, rotary_key, expansion, span.begin, span.padding, self.scaling)

    def on_expanded_natively(self, query_nope, query_rope, latent, rotary_key, expansion, span):
        """Attention over expanded keys and values by the CPU's own kernel, which needs neither joined keys nor padded values."""
        seen = span.begin + query_nope.shape[2]  # a static cache is longer
        latent, rotary_key = latent[:, :seen], rotary_key[:, :seen]
        step = max(1, EXPANSION_BLOCK // (latent.shape[0] * seen * (self.nope + self.v_dim)))
        query_nope, query_rope, outs = query_nope.transpose(1, 2), query_rope.transpose(1, 2), []
        for start in range(0, self.heads, step):
            some = slice(start, start + step)
            key, value = self.expand(latent, expansion[some])
            given = (query_nope[:, :, some], query_rope[:, :, some], key, rotary_key, value)
            outs.append(attention(*given, span.begin, span.padding, self.scaling))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def on_expanded(self, query_nope, query_rope, latent, rotary_key, expansion, span, output_attentions):
        """Attention over the keys and values of each head, expanded for as many heads at a time as fit the block."""
        implementation = self.config._attn_implementation
        per_head = latent.shape[0] * latent.shape[1] * 2 * (self.nope + self.rope)
        query = torch.cat((query_nope, query_rope), dim=-1)
        step = self.heads if output_attentions else max(1, EXPANSION_BLOCK // per_head)
        outs, all_weights = [], []
        for start in range(0, self.heads, step):
            some = slice(start, start + step)
            key, value = self.expand(latent, expansion[some])
            key_rope = rotary_key.unsqueeze(2).expand(-1, -1, key.shape[2], -1)
            key, value = torch.cat((key, key_rope), dim=-1).transpose(1, 2), value.transpose(1, 2)
            if implementation in (None, "eager") or output_attentions:
                out, weights = self.eager(query[:, some], key, value, span, output_attentions)
            elif implementation == "sdpa":
                out, weights = self.sdpa(query[:, some], key, value, span), None
            else:
                out, weights = self.library_attention(implementation, query[:, some], key, value, span)
            outs.append(out)
            all_weights.append(weights)
        return torch.cat(outs, dim=2), all_weights[0] if output_attentions else None

    def expand(self, latent, expansion):
        """Latents → keys `(batch, keys, heads, nope)`, but for their rotary part, and values `(batch, keys, heads, v_dim)`."""
        expanded = linear(latent, expansion.flatten(0, 1)).unflatten(-1, (len(expansion), -1))
        return expanded.split([self.nope, self.v_dim], dim=-1)

    def eager(self, query, key, value, span, output_attentions):
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        step = queries if output_attentions else max(1, SCORE_BLOCK // (batch * heads * keys))
        outs = []
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            scores = query[:, :, start:stop] @ key.transpose(-1, -2) * self.scaling
            scores = add_mask(scores, span.rows(start, stop, keys))
            weights = self.dropout(scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(value.dtype))
            outs.append(weights @ value)
        return torch.cat(outs, dim=2).transpose(1, 2), weights if output_attentions else None

    def sdpa(self, query, key, value, span):
        """PyTorch's fused attention; it wants values as wide as keys to be fused at all."""
        batch, _, queries, _ = query.shape
        keys = key.shape[2]
        value = self.as_wide_as(key, value)
        options = {"scale": self.scaling, "dropout_p": self.config.attention_dropout if self.training else 0.0}
        if span.is_causal(keys) and queries == keys:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        else:
            step = max(1, SCORE_BLOCK // (batch * keys))
            outs = []
            for start in range(0, queries, step):
                stop = min(start + step, queries)
                mask = span.rows(start, stop, keys)
                if mask is not None and mask.dtype != torch.bool:
                    mask = mask.to(query.dtype)
                block = query[:, :, start:stop]
                outs.append(F.scaled_dot_product_attention(block, key, value, attn_mask=mask, **options))
            out = torch.cat(outs, dim=2)
        return out[..., : self.v_dim].transpose(1, 2)

    def library_attention(self, implementation, query, key, value, span):
        """The library's flash attention functions, which take padding as `(batch, keys)` and know the rest."""
        if span.given is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} takes an attention_mask of (batch, keys), got "
                f"{tuple(span.given.shape)}; use 'sdpa' or 'eager' for masks of four axes"
            )
        seen = int(span.query_index[-1]) + 1  # a static cache is longer than what it holds
        key, value = key[:, :, :seen], value[:, :, :seen]
        out, weights = ALL_ATTENTION_FUNCTIONS[implementation](
            self,
            query,
            key,
            self.as_wide_as(key, value),
            span.padding,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **span.packing,
        )
        return out[..., : self.v_dim], weights

    @staticmethod
    def as_wide_as(key, value):
        return F.pad(value, (0, key.shape[-1] - value.shape[-1])) if key.shape[-1] > value.shape[-1] else value

    def dropout(self, weights):
        return F.dropout(weights, self.config.attention_dropout, self.training)
