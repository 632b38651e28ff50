"""Where the native kernels take the place of PyTorch's operations: above all one new token per row through a layer."""

import ctypes
import threading
from typing import Optional
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache, StaticLayer

from .cache_kimi_k26 import LatentLayer, layer_of
from .native_kimi_k26 import (
    INPUTS,
    MOST_ROWS,
    Attention,
    FeedForward,
    Latents,
    Layer,
    Step,
    addresses,
    few_rows,
    i64,
    is_plain,
    knows_group,
    library,
)


# The modules whose sums the kernels know. By name: in version 5 of the library each entry module has classes of its own.
KNOWN = {f"KimiK26{name}" for name in ("Attention", "Experts", "Int4Linear", "MLP", "MoE", "RMSNorm", "Router")} | {"Linear"}


class NativeLayer:
    """What the native kernels must know of one decoder layer: the addresses of its weights, while they stay there.

    Args:
        layer (`KimiK26DecoderLayer`): with `self_attn`, `mlp` and its two norms.

    Attributes:
        fits (`bool`): whether the kernels can compute this layer: bfloat16 weights in main memory, fitting widths.
    """

    def __init__(self, layer: nn.Module):
        self.layer, self.fits = layer, layer.self_attn.peers is None
        self._modules: list[tuple[dict, str, nn.Module]] = []  # where each module must be found again
        self._tensors: list[tuple[dict, str, int]] = []  # and each weight
        attention, mlp = self._own(layer, "self_attn"), self._own(layer, "mlp")
        self.has_experts = hasattr(mlp, "experts")
        if self.has_experts:
            self.fits &= [device for device, _ in mlp.experts.shares] == [None]
        self.attention = self._describe_attention(attention)
        self.feed_forward = self._describe_feed_forward(mlp)
        self.fits &= self.is_current()

    def _own(self, parent: nn.Module, name: str) -> nn.Module:
        module = parent._modules[name]
        self.fits &= type(module).__name__ in KNOWN
        self._modules.append((parent._modules, name, module))
        return module

    def _weight(self, parent: nn.Module, module: str, name: str = "weight"):
        """The address of a parameter, or `None` where there is none."""
        parameters = self._own(parent, module)._parameters
        parameter = parameters.get(name)
        if parameter is None:
            return None
        dtype = torch.float32 if name == "e_score_correction_bias" else torch.bfloat16
        self.fits &= parameter.dtype == dtype and parameter.is_contiguous() and parameter.device.type == "cpu"
        self._tensors.append((parameters, name, parameter.data_ptr()))
        return parameter.data_ptr()

    def _describe_attention(self, attention: nn.Module) -> Attention:
        config = attention.config
        self.fits &= config.hidden_size % INPUTS == attention.rank % INPUTS == 0
        self.fits &= attention.nope % 2 == attention.rope % 2 == attention.v_dim % 4 == 0
        described = Attention(
            norm=self._weight(self.layer, "input_layernorm"),
            kv_a=self._weight(attention, "kv_a_proj_with_mqa"),
            kv_a_bias=self._weight(attention, "kv_a_proj_with_mqa", "bias"),
            kv_a_norm=self._weight(attention, "kv_a_layernorm"),
            kv_b=self._weight(attention, "kv_b_proj"),
            o=self._weight(attention, "o_proj"),
            o_bias=self._weight(attention, "o_proj", "bias"),
            hidden=config.hidden_size,
            heads=attention.heads,
            nope=attention.nope,
            rope=attention.rope,
            v=attention.v_dim,
            rank=attention.rank,
            eps=self.layer.input_layernorm.eps,
            latent_eps=attention.kv_a_layernorm.eps,
            scale=attention.scaling,
        )
        if config.q_lora_rank is None:
            described.q_b = self._weight(attention, "q_proj")
        else:
            described.q_lora = config.q_lora_rank
            described.q_a = self._weight(attention, "q_a_proj")
            described.q_a_bias = self._weight(attention, "q_a_proj", "bias")
            described.q_a_norm = self._weight(attention, "q_a_layernorm")
            described.q_b = self._weight(attention, "q_b_proj")
        return described

    def _describe_feed_forward(self, mlp: nn.Module) -> FeedForward:
        config = self.layer.self_attn.config
        norm = self._weight(self.layer, "post_attention_layernorm")
        described = FeedForward(norm=norm, hidden=config.hidden_size, eps=self.layer.post_attention_layernorm.eps)
        network = mlp
        if self.has_experts:
            router, group = mlp.gate, config.int4_group_size or 0
            self._own(mlp, "experts")
            self.fits &= config.moe_intermediate_size % (group or INPUTS) == 0 and knows_group(group)
            described.router = self._weight(mlp, "gate")
            described.bias = self._weight(mlp, "gate", "e_score_correction_bias")
            described.experts, described.top_k = config.n_routed_experts, router.top_k
            described.groups, described.top_groups = router.n_group, router.topk_group
            described.normalize, described.scaling = router.normalize, router.scaling
            described.expert_width, described.group_size = config.moe_intermediate_size, group
            network = None if mlp.shared_experts is None else self._own(mlp, "shared_experts")
        if network is not None:
            for name in ("gate", "up", "down"):
                setattr(described, name, self._weight(network, f"{name}_proj"))
            described.width = network.gate_proj.out_features
        return described

    def is_current(self) -> bool:
        """Whether every weight is where it was, in modules that do no more than their class says."""
        # Asked for every token: plain loops, which take half the time of `all`.
        for modules, name, module in self._modules:
            if modules.get(name) is not module or not is_plain(module):
                return False
        for parameters, name, at in self._tensors:
            if parameters[name].data_ptr() != at:
                return False
        return True

    def extend(self, cache: Cache, x: torch.Tensor, span) -> "Place":
        """One more place for each row in the cache of this layer."""
        layer = layer_of(cache, self.layer.self_attn.layer_idx)
        if isinstance(layer, LatentLayer):
            past = layer.extend(x, (self.attention.rank, self.attention.rope), 1)
        else:
            past = int(span.query_index[0])
            count_one(layer)
        return layer.keys, layer.values, past


Place = tuple[torch.Tensor, torch.Tensor, int]  # latents and rotary keys of a layer, and how many tokens are before the new one


def count_one(layer: StaticLayer):
    """Tell a static layer that it holds one token more: transformers 5 counts."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length.add_(1)


class NativeDecoder:
    """One new token for each row through decoder layers, in one call of the native kernels.

    Args:
        layers (`list[KimiK26DecoderLayer]`): neighbours; or one alone.

    Attributes:
        fits (`bool`): whether the kernels can compute these layers.
    """

    def __init__(self, layers: list[nn.Module]):
        self.parts = [NativeLayer(layer) for layer in layers]
        self.fits = all(part.fits for part in self.parts)
        self.calls = (Layer * len(layers))()
        self._turn = threading.Lock()  # for the calls and what is known of experts, which a run sets and reads
        self.experts = [part.layer.mlp.experts for part in self.parts if part.has_experts]
        found = iter(self.experts)
        for call, part in zip(self.calls, self.parts):
            call.attention, call.feed_forward = part.attention, part.feed_forward
            if part.has_experts:
                call.experts = next(found).known.address

    def __reduce__(self):
        return type(None), ()  # addresses are no good in a copy

    def is_current(self) -> bool:
        """Whether the layers are as they were; what happens to single experts is seen at the next prompt."""
        return all(part.is_current() for part in self.parts)

    def __call__(self, x: torch.Tensor, rotary, span, past_key_values: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` `(batch, 1, hidden_size)` bfloat16 → the same after the layers, and the routers' logits of each that routes."""
        return self.run(x, rotary, span.padding, [part.extend(past_key_values, x, span) for part in self.parts])

    def run(self, x: torch.Tensor, rotary, padding: Optional[torch.Tensor], places: list[Place]):
        """The same where the caches have made room already. Threads that share the model wait for each other here."""
        with self._turn:
            return self._run(x, rotary, padding, places)

    def _run(self, x: torch.Tensor, rotary, padding: Optional[torch.Tensor], places: list[Place]):
        rows, count, threads = x.shape[0], len(self.parts), i64(torch.get_num_threads())
        x = x.clone(memory_format=torch.contiguous_format)
        middle, normed = torch.empty_like(x), torch.empty_like(x)
        cos, sin = (part.expand(rows, 1, -1).contiguous() for part in rotary)
        padding = None if padding is None else padding.contiguous()
        for call, (keys, values, past) in zip(self.calls, places):
            where = call.latents
            where.latent, where.rotary, where.past = keys.data_ptr(), values.data_ptr(), past
            where.latent_row, _, where.latent_key, _ = keys.stride()
            where.rotary_row, _, where.rotary_key, _ = values.stride()
            where.mask, where.mask_row = (None, 0) if padding is None else (padding.data_ptr(), padding.stride(0))
        for experts in self.experts:
            experts.known.refresh(thorough=self.calls[0].latents.past == 0)
        sizes = self.calls[count - 1].feed_forward  # of all that route
        logits = torch.empty(len(self.experts), rows, sizes.experts)
        weights = torch.empty(len(self.experts), rows, sizes.top_k)
        chosen = torch.empty(len(self.experts), rows, sizes.top_k, dtype=torch.int64)
        step = Step(*addresses(x, middle, normed, cos, sin, logits, weights, chosen), rows=rows)
        asked = at = routed = 0
        while (at := library().kimi_decode(self.calls, i64(count), i64(at), i64(routed), ctypes.byref(step), threads)) < count:
            # This layer has chosen experts that are not known yet.
            number = sum(part.has_experts for part in self.parts[:at])
            picked, layer = set(chosen[number].flatten().tolist()), self.parts[at].layer
            layer.mlp.experts.announce(picked, normed.flatten(0, 1))
            routed = int(layer.mlp.experts.known.learn(picked))
            asked += len(picked) if routed else 0
            if not routed:  # adapters or hooks on an expert
                x.copy_(middle + layer.mlp(layer.post_attention_layernorm(middle))[0])
                at += 1
        if self.experts:
            self.experts[0].store.hits += step.used - asked  # of what was known, nobody was asked
        for experts in self.experts:
            experts.known.let_go()
        return x, logits


def has_room(layer, x: torch.Tensor, span) -> bool:
    """Whether the kernels can write one more token of each row into this layer of a cache."""
    if isinstance(layer, LatentLayer):
        return not layer.is_initialized or layer.dtype == x.dtype and layer.keys.shape[0] == x.shape[0]
    return (
        type(layer) is StaticLayer
        and layer.is_initialized
        and layer.keys.dtype == x.dtype
        and layer.keys.shape[0] == x.shape[0]
        and int(span.query_index[0]) < layer.keys.shape[2]
    )


def native_decoder(owner: nn.Module, layers, x: torch.Tensor, span, past_key_values: Cache):
    """The [`NativeDecoder`] of neighbouring layers where the kernels can serve this call, else `None`.

    They serve one new token per row, bfloat16 on the CPU, without gradients, over a growing or a static cache.

    Args:
        owner: keeps the decoder between calls, as `native`: the text model, or a layer its own.
    """
    if (
        x.shape[1] != 1
        or x.shape[0] > MOST_ROWS
        or x.dtype != torch.bfloat16
        or x.device.type != "cpu"
        or past_key_values is None
        or owner.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or span.given is not None
        or span.documents is not None
        or _has_any_global_hook()
        or library() is None
        or not all(has_room(layer_of(past_key_values, layer.self_attn.layer_idx), x, span) for layer in layers)
    ):
        return None
    if owner.native is None or not owner.native.is_current():
        owner.native = NativeDecoder(list(layers))
    return owner.native if owner.native.fits else None


# In a compiled graph all layers are one operation. It is found by a number, as graphs hold tensors and numbers alone; its
# name has the module's, which may be loaded more than once.
NAMESPACE = __name__.replace(".", "_")
_owners: WeakValueDictionary = WeakValueDictionary()


# Defined plainly, for what `torch.library.custom_op` puts around costs as much as the graph saves.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "decode(Tensor x, Tensor cos, Tensor sin, Tensor at, Tensor? padding, Tensor(a!)[] keys, Tensor(b!)[] values, int owner)"
    " -> (Tensor, Tensor)"
)


def _decode(x, cos, sin, at, padding, keys: list[torch.Tensor], values: list[torch.Tensor], owner: int):
    """One new token of each row, at the place `at` of static caches, through all layers of the text model `owner`."""
    model, past = _owners[owner], int(at[0])
    if past >= keys[0].shape[2]:
        raise ValueError(f"the static cache has room for {keys[0].shape[2]} tokens, and one comes at place {past}")
    if model.native is None or not model.native.is_current():
        model.native = NativeDecoder(list(model.layers))
    if not model.native.fits:
        raise RuntimeError("the layers have changed since the model was compiled; compile it again")
    return model.native.run(x, (cos, sin), padding, [(*place, past) for place in zip(keys, values)])


def _decoded(x, cos, sin, at, padding, keys, values, owner):
    """Empty tensors in the shape of the result."""
    routing = [layer.mlp.gate.weight.shape[0] for layer in _owners[owner].layers if hasattr(layer.mlp, "gate")]
    return torch.empty_like(x), x.new_empty(len(routing), x.shape[0], max(routing, default=0), dtype=torch.float32)


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return library() is not None


_library.define("few_rows(Tensor x, Tensor weight) -> Tensor")
_library.impl("few_rows", few_rows, "CPU")
torch.library.register_fake(f"{NAMESPACE}::few_rows", lambda x, weight: x.new_empty(len(x), len(weight)), lib=_library)
_product = getattr(torch.ops, NAMESPACE).few_rows.default
_library.impl("decode", _decode, "CPU")
torch.library.register_fake(f"{NAMESPACE}::decode", _decoded, lib=_library)
_operation = getattr(torch.ops, NAMESPACE).decode.default


@torch.compiler.assume_constant_result
def _number(model: nn.Module) -> int:
    """What stands for a text model in a graph; 0 where the kernels cannot compute its layers."""
    if model.native is None or not model.native.is_current():
        model.native = NativeDecoder(list(model.layers))
    _owners[id(model)] = model
    return id(model) if model.native.fits else 0


def compiled_decode(model: nn.Module, x: torch.Tensor, rotary, span, past_key_values: Cache):
    """What a [`NativeDecoder`] gives, while a graph is being made: over a static cache; `None` where it cannot serve."""
    if (
        x.shape[1] != 1
        or x.shape[0] > MOST_ROWS
        or x.dtype != torch.bfloat16
        or x.device.type != "cpu"
        or past_key_values is None
        or model.training
        or torch.is_grad_enabled()
        or span.given is not None
        or span.documents is not None
    ):
        return None
    caches = [layer_of(past_key_values, layer.self_attn.layer_idx) for layer in model.layers]
    if not all(type(cache) is StaticLayer and cache.is_initialized and cache.keys.dtype == x.dtype for cache in caches):
        return None
    number = _number(model)
    if not number:
        return None
    keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
    out = _operation(x, *rotary, span.query_index, span.padding, keys, values, number)
    for cache in caches:
        count_one(cache)
    return out


def output_layer(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, `(batch, length, hidden_size)` → `(batch, length, vocab_size)`, natively where few rows ask for it."""
    rows = x.shape[0] * x.shape[1]
    if (
        rows > MOST_ROWS
        or x.dtype != torch.bfloat16
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or type(linear) is not nn.Linear
        or type(linear.weight) is not nn.Parameter
        or not is_plain(linear)
        or linear.bias is not None
        or linear.weight.dtype != torch.bfloat16
        or not linear.weight.is_contiguous()
        or linear.weight.device.type != "cpu"
        or not _has_kernels()
    ):
        return linear(x)
    product = _product if torch.compiler.is_compiling() else few_rows
    return product(x.flatten(0, 1).contiguous(), linear.weight).unflatten(0, x.shape[:2])


def serves(x: torch.Tensor) -> bool:
    """Whether a native kernel can take `x` at all: bfloat16 on the CPU, without gradients."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def serves_attention(attention: nn.Module, query: torch.Tensor, span) -> bool:
    """Whether the native kernel can answer these queries over expanded keys: bfloat16 on the CPU, without gradients,
    each query seeing all up to itself but padding."""
    return (
        serves(query)
        and query.stride(-1) == 1
        and span.first is not None
        and span.given is None
        and span.documents is None
        and not (attention.training and attention.config.attention_dropout)
    )


def serves_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native kernel can norm `x`: bfloat16 on the CPU, without gradients, rows that follow one another."""
    return (
        type(x) is torch.Tensor
        and type(weight) is nn.Parameter
        and serves(x)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and x.is_contiguous()
    )


def serves_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the native kernel can turn the pairs of `x`: bfloat16 on the CPU, without gradients, its rows evenly apart."""
    return (
        type(x) is torch.Tensor
        and serves(x)
        and x.dim() >= 3
        and x.numel() > 0
        and x.stride(-1) == 1
        and all(x.stride(at) == x.stride(at + 1) * x.shape[at + 1] for at in range(x.dim() - 3))
        and cos.shape == sin.shape == (*x.shape[:-2], 1, x.shape[-1] // 2)
        and cos.dtype == sin.dtype == torch.float32
        and cos.is_contiguous()
        and sin.is_contiguous()
    )
