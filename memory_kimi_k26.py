"""Main memory as the system gives it: parameters that are maps of files, which it can be asked for early and have back, and large
pages, which it finds faster than small ones."""

import ctypes
import functools
import math
import mmap
from collections.abc import Iterable, Iterator
from typing import Optional

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary


LARGE_PAGE = 1 << 21  # bytes
ALIGNED = 64  # bytes: parameters begin with a line of the processor's caches


def new_room(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`like.new_empty(shape)`, on Linux in large pages where it fills some: a step that reads long contexts spent a tenth of
    its time looking up small ones."""
    size = math.prod(shape) * like.element_size()
    memory = None
    if like.device.type == "cpu" and size >= LARGE_PAGE and not torch.compiler.is_dynamo_compiling():
        memory = _large_pages(size)
    if memory is None:
        return like.new_empty(shape)
    return memory[:size].view(like.dtype).view(shape)


def _large_pages(size: int) -> Optional[torch.Tensor]:
    """Bytes in large pages, or `None` where the system has none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    held = torch.frombuffer(memory, dtype=torch.uint8)
    return held[-held.data_ptr() % LARGE_PAGE :]


_in_files = WeakTensorKeyDictionary()  # of parameters that have settled: what they were


def settle(*modules: torch.nn.Module):
    """Copy memory-mapped parameters into large pages, where the system has them, and give back what held them.

    For what is read with every token: a twentieth of a step went into looking up small pages.
    """
    parameters = list(_as_in_file(modules))
    places, size = [], 0
    for parameter in parameters:
        places.append(size)
        size += -(-parameter.nbytes // ALIGNED) * ALIGNED
    with torch.inference_mode(False), torch.no_grad():  # parameters outlive the mode they are first used in
        memory = _large_pages(size) if size >= LARGE_PAGE else None
        if memory is None:
            return
        copies = []
        for parameter, at in zip(parameters, places):
            # A storage of its own, by which the library's saver tells tensors that share memory.
            own = torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=parameter.nbytes, offset=at)
            copies.append(own.view(parameter.dtype).view(parameter.shape).copy_(parameter))
        release(*modules)
        for parameter, copy in zip(parameters, copies):
            _in_files[parameter] = parameter.data
            parameter.data = copy


def unsettle(*modules: torch.nn.Module):
    """Let parameters that have settled be maps of their files again, but for those that have been written to since."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            in_file = _in_files.pop(parameter, None)
            stays = in_file is None or (parameter.dtype, parameter.device) != (in_file.dtype, in_file.device)
            if not stays and torch.equal(parameter, in_file):
                parameter.data = in_file


def release(*modules: torch.nn.Module):
    """Give back the memory of memory-mapped parameters; they are read from their files again when they are next used.

    Leaves alone what lies elsewhere by now (casts, moves) or has been written to since it was mapped.
    """
    for first, end in _mapped(modules):
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: the others have neighbours
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first and not _has_own_pages(first, end):
            _advise(first, end, "MADV_DONTNEED")


def read_ahead(*modules: torch.nn.Module):
    """Ask the system to read memory-mapped parameters from their files, all at once and without waiting for them."""
    for first, end in _mapped(modules):
        _advise(first // mmap.PAGESIZE * mmap.PAGESIZE, end, "MADV_WILLNEED")


def _as_in_file(modules: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """Memory-mapped parameters that have neither been moved nor written to."""
    for module in modules:
        for part in module.modules():
            for parameter in part._parameters.values():
                if parameter is None or parameter.is_inference():  # which counts no versions
                    continue
                if getattr(parameter, "as_in_file", None) == (parameter.data_ptr(), parameter._version):
                    yield parameter


def _mapped(modules: Iterable[torch.nn.Module]) -> list[tuple[int, int]]:
    """Where memory-mapped parameters lie, addresses of first bytes and ends; neighbours in a file are one piece."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted((parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes) for parameter in _as_in_file(modules)):
        if merged and merged[-1][1] == first:
            first, _ = merged.pop()
        merged.append((first, end))
    return merged


def _advise(first: int, end: int, advice: str):
    """Tell the system what is to become of the pages from an address on, where it takes such advice."""
    if hasattr(mmap, advice):
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(getattr(mmap, advice)))


def _has_own_pages(first: int, last: int) -> bool:
    """Whether a page between two addresses is not, or no longer, a page of a file, as far as the system tells.

    What is written through `parameter.data`, as adapters are merged, does not count as a version of the parameter.
    """
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:  # 8 bytes each
            pages.seek(first // mmap.PAGESIZE * 8)
            flags = np.frombuffer(pages.read((last - first) // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return False
    present, swapped, of_file = (flags >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    return bool(((present & ~of_file) | swapped).any())


@functools.cache
def _libc():
    return ctypes.CDLL(None)
