"""A decode step in a graph of `torch.compile`, on a CPU: all layers are one operation of the native kernels.

A model is found by a number, as graphs hold tensors and numbers alone. Between two looks at its modules, which take Python, the
operation goes from PyTorch to the kernels directly, where PyTorch has an interface for that.
"""

import ctypes
import functools
import os
import weakref
from typing import Optional

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from .compiling_kimi_k26 import address, i64
from .decoding_kimi_k26 import NativeDecoder, count_tokens, decoder_of, fits, serves_step
from .graph_kernels_kimi_k26 import VERSION
from .native_kimi_k26 import fields, library


STEPS = 15  # of a sequence between two looks
NAMESPACE = __name__.replace(".", "_")  # of operations: the module's, which may be loaded more than once
# What the kernels ask of PyTorch, in the order of their table: of version 2.13 or later.
INTERFACE = """
    aoti_torch_get_data_ptr aoti_torch_get_sizes aoti_torch_get_strides aoti_torch_is_contiguous aoti_torch_empty_strided
    aoti_torch_delete_tensor_object torch_list_size torch_list_get_item torch_delete_list torch_delete_stable_ivalue
    torch_get_num_threads torch_call_dispatcher torch_exception_get_what_without_backtrace
""".split()
_FILE = __file__.encode()  # PyTorch keeps its address

_models: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_watched: weakref.WeakSet = weakref.WeakSet()  # decoders whose end makes no graph ready any more

# Defined plainly, for what `torch.library.custom_op` puts around costs as much as the graph saves.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name in ("decode", "decode_slowly"):
    _library.define(
        f"{_name}(Tensor x, Tensor cos, Tensor sin, Tensor at, Tensor? padding, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor? head, "
        "int model) -> (Tensor, Tensor, Tensor)"
    )


class Ready(ctypes.Structure):
    """`Ready` of the source: how the next steps of a model may go without a look at its modules."""

    _fields_ = [
        ("layers", address),
        ("count", i64),
        ("norm", address),
        ("eps", ctypes.c_float),
        *fields(i64, "rows hidden routing experts top_k"),
        ("where", address),
        *fields(i64, "past steps"),
    ]


def _decode(x, cos, sin, at, padding, keys: list[torch.Tensor], values: list[torch.Tensor], head, model: int):
    """One new token of each row, at the place `at` of static caches, through all layers of a text model, its last norm and an
    output layer; all that the kernels build on is looked at before."""
    owner, past = _models[model], int(at)
    if keys[0].shape[0] != x.shape[0]:
        raise ValueError(f"the static cache has room for {keys[0].shape[0]} sequences, and there are {x.shape[0]}")
    if past >= keys[0].shape[2]:
        raise ValueError(f"the static cache has room for {keys[0].shape[2]} tokens, and one comes at place {past}")
    if padding is not None and (padding.shape[0] != x.shape[0] or padding.shape[1] <= past):
        raise ValueError(f"attention_mask is {tuple(padding.shape)}, but {x.shape[0]} sequences have {past + 1} tokens")
    decoder = decoder_of(owner, keys[0].data_ptr(), past)
    widths = decoder.parts[0].widths
    if not all(fits(held, x, keys[0].shape[2], width) for place in zip(keys, values) for held, width in zip(place, widths)):
        raise ValueError(f"the static cache holds {tuple(keys[0].shape)} and {tuple(values[0].shape)}, not latents and rotary keys {widths} wide")
    if not decoder.fits:
        raise RuntimeError("the layers have changed since the model was compiled; compile it again")
    out = decoder.run(x, (cos, sin), padding, [(*place, past) for place in zip(keys, values)], head)
    # Under a budget the store is asked each time.
    if _direct() is library() and not any(experts.store.bounded for experts in decoder.experts[:1]):
        _make_ready(decoder, model, x, keys[0].data_ptr(), past + 1)
    return out


def _make_ready(decoder: NativeDecoder, model: int, x: torch.Tensor, where: int, past: int):
    """Let the next steps of a sequence go to the kernels directly."""
    if decoder not in _watched:
        weakref.finalize(decoder, library().kimi_unready, i64(model), None).atexit = False
        _watched.add(decoder)
    ready = Ready(ctypes.addressof(decoder.calls), len(decoder.calls), decoder.norm, decoder.eps, x.shape[0], x.shape[2])
    ready.routing, ready.experts, ready.top_k = len(decoder.experts), decoder.routed, decoder.top_k
    ready.where, ready.past, ready.steps = where, past, STEPS
    used = library().kimi_ready(i64(model), ctypes.byref(ready))
    if decoder.experts:
        decoder.experts[0].store.hits += used  # nobody was asked


def look_again(model: nn.Module):
    """Let the next step look at all layers, in a graph too: there is a new prompt."""
    if model.native is not None:
        model.native.look_again()
    if id(model) in _models and _direct() is not None:
        _direct().kimi_unready(i64(id(model)), None)


def _decoded(x, cos, sin, at, padding, keys, values, head, model):
    """Empty tensors in the shape of the result."""
    routing = [layer.mlp.gate.weight.shape[0] for layer in _models[model].layers if hasattr(layer.mlp, "gate")]
    logits = x.new_empty(len(routing), x.shape[0], max(routing, default=0), dtype=torch.float32)
    return torch.empty_like(x), logits, x.new_empty(x.shape[0], 1, 0 if head is None else head.shape[0])


torch.library.register_fake(f"{NAMESPACE}::decode", _decoded, lib=_library)
_operation = getattr(torch.ops, NAMESPACE).decode.default


@functools.cache
def _direct() -> Optional[ctypes.CDLL]:
    """The kernels that PyTorch calls without Python; `None` where it has no interface for that. Gives it the operation."""
    try:
        pytorch = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        table = (address * len(INTERFACE))(*(ctypes.cast(getattr(pytorch, name), address) for name in INTERFACE))
        begin, add = pytorch.aoti_torch_library_init_impl, pytorch.torch_library_impl
    except (OSError, AttributeError):
        _library.impl("decode", _decode, "CPU")
        return None
    kernels, handle = library(), address()  # which stays, or the operation would go
    kernels.kimi_torch(table)
    failed = begin(NAMESPACE.encode(), b"CPU", _FILE, 0, ctypes.byref(handle))
    if failed or add(handle, b"decode", ctypes.cast(kernels.kimi_step, address), ctypes.c_uint64(VERSION)):
        raise RuntimeError(f"PyTorch does not take {NAMESPACE}::decode")
    _library.impl("decode_slowly", _decode, "CPU")
    return kernels


@torch.compiler.assume_constant_result
def _number(model: nn.Module) -> int:
    """What stands for a text model in a graph; 0 where the kernels cannot compute its layers."""
    if library() is None:
        return 0
    decoder, number, direct = decoder_of(model), id(model), _direct()
    if direct is not None and _models.get(number) is not model:
        direct.kimi_graph(i64(number), f"{NAMESPACE}::decode_slowly".encode())
        weakref.finalize(model, direct.kimi_no_graph, i64(number)).atexit = False
    _models[number] = model
    return number if decoder.fits else 0


def compiled_decode(model: nn.Module, x: torch.Tensor, rotary, span, past_key_values: Cache, head: Optional[torch.Tensor]):
    """What a [`NativeDecoder`] gives, while a graph is being made: over a static cache; `None` where it cannot serve.

    PyTorch looks at all that is looked at here before each run of the graph: the less, the faster.
    """
    if x.shape[1] != 1 or not serves_step(model, x, span, past_key_values):
        return None
    caches = getattr(past_key_values, "layers", ())
    for cache in caches:
        if type(cache) is not StaticLayer or cache.keys is None or cache.keys.dtype != x.dtype:
            return None
    number = _number(model)
    if not number or len(caches) != _count(model):
        return None
    keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
    out = _operation(x, *rotary, span.query_index.long(), span.padding, keys, values, head, number)
    for cache in caches:
        count_tokens(cache, 1)
    return out


@torch.compiler.assume_constant_result
def _count(model: nn.Module) -> int:
    return len(model.layers)
