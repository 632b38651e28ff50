"""Where the native kernels take the place of PyTorch's operations: above all a few new tokens through all layers."""

import ctypes
import threading
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache, StaticLayer

from .cache_kimi_k26 import LatentLayer, layer_of
from .memory_kimi_k26 import settle
from .native_kimi_k26 import (
    INPUTS,
    MOST_ROWS,
    Attention,
    FeedForward,
    Layer,
    Step,
    addresses,
    few_rows,
    finish,
    i64,
    is_as_written,
    is_plain,
    is_readable,
    knows_group,
    library,
    many_rows,
)


# The modules whose sums the kernels know, beside PyTorch's linear layer. By name: in version 5 of the library each entry module has
# classes of its own.
KNOWN = {f"KimiK26{name}" for name in ("Attention", "Experts", "Int4Linear", "MLP", "MoE", "RMSNorm", "Router")}
# Whether PyTorch's products in bfloat16 are fast: on processors without AVX-512 they have a seventh of the speed in float32.
HAS_FAST_PRODUCTS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
FEW = 16  # rows, up to which the kernel of few is faster than the one of many
WIDENED = 2**20  # weights that are float32 at a time: what the second cache holds, and little to hold


class Weights:
    """Weights whose addresses the native kernels have, while they stay there, and the modules they belong to.

    Attributes:
        fits (`bool`): whether the kernels can read them: bfloat16 in main memory, in modules whose sums they know.
    """

    def __init__(self):
        self.fits = True
        self._modules: list[tuple[dict, str, nn.Module, object]] = []  # where each module must be found again, and its class's `forward`
        self._tensors: list[tuple[dict, str, int]] = []  # and each weight, or bias that is none: 0
        self._memory: list[torch.Tensor] = []  # stays while the kernels may read it, whatever is put in its place

    def module(self, parent: nn.Module, name: str) -> nn.Module:
        module = parent._modules[name]
        kind = type(module)
        self.fits &= (kind is nn.Linear or kind.__name__ in KNOWN) and is_as_written(kind)  # adapters have a `Linear`, too
        if not any(modules is parent._modules and name == known for modules, known, *_ in self._modules):  # weight, then bias
            self._modules.append((parent._modules, name, module, kind.forward))
        return module

    def weight(self, parent: nn.Module, module: str, *shape: int, name: str = "weight"):
        """The address of a parameter of this shape, or `None` where there is none, as there may be of a bias."""
        parameters = self.module(parent, module)._parameters
        parameter = parameters.get(name)
        if parameter is None:
            self.fits &= name == "bias"
            self._tensors.append((parameters, name, 0))
            return None
        dtype = torch.float32 if name == "e_score_correction_bias" else torch.bfloat16
        self.fits &= is_readable(parameter, dtype) and parameter.shape == shape
        self._tensors.append((parameters, name, parameter.data_ptr()))
        self._memory.append(parameter.detach())
        return parameter.data_ptr()

    def linear(self, parent: nn.Module, module: str, *shape: int):
        """The address of the weight, `(outputs, inputs)`, of a linear layer that must have no bias."""
        self.fits &= self.weight(parent, module, shape[0], name="bias") is None
        return self.weight(parent, module, *shape)

    def is_current(self) -> bool:
        """Whether every weight is where it was, in modules that do no more than their class says."""
        # Asked for every token: plain loops, which take half the time of `all`.
        for modules, name, module, forward in self._modules:
            if modules.get(name) is not module or type(module).forward is not forward or not is_plain(module):
                return False
        for parameters, name, at in self._tensors:
            parameter = parameters.get(name)
            if (0 if parameter is None else parameter.data_ptr()) != at:
                return False
        return True


class NativeLayer(Weights):
    """What the native kernels must know of one decoder layer.

    Args:
        layer (`KimiK26DecoderLayer`): with `self_attn`, `mlp` and its two norms.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        attention, mlp = self.module(layer, "self_attn"), self.module(layer, "mlp")
        self.fits &= attention.peers is None and is_as_written(type(layer))
        self.has_experts = hasattr(mlp, "experts")
        if self.has_experts:
            self.fits &= [device for device, _ in mlp.experts.shares] == [None]
        self.forward, self.routing, self.constants = type(layer).forward, routing_of(mlp), constants_of(layer)
        self.attention = self._describe_attention(attention)
        self.widths = attention.rank, attention.rope  # of what a cache holds
        self.feed_forward = self._describe_feed_forward(mlp)

    def _describe_attention(self, attention: nn.Module) -> Attention:
        config = attention.config
        self.fits &= config.hidden_size % INPUTS == 0 and knows_widths(attention)
        hidden, heads, rank, q_lora = config.hidden_size, attention.heads, attention.rank, config.q_lora_rank
        cached, query, out = rank + attention.rope, heads * (attention.nope + attention.rope), heads * attention.v_dim
        described = Attention(
            norm=self.weight(self.layer, "input_layernorm", hidden),
            kv_a=self.weight(attention, "kv_a_proj_with_mqa", cached, hidden),
            kv_a_bias=self.weight(attention, "kv_a_proj_with_mqa", cached, name="bias"),
            kv_a_norm=self.weight(attention, "kv_a_layernorm", rank),
            kv_b=self.linear(attention, "kv_b_proj", heads * attention.nope + out, rank),
            o=self.weight(attention, "o_proj", hidden, out),
            o_bias=self.weight(attention, "o_proj", hidden, name="bias"),
            hidden=hidden,
            heads=heads,
            nope=attention.nope,
            rope=attention.rope,
            v=attention.v_dim,
            rank=rank,
            eps=self.layer.input_layernorm.eps,
            latent_eps=attention.kv_a_layernorm.eps,
            scale=attention.scaling,
        )
        if q_lora is None:
            described.q_b = self.linear(attention, "q_proj", query, hidden)
        else:
            described.q_lora = q_lora
            described.q_a = self.weight(attention, "q_a_proj", q_lora, hidden)
            described.q_a_bias = self.weight(attention, "q_a_proj", q_lora, name="bias")
            described.q_a_norm = self.weight(attention, "q_a_layernorm", q_lora)
            described.q_b = self.linear(attention, "q_b_proj", query, q_lora)
        return described

    def _describe_feed_forward(self, mlp: nn.Module) -> FeedForward:
        config = self.layer.self_attn.config
        norm = self.weight(self.layer, "post_attention_layernorm", config.hidden_size)
        described = FeedForward(norm=norm, hidden=config.hidden_size, eps=self.layer.post_attention_layernorm.eps)
        network = mlp
        if self.has_experts:
            group = config.int4_group_size or 0
            self.module(mlp, "experts")
            self.fits &= config.moe_intermediate_size % (group or INPUTS) == 0 and knows_group(group)
            described.router = self.weight(mlp, "gate", config.n_routed_experts, config.hidden_size)
            described.bias = self.weight(mlp, "gate", config.n_routed_experts, name="e_score_correction_bias")
            self.fits &= len(mlp.experts) == config.n_routed_experts
            described.experts = config.n_routed_experts
            described.top_k, described.groups, described.top_groups, described.normalize, described.scaling = self.routing
            self.fits &= can_route(described)
            described.expert_width, described.group_size = config.moe_intermediate_size, group
            network = None if mlp.shared_experts is None else self.module(mlp, "shared_experts")
        if network is not None:
            described.width = network.gate_proj.out_features
            described.gate = self.linear(network, "gate_proj", described.width, config.hidden_size)
            described.up = self.linear(network, "up_proj", described.width, config.hidden_size)
            described.down = self.linear(network, "down_proj", config.hidden_size, described.width)
        return described

    def is_current(self) -> bool:
        told = type(self.layer).forward, routing_of(self.layer.mlp), constants_of(self.layer)
        return told == (self.forward, self.routing, self.constants) and super().is_current()

    def extend(self, cache, x: torch.Tensor, span) -> "Place":
        """Room for the new tokens in this layer's part of a cache."""
        if isinstance(cache, LatentLayer):
            return cache.extend(x, self.widths, x.shape[1])
        count_tokens(cache, x.shape[1])
        return cache.keys, cache.values, span.begin


def routing_of(mlp: nn.Module) -> Optional[tuple]:
    """How a layer's router chooses, where it has one."""
    router = mlp._modules.get("gate") if "experts" in mlp._modules else None
    return router and (router.top_k, router.n_group, router.topk_group, router.normalize, router.scaling)


def constants_of(layer: nn.Module) -> tuple:
    """Numbers of a layer that the kernels are told."""
    attention = layer.self_attn
    return attention.scaling, attention.kv_a_layernorm.eps, layer.input_layernorm.eps, layer.post_attention_layernorm.eps


def can_route(described: FeedForward) -> bool:
    """Whether there are so many experts, groups and experts of these groups to choose from."""
    groups, chosen = (described.groups, described.top_groups) if described.groups > 1 else (1, 1)
    return described.experts % groups == 0 and 0 < chosen <= groups and 0 < described.top_k <= described.experts // groups * chosen


Place = tuple[torch.Tensor, torch.Tensor, int]  # latents and rotary keys of a layer, and how many tokens are before the new ones


def count_tokens(layer: StaticLayer, tokens: int):
    """Tell a static layer that it holds so many tokens more: transformers 5 counts."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length.add_(tokens)


class NativeDecoder:
    """A few new tokens of each sequence through decoder layers, in one call of the native kernels.

    Args:
        owner: a text model, whose last norm follows; or one `KimiK26DecoderLayer`.

    Attributes:
        fits (`bool`): whether the kernels can compute these layers.
    """

    def __init__(self, owner: nn.Module):
        if not getattr(owner, "streams", True):  # a text model whose layers stay in memory
            for layer in owner.layers:
                settle(*layer.dense())
        self.parts = [NativeLayer(layer) for layer in layers_of(owner)]
        self.norm = self.eps = None
        if "norm" in owner._modules:  # is looked at with the last layer
            self.norm, self.eps = self.parts[-1].weight(owner, "norm", self.parts[-1].attention.hidden), owner.norm.eps
        self.fits = all(part.fits and part.is_current() for part in self.parts)
        routing = {(part.feed_forward.experts, part.feed_forward.top_k) for part in self.parts if part.has_experts}
        self.fits &= len(routing) <= 1
        self.routed, self.top_k = next(iter(routing), (0, 0))  # experts of each layer that routes; those of a token
        self.calls = (Layer * len(self.parts))()
        self._latents = [call.latents for call in self.calls]
        self._lock = threading.Lock()  # for all that a run sets and reads, where there are no experts
        self.experts = [part.layer.mlp.experts for part in self.parts if part.has_experts]
        self.known = [experts.known for experts in self.experts]
        self._next = None  # where the sequence goes on: see `is_current`
        self._looks = 0
        self._scratch = None  # see `_room`
        found = iter(self.known)
        for call, part in zip(self.calls, self.parts):
            call.attention, call.feed_forward = part.attention, part.feed_forward
            if part.has_experts:
                call.experts = next(found).address

    def __reduce__(self):
        return type(None), ()  # addresses are no good in a copy

    def is_of(self, owner: nn.Module) -> bool:
        """Whether these are its layers still."""
        layers = layers_of(owner)
        return len(layers) == len(self.parts) and all(part.layer is layer for part, layer in zip(self.parts, layers))

    def is_current(self, where: Optional[int] = None, past: int = 0, new: int = 1) -> bool:
        """Whether the layers are as they were; what happens to single experts is seen at the next prompt.

        Where a sequence goes on by one token, one layer is looked at, each at its turn: what is done to all is seen at once. To
        look at all takes a thirtieth of a step, as nothing of them is in the processor's caches any more.

        Args:
            where: stands for the first layer's part of a cache.
            past: how many tokens are before the new ones.
            new: how many those are.
        """
        goes_on = where is not None and new == 1 and (where, past) == self._next
        self._next = where, past + new
        self._looks += 1
        if not goes_on:
            return all(part.is_current() for part in self.parts)
        return self.parts[self._looks % len(self.parts)].is_current()

    def look_again(self):
        """Let the next step look at all layers, wherever it goes on."""
        self._next = None

    def __call__(self, x: torch.Tensor, rotary, span, caches: list, head: Optional[torch.Tensor] = None):
        """
        Args:
            x (`torch.Tensor` of shape `(batch, new, hidden_size)`): bfloat16.
            caches: each layer's part of a cache, which has room.
            head (`torch.Tensor` of shape `(vocab_size, hidden_size)`, *optional*): of an output layer that follows the norm.

        Returns:
            `x` after the layers (and the norm); the routers' logits of each layer that routes, `(layers, batch * new, experts)`; those
            of the output layer, `(batch, new, vocab_size)`, or nothing, `(batch, new, 0)`.
        """
        places = [part.extend(cache, x, span) for part, cache in zip(self.parts, caches)]
        return self.run(x, rotary, span.padding, places, head)

    def run(self, x: torch.Tensor, rotary, padding: Optional[torch.Tensor], places: list[Place], head: Optional[torch.Tensor] = None):
        """The same where the caches have made room already. Threads that share the model, or its experts, wait for each other here."""
        with self.experts[0].store.lock if self.experts else self._lock:
            return self._run(x, rotary, padding, places, head)

    def _run(self, x: torch.Tensor, rotary, padding: Optional[torch.Tensor], places: list[Place], head: Optional[torch.Tensor]):
        (sequences, new), count, threads = x.shape[:2], len(self.parts), i64(torch.get_num_threads())
        rows = sequences * new
        x = x.clone(memory_format=torch.contiguous_format)
        middle, normed, weights, chosen = self._room(x)
        cos, sin = rotary
        if cos.shape[:2] != x.shape[:2] or not (cos.is_contiguous() and sin.is_contiguous()):
            cos, sin = (part.expand(sequences, new, -1).contiguous() for part in rotary)
        padding = None if padding is None else padding.contiguous()
        mask, mask_row = (None, 0) if padding is None else (padding.data_ptr(), padding.stride(0))
        for where, (keys, values, past) in zip(self._latents, places):
            where.latent, where.rotary, where.past, where.tokens = keys.data_ptr(), values.data_ptr(), past, new
            where.latent_row, _, where.latent_key, _ = keys.stride()
            where.rotary_row, _, where.rotary_key, _ = values.stride()
            where.mask, where.mask_row = mask, mask_row
        self._refresh_experts(thorough=new > 1 or places[0][2] == 0)
        logits = torch.empty(len(self.experts), rows, self.routed, dtype=torch.float32, device=x.device)
        scores = x.new_empty(sequences, new, 0 if head is None else head.shape[0])
        step = Step(*addresses(x, middle, normed, cos, sin, logits, weights, chosen), rows=rows)
        if head is not None:
            step.head, step.scores, step.outputs = head.data_ptr(), scores.data_ptr(), head.shape[0]
        if self.norm is not None:
            step.norm, step.eps = self.norm, self.eps
        asked = at = routed = 0
        while (at := library().kimi_decode(self.calls, i64(count), i64(at), i64(routed), ctypes.byref(step), threads)) < count:
            # This layer has chosen experts that are not known yet.
            number = sum(part.has_experts for part in self.parts[:at])
            picked, layer = set(chosen[number].flatten().tolist()), self.parts[at].layer
            layer.mlp.experts.announce(picked, normed.flatten(0, 1))
            routed = int(self.known[number].learn(picked))
            asked += len(picked) if routed else 0
            if not routed:  # adapters or hooks on an expert
                x.copy_(middle + layer.mlp(layer.post_attention_layernorm(middle))[0])
                at += 1
        if self.experts:
            self.experts[0].store.hits += step.used - asked  # of what was known, nobody was asked
        for known in self.known:
            known.let_go()
        return x, logits, scores

    def _room(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a step needs for itself: two hidden states, and the weights and choices of all layers. One run uses it after
        the other, as memory that has just come takes longer to get."""
        if self._scratch is None or self._scratch[0].shape != x.shape:
            pairs = (len(self.experts), x.shape[0] * x.shape[1], self.top_k)
            weights, chosen = (torch.empty(pairs, dtype=dtype, device=x.device) for dtype in (torch.float32, torch.int64))
            self._scratch = torch.empty_like(x), torch.empty_like(x), weights, chosen
        return self._scratch

    def _refresh_experts(self, thorough: bool):
        """Let the tables have no expert that is not as it was. Where that is not `thorough`, one is looked at, each at its
        turn: what is done to all is seen at once."""
        thorough = thorough or self.known and not self.known[self._looks % len(self.known)].one_is_current()
        for known in self.known:
            known.refresh() if thorough else known.follow()


def layers_of(owner: nn.Module):
    """The layers of a text model; or the layer itself."""
    layers = owner._modules.get("layers")
    return (owner,) if layers is None else layers._modules.values()


def fits(held: torch.Tensor, x: torch.Tensor, length: int, width: int) -> bool:
    """Whether the kernels can write into what a static layer of this length holds, for the sequences of `x`."""
    return held.shape == (x.shape[0], 1, length, width) and held.dtype == x.dtype and held.device == x.device and held.stride(3) == 1


def has_room(layer, x: torch.Tensor, span, widths: tuple[int, int]) -> bool:
    """Whether the kernels can write the new tokens into this layer of a cache, latents and rotary keys of these widths."""
    if isinstance(layer, LatentLayer):
        return not layer.is_initialized or layer.dtype == x.dtype  # it refuses what does not fit otherwise
    return (
        type(layer) is StaticLayer
        and layer.is_initialized
        and all(fits(held, x, layer.keys.shape[2], width) for held, width in zip((layer.keys, layer.values), widths))
        and span.begin + x.shape[1] <= layer.keys.shape[2]
        and int(getattr(layer, "cumulative_length", span.begin)) == span.begin  # transformers 5 writes where it has counted to
    )


_finding = threading.RLock()  # a decoder is made by one thread


def decoder_of(owner: nn.Module, *where) -> NativeDecoder:
    """The decoder that a text model or a layer keeps as `native`, made anew where it is not current: see `is_current`."""
    with _finding:
        native = owner.native
        if native is None or not native.is_of(owner) or not native.is_current(*where):
            native = owner.native = NativeDecoder(owner)
        return native


def serves_step(owner: nn.Module, x: torch.Tensor, span, past_key_values: Optional[Cache]) -> bool:
    """Whether these may be new tokens for a [`NativeDecoder`], as far as a graph that is being made can tell, too."""
    return (
        0 < x.shape[0] * x.shape[1] <= MOST_ROWS
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and past_key_values is not None
        and not owner.training
        and not torch.is_grad_enabled()
        and span.given is None
        and span.documents is None
    )


def decode(owner: nn.Module, x: torch.Tensor, rotary, span, past_key_values: Cache, head: Optional[torch.Tensor] = None):
    """What the [`NativeDecoder`] of a text model or of one layer gives where the kernels can serve this call, else `None`.

    They serve a few new tokens, `(batch, new, hidden_size)`, bfloat16 on the CPU, without gradients, over a growing or a static cache.

    Args:
        owner: keeps the decoder between calls, as `native`.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or not serves_step(owner, x, span, past_key_values)
        or not span.knows_padding(*x.shape[:2])
        or not (x.shape[1] == 1 or span.follows)
        or _has_any_global_hook()
        or library() is None
    ):
        return None
    caches = [layer_of(past_key_values, layer.layer_idx) for layer in layers_of(owner)]
    for cache, layer in zip(caches, layers_of(owner)):
        attention = layer._modules["self_attn"]
        if not has_room(cache, x, span, (attention.rank, attention.rope)):
            return None
    native = decoder_of(owner, id(caches[0]), span.begin, x.shape[1])
    return native(x, rotary, span, caches, head) if native.fits else None


def head_for(x: torch.Tensor, linear: nn.Module) -> Optional[torch.Tensor]:
    """The weight of an output layer where the kernels can read it and serve `x`, `(batch, length, hidden_size)`, else `None`."""
    few = x.shape[0] * x.shape[1] <= MOST_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    serves = few and not torch.is_grad_enabled() and _reads_plainly(linear) and linear.bias is None
    return linear.weight if serves and linear.weight.shape[1] == x.shape[-1] else None


# In a compiled graph the product is an operation, whose name has the module's, which may be loaded more than once.
NAMESPACE = __name__.replace(".", "_")
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("few_rows(Tensor x, Tensor weight) -> Tensor")
_library.impl("few_rows", few_rows, "CPU")
torch.library.register_fake(f"{NAMESPACE}::few_rows", lambda x, weight: x.new_empty(len(x), len(weight)), lib=_library)
_product = getattr(torch.ops, NAMESPACE).few_rows.default


def output_layer(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, `(batch, length, hidden_size)` → `(batch, length, vocab_size)`, natively where few rows ask for it."""
    head = head_for(x, linear)
    if head is None:
        return apply_linear(linear, x)
    product = _product if torch.compiler.is_dynamo_compiling() else few_rows
    return product(x.flatten(0, 1).contiguous(), head).unflatten(0, x.shape[:2])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`torch.nn.functional.linear`. Where PyTorch's products in bfloat16 are slow by the native kernels; widths that they do not
    know in float32, with the weights of some outputs at a time, and rounded once."""
    if HAS_FAST_PRODUCTS or not serves(x) or weight.dtype != x.dtype or weight.shape[1] != x.shape[-1] or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) <= FEW and bias is None:
        out = few_rows(rows, weight)
    elif weight.shape[1] % INPUTS == 0:
        out = many_rows(rows, weight, bias)
    else:
        out, given = x.new_empty(len(rows), len(weight)), rows.float()
        step = max(1, WIDENED // weight.shape[1])
        for some in (slice(start, start + step) for start in range(0, len(weight), step)):
            out[:, some] = F.linear(given, weight[some].float(), None if bias is None else bias[some].float())
    return out.unflatten(0, x.shape[:-1])


def apply_linear(module: nn.Module, x: torch.Tensor, gelu: bool = False, residual: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`module(x)`, by [`linear`] where the module is a plain linear layer; its GELU, as the hyperbolic tangent approximates it; a
    `residual` added to that."""
    plain = serves(x) and _reads_plainly(module)
    fits = plain and (residual is None or (residual.shape == (*x.shape[:-1], len(module.weight)) and residual.dtype == x.dtype and residual.is_contiguous()))
    if fits and (gelu or residual is not None):
        return finish(linear(x, module.weight), module.bias, gelu, residual)
    out = linear(x, module.weight, module.bias) if plain and not HAS_FAST_PRODUCTS else module(x)
    if gelu:
        out = F.gelu(out, approximate="tanh")
    return out if residual is None else residual + out


@torch.compiler.assume_constant_result
def _reads_plainly(linear: nn.Module) -> bool:
    """Whether the kernels can read a linear layer: bfloat16 weights in main memory, nothing hung on it."""
    return (
        type(linear) is nn.Linear
        and is_plain(linear)
        and is_readable(linear.weight, torch.bfloat16)
        and (linear.bias is None or (linear.bias.dtype == torch.bfloat16 and linear.bias.is_contiguous()))
        and library() is not None
    )


def serves(x: torch.Tensor) -> bool:
    """Whether a native kernel can take `x` at all: bfloat16 on the CPU, without gradients, and none that others make float16 of."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_dynamo_compiling()
        and library() is not None
    )


def knows_widths(attention: nn.Module) -> bool:
    """Whether the kernels that read latents know the widths of these heads."""
    return attention.rank % INPUTS == attention.nope % 2 == attention.rope % 2 == attention.v_dim % 4 == 0


def serves_latents(attention: nn.Module, query: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, expansion: torch.Tensor) -> bool:
    """Whether the native kernel can answer queries that [`serves_attention`] lets pass over these latents; see `read_latents`."""
    evenly = query.shape[0] == 1 or query.stride(0) == query.shape[2] * query.stride(2)
    return (
        knows_widths(attention)
        and evenly
        and latent.stride(-1) == rotary.stride(-1) == 1
        and expansion.dtype == query.dtype
        and expansion.is_contiguous()
    )


def serves_attention(attention: nn.Module, query: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, span) -> bool:
    """Whether the native kernels can answer these queries, `(batch, heads, queries, nope)`, over these keys: bfloat16 on the
    CPU, without gradients, each query seeing all up to itself but padding."""
    return (
        serves(query)
        and latent.dtype == rotary.dtype == query.dtype  # a cache of a model in float32 holds that under autocast, too
        and attention.nope % 2 == attention.rope % 2 == 0
        and query.stride(-1) == 1
        and span.given is None
        and span.documents is None
        and span.knows_padding(query.shape[0], query.shape[2])
        and span.follows
        and span.begin + query.shape[2] <= latent.shape[1]  # some caches give the last ones alone
        and not (attention.training and attention.config.attention_dropout)
    )


def serves_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native kernel can norm `x`: bfloat16 on the CPU, without gradients, rows that follow one another."""
    return (
        type(x) is torch.Tensor
        and type(weight) is nn.Parameter
        and serves(x)
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
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
