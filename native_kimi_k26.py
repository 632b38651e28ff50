"""The CPU's own kernels: C++ compiled on first use by the machine's compiler, called with plain addresses.

A few new tokens through one decoder layer take PyTorch some hundred small operations; here all layers are one call.
Weights are read where the checkpoint has them: bfloat16 rows, and INT4 words unpacked in registers to integers, the sums
of whose groups are scaled. Sums are float32, and results are rounded to bfloat16 where the plain path rounds them.

They are written with AVX-512; where a processor has AVX2 alone, `avx2_kernels_kimi_k26` says what takes its place. Of what takes most
time there are three kinds: `tile_kernels_kimi_k26` for processors with tiles (AMX), `bfloat16_kernels_kimi_k26` for those with products of
bfloat16, `integer_kernels_kimi_k26` for others.
Without a compiler or AVX2 `library()` is `None` and all runs on PyTorch.
"""

import ctypes
import functools
from typing import Optional

import torch

from .attention_kernels_kimi_k26 import ATTENTION
from .avx2_kernels_kimi_k26 import AVX2
from .bfloat16_kernels_kimi_k26 import BFLOAT16, PANELS
from .compiling_kimi_k26 import address, compiled, i64, may_use_tiles
from .expert_kernels_kimi_k26 import EXPERTS
from .graph_kernels_kimi_k26 import GRAPHS
from .integer_kernels_kimi_k26 import INTEGERS
from .kernels_kimi_k26 import COMMON, INCLUDES
from .latent_kernels_kimi_k26 import LATENTS
from .prefill_kernels_kimi_k26 import PREFILL
from .tile_kernels_kimi_k26 import PRODUCTS_IN_TILES, TILES


MOST_ROWS = 32  # that are few: above, unpacking weights for many rows and the matrix products of PyTorch are faster
MANY_ROWS = f"#ifdef TILES{PRODUCTS_IN_TILES}#else{PANELS}#endif\n"
PRODUCTS = f"#ifdef BFLOAT16_PRODUCTS{BFLOAT16}{MANY_ROWS}#else{INTEGERS}#endif"
SOURCE = f"{INCLUDES}namespace kimi {{\nenum {{ MOST = {MOST_ROWS} }};  // rows that are few\n{TILES}{AVX2}{COMMON}{PRODUCTS}{ATTENTION}{LATENTS}{PREFILL}{EXPERTS}{GRAPHS}}}\n"
NEEDED = {"avx2", "fma"}  # as /proc/cpuinfo has them; AVX-512 with bfloat16 products is used where it is
INPUTS = 32  # all products run over multiples of so many inputs


def fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class Attention(ctypes.Structure):
    """`Attention` of the source: addresses of weights, widths, constants."""

    _fields_ = [
        *fields(address, "norm q_a q_a_bias q_a_norm q_b kv_a kv_a_bias kv_a_norm kv_b o o_bias"),
        *fields(i64, "hidden q_lora heads nope rope v rank"),
        *fields(ctypes.c_float, "eps latent_eps scale"),
    ]


class Latents(ctypes.Structure):
    """`Latents` of the source: where a cache holds those of one layer."""

    _fields_ = [
        *fields(address, "latent rotary"),
        *fields(i64, "latent_row latent_key rotary_row rotary_key past tokens"),
        *fields(address, "mask"),
        *fields(i64, "mask_row"),
    ]


class Queries(ctypes.Structure):
    """`Queries` of the source: the two parts of queries, and strides in elements."""

    _fields_ = [*fields(address, "nope rope"), *fields(i64, "nope_row nope_head rope_row rope_head")]


class Expanded(ctypes.Structure):
    """`Expanded` of the source: many queries, and the expanded keys and values of some heads."""

    _fields_ = [
        *fields(address, "query_nope query_rope key rotary value out"),
        *fields(i64 * 3, "query_nope_at query_rope_at key_at rotary_at value_at out_at"),
        *fields(i64, "batch queries keys heads nope rope v first"),
        *fields(address, "mask"),
        *fields(i64, "mask_row"),
        *fields(ctypes.c_float, "scale"),
    ]


class FeedForward(ctypes.Structure):
    """`FeedForward` of the source: a dense network, or router and shared expert."""

    _fields_ = [
        *fields(address, "norm gate up down router bias"),
        *fields(i64, "hidden width experts top_k groups top_groups normalize expert_width group_size"),
        *fields(ctypes.c_float, "eps scaling"),
    ]


class Layer(ctypes.Structure):
    """`Layer` of the source: all that is known of one decoder layer."""

    _fields_ = [
        ("attention", Attention),
        ("latents", Latents),
        ("feed_forward", FeedForward),
        *fields(address, "experts"),
    ]


class Step(ctypes.Structure):
    """`Step` of the source: where new tokens, one to a row, pass through."""

    _fields_ = [
        *fields(address, "x middle normed cos sin logits weights chosen norm"),
        *fields(ctypes.c_float, "eps"),
        *fields(i64, "rows used"),
        *fields(address, "head scores"),
        *fields(i64, "outputs"),
    ]


NativeAddresses = address * 6  # of an expert: values and scales of gate, up and down; no scales: the values are bfloat16


def knows_group(size: int) -> bool:
    """Whether the kernels multiply INT4 words that have one scale for so many inputs; 0: weights that are not packed."""
    return size % INPUTS == 0 and size & (size - 1) == 0


def addresses(*tensors: torch.Tensor) -> list:
    return [address(tensor.data_ptr()) for tensor in tensors]


def is_plain(module: torch.nn.Module) -> bool:
    """Whether calling the module does no more than its class says: no hooks, nothing offloaded."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own)


def is_as_written(kind: type) -> bool:
    """Whether a class of modules computes what the file says in which it stands: nobody has put another `forward` there."""
    return kind.forward.__module__ == kind.__module__


def is_readable(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can read a parameter as one of this dtype: in main memory, and its own, which subclasses may not have."""
    plain = type(parameter) is torch.nn.Parameter
    fits = plain and parameter.dtype == dtype and parameter.is_contiguous() and parameter.device.type == "cpu"
    return fits and parameter.data_ptr() != 0  # memory may have been given back, as it is where weights are sharded


def load(source: str):
    """The kernels compiled from `source`, or `None` where this machine cannot have them."""
    kernels = compiled("kernels", source, NEEDED, parallel=True, depends=torch.__version__)
    if kernels is None:
        return None
    for function in ("attention", "read", "prefill", "route", "experts", "many_experts", "dense", "linear", "many_rows", "finish", "dequantize", "norm", "rotate", "torch", "graph", "no_graph", "unready"):
        getattr(kernels, f"kimi_{function}").restype = None
    kernels.kimi_decode.restype = kernels.kimi_ready.restype = i64
    return kernels


@functools.cache
def library():
    """The kernels, or `None` where this machine cannot have them. Compiles when first asked, once per machine."""
    return load(f"#define TILES_ALLOWED\n{SOURCE}" if may_use_tiles() else SOURCE)


def few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for bfloat16 on the CPU: `(rows, inputs)`, `(outputs, inputs)` → `(rows, outputs)`, all contiguous."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    sizes = (i64(size) for size in (*weight.shape, x.shape[0]))
    library().kimi_linear(*addresses(weight), *sizes, *addresses(x, out), i64(torch.get_num_threads()))
    return out


def many_rows(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`torch.nn.functional.linear(x, weight, bias)`, rounded once, for bfloat16 on the CPU: `(rows, inputs)`, `(outputs, inputs)`,
    `(outputs,)` → `(rows, outputs)`, all contiguous; inputs are a multiple of `INPUTS`."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    given = (*addresses(weight), None if bias is None else address(bias.data_ptr()), *(i64(size) for size in (*weight.shape, x.shape[0])))
    library().kimi_many_rows(*given, *addresses(x, out), i64(torch.get_num_threads()))
    return out


def finish(x: torch.Tensor, bias: Optional[torch.Tensor], gelu: bool, residual: Optional[torch.Tensor]) -> torch.Tensor:
    """What the products of a linear layer, `x` `(…, outputs)`, become, in their place: `bias` `(outputs,)` is added, of that comes
    the GELU, as the hyperbolic tangent approximates it, `residual`, like `x`, is added. Rounded once; bfloat16 on the CPU, contiguous."""
    size = x.shape[-1]
    bias, residual = (None if each is None else address(each.data_ptr()) for each in (bias, residual))
    library().kimi_finish(*addresses(x), bias, i64(gelu), residual, *map(i64, (x.numel() // size, size, torch.get_num_threads())))
    return x


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis, rounded as the plain path rounds: `x` and `weight` bfloat16 on the CPU, contiguous."""
    out, size = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // size
    library().kimi_norm(*addresses(x, weight, out), i64(rows), i64(size), ctypes.c_float(eps), i64(torch.get_num_threads()))
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs turned, with the bits of the plain path: `x` `(…, heads, dim)` bfloat16 on the CPU, the rows of `…`
    evenly apart and the last axis contiguous; `cos` and `sin` `(…, 1, dim / 2)` float32, contiguous. `(…, heads, dim)`."""
    heads, dim = x.shape[-2:]
    out = x.new_empty(x.shape)
    sizes = (i64(size) for size in (x.numel() // (heads * dim), heads, dim, torch.get_num_threads()))
    library().kimi_rotate(*addresses(x), i64(x.stride(-3)), i64(x.stride(-2)), *addresses(cos, sin, out), *sizes)
    return out


def attention(query_nope, query_rope, key, rotary, value, first: int, mask, scale: float) -> torch.Tensor:
    """Causal attention of many tokens over expanded keys and values; the rotary parts of queries and keys lie apart.

    Args:
        query_nope (`torch.Tensor` of shape `(batch, queries, heads, nope)`), query_rope (`(…, rope)`), key (`(batch, keys, heads,
            nope)`), rotary (`(batch, keys, rope)`, of all heads), value (`(batch, keys, heads, v)`): bfloat16, the last
            axis contiguous.
        first: the place of the first query among the keys.
        mask (`torch.Tensor` of shape `(batch, keys)`, boolean, *optional*): false for padding.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, v)`, bfloat16.
    """
    batch, queries, heads, nope = query_nope.shape
    keys, rope, v = key.shape[1], rotary.shape[2], value.shape[3]
    out = query_nope.new_empty(batch, queries, heads, v)
    tensors = {"query_nope": query_nope, "query_rope": query_rope, "key": key, "rotary": rotary.unsqueeze(2), "value": value, "out": out}
    call = Expanded(batch=batch, queries=queries, keys=keys, heads=heads, nope=nope, rope=rope, v=v, first=first, scale=scale)
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_at", (i64 * 3)(*tensor.stride()[:3]))
    if mask is not None:
        mask = mask.contiguous()
        call.mask, call.mask_row = mask.data_ptr(), mask.stride(0)
    library().kimi_prefill(ctypes.byref(call), i64(torch.get_num_threads()))
    return out


def read_latents(query_nope, query_rope, latent, rotary, expansion, first: int, mask, scale: float) -> torch.Tensor:
    """Causal attention of some tokens over cached latents, whose expansion moves into the query and the output.

    Args:
        query_nope (`torch.Tensor` of shape `(batch, queries, heads, nope)`), query_rope (`(…, rope)`), latent (`(batch, keys or more,
            rank)`), rotary (`(batch, keys or more, rope)`): bfloat16, the last axis contiguous, queries evenly apart.
        expansion (`torch.Tensor` of shape `(heads, nope + v, rank)`): bfloat16, contiguous; `rank` a multiple of `INPUTS`, `nope`
            and `rope` of 2, `v` of 4.
        first: the place of the first query among the keys.
        mask (`torch.Tensor` of shape `(batch, keys or more)`, boolean, *optional*): false for padding.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, v)`, bfloat16.
    """
    batch, queries, heads, nope = query_nope.shape
    rank, rope, v = latent.shape[2], rotary.shape[2], expansion.shape[1] - nope
    out = query_nope.new_empty(batch, queries, heads, v)
    weights = Attention(kv_b=expansion.data_ptr(), heads=heads, nope=nope, rope=rope, v=v, rank=rank, scale=scale)
    cache = Latents(latent=latent.data_ptr(), rotary=rotary.data_ptr(), past=first, tokens=queries)
    cache.latent_row, cache.latent_key, _ = latent.stride()
    cache.rotary_row, cache.rotary_key, _ = rotary.stride()
    if mask is not None:
        mask = mask.contiguous()
        cache.mask, cache.mask_row = mask.data_ptr(), mask.stride(0)
    asked = Queries(query_nope.data_ptr(), query_rope.data_ptr(), *query_nope.stride()[1:3], *query_rope.stride()[1:3])
    given = (ctypes.byref(part) for part in (weights, cache))
    library().kimi_read(*given, i64(batch * queries), ctypes.byref(asked), *addresses(out), i64(torch.get_num_threads()))
    return out


def weighted_experts(x, weights, chosen, table, sizes: FeedForward) -> torch.Tensor:
    """The weighted sum of each row's experts, rounded once.

    Args:
        x (`torch.Tensor` of shape `(rows, hidden)`, bfloat16), weights (`(rows, top_k)`, float32), chosen (same, int64).
        table (`torch.Tensor` of shape `(rows, top_k)`, int64): addresses of each choice's [`NativeAddresses`], 0 where
            another computes it.
        sizes: `hidden`, `top_k`, `expert_width` and `group_size`.

    Returns:
        `torch.Tensor` of shape `(rows, hidden)`, bfloat16.
    """
    out, kernels, threads = torch.empty_like(x), library(), i64(torch.get_num_threads())
    given = addresses(x, weights, chosen, table, out)
    if len(x) > MOST_ROWS:
        kernels.kimi_many_experts(ctypes.byref(sizes), i64(len(x)), *given, threads)
    else:
        kernels.kimi_experts(ctypes.byref(sizes), i64(len(x)), None, *given, threads)
    return out


def dequantize(words: torch.Tensor, scale: torch.Tensor, out: torch.Tensor):
    """INT4 words `(outputs, inputs / 8)` and scales `(outputs, groups)` → `out`, `(outputs, inputs)` bfloat16."""
    outputs, inputs = out.shape
    sizes = (i64(size) for size in (outputs, inputs, inputs // scale.shape[1]))
    library().kimi_dequantize(*addresses(words, scale), *sizes, *addresses(out), i64(torch.get_num_threads()))
