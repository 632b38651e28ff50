"""Shards on disk: safetensors headers read and checked, tensors as memory maps.

A checkpoint of hundreds of GiB opens in seconds: a tensor is a view of the file, and its bytes are read when they are
first used. Whatever is wrong with the files is found before anything is built from them.
"""

import ctypes
import functools
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The safetensors format: https://github.com/huggingface/safetensors#format
HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a checkpoint: in which file, with which tensor (if one), and what."""

    file: str
    tensor: Optional[str]
    problem: str

    def __str__(self):
        return ": ".join(part for part in (self.file, self.tensor, self.problem) if part)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; `findings` lists all that is wrong."""

    def __init__(self, folder, findings: list[Finding], shown: int = 20):
        self.folder, self.findings = str(folder), list(findings)
        lines = [f"  {finding}" for finding in self.findings[:shown]]
        if len(self.findings) > shown:
            lines.append(f"  … and {len(self.findings) - shown} more")
        super().__init__("\n".join([f"the checkpoint in {folder} is damaged or does not fit its config:", *lines]))


@dataclass(frozen=True)
class Entry:
    """A tensor's place: dtype, shape, and the bytes `begin … end` of the shard's data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """One safetensors file. Opening it reads the header alone; damage goes to `findings`."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.entries: dict[str, Entry] = {}
        self.findings: list[Finding] = []
        self._bytes = None
        try:
            self._read_header()
        except (OSError, ValueError) as error:
            self._report(None, str(error))

    def _report(self, tensor, problem):
        self.findings.append(Finding(self.name, tensor, problem))

    def _read_header(self):
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(HEADER_LENGTH.size)
            if len(start) < HEADER_LENGTH.size:
                raise ValueError(f"the file is {size} bytes long, too short for a header")
            (length,) = HEADER_LENGTH.unpack(start)
            self.data_begin = HEADER_LENGTH.size + length
            if length > MAX_HEADER or self.data_begin > size:
                raise ValueError(f"the header says it is {length} bytes long, in a file of {size}")
            try:
                header = json.loads(file.read(length), object_pairs_hook=self._unique)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"the header is not valid JSON: {error}") from None
        self.size = size
        if not isinstance(header, dict):
            raise ValueError(f"the header is not an object but a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._report("__metadata__", "must be an object of strings")
        for name, fields in header.items():
            entry = self._entry(name, fields)
            if entry is not None:
                self.entries[name] = entry
        self._check_places(size - self.data_begin)

    def _unique(self, pairs):
        names = [name for name, _ in pairs]
        for name in {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ():
            self._report(name, "is listed twice in the header")
        return dict(pairs)

    def _entry(self, name, fields) -> Optional[Entry]:
        if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
            return self._report(name, "must have dtype, shape and data_offsets in the header")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if dtype not in DTYPES:
            return self._report(name, f"has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        for key, value, count in (("shape", shape, None), ("data_offsets", offsets, 2)):
            whole = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
            if not whole or count is not None and len(value) != count:
                return self._report(name, f"has {key} {value!r}; it must be {count or 'a list of'} integers from 0 on")
        begin, end = offsets
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != needed:
            return self._report(name, f"takes the bytes {begin} to {end}, but {dtype} {shape} needs {needed}")
        return Entry(DTYPES[dtype], tuple(shape), begin, end)

    def _check_places(self, available: int):
        """Tensors must lie side by side, without gap or overlap, and fill the file."""
        at, before = 0, None
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < at:
                self._report(name, f"begins at byte {entry.begin}, inside {before} (which ends at {at})")
            elif entry.begin > at and not self.findings:
                self._report(name, f"begins at byte {entry.begin}, but the data before it ends at {at}")
            if entry.end > available:
                self._report(name, f"ends at byte {entry.end}, but the file holds {available} bytes of data")
            if entry.end >= at:
                at, before = entry.end, name
        if at < available and not self.findings:
            self._report(None, f"holds {available - at} bytes behind its last tensor")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the memory-mapped file: private, so that writing to it leaves the file as it is."""
        entry = self.entries[name]
        if self._bytes is None:
            self._bytes = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        first = self.data_begin + entry.begin
        raw = self._bytes[first : self.data_begin + entry.end]
        if first % entry.dtype.itemsize:  # no view can begin between two elements
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)


class Checkpoint:
    """The shards of a folder in the published layout.

    Args:
        folder (`str` or `os.PathLike`): with `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Attributes:
        shards (`list[Shard]`), where (`dict[str, Shard]`): all files; the file of each tensor.
        findings (`list[Finding]`): what is wrong with the files themselves and with the index.

    Raises:
        FileNotFoundError: when the folder has neither of the two files.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.findings: list[Finding] = []
        index = None
        if (self.folder / SINGLE_FILE).is_file():  # goes before an index, as in the library
            names = [SINGLE_FILE]
        elif (self.folder / INDEX_FILE).is_file():
            index = self._read_index()
            names = sorted(set(index.values()))
        else:
            raise FileNotFoundError(f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}")
        self.shards = []
        for name in names:
            if (self.folder / name).is_file():
                self.shards.append(Shard(self.folder / name))
            else:
                self.findings.append(Finding(name, None, f"is missing, though {INDEX_FILE} names it"))
        self.where: dict[str, Shard] = {}
        for shard in self.shards:
            self.findings += shard.findings
            for name in shard.entries:
                if name in self.where:
                    self.findings.append(Finding(shard.name, name, f"is in {self.where[name].name} as well"))
                self.where.setdefault(name, shard)
        if index is not None:
            self._check_index(index)
        # Tensors that are missed for a reason already given.
        broken = {finding.file for finding in self.findings if finding.tensor is None}
        self._explained = {finding.tensor for finding in self.findings}
        self._explained |= {name for name, file in (index or {}).items() if file in broken}

    def _read_index(self) -> dict[str, str]:
        try:
            content = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            self.findings.append(Finding(INDEX_FILE, None, f"is not valid JSON: {error}"))
            return {}
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            self.findings.append(Finding(INDEX_FILE, None, "must have a weight_map, an object of tensor → file"))
            return {}
        good = {}
        for name, file in weight_map.items():
            if isinstance(file, str) and file and Path(file).name == file:
                good[name] = file
            else:
                self.findings.append(Finding(INDEX_FILE, name, f"is mapped to {file!r}, which is no file of the folder"))
        total = content.get("metadata", {}).get("total_size") if isinstance(content.get("metadata", {}), dict) else None
        self._total_size = total
        return good

    def _check_index(self, index: dict[str, str]):
        broken = {finding.file for finding in self.findings if finding.tensor is None}
        for name, file in index.items():
            shard = self.where.get(name)
            if shard is None and file not in broken:
                self.findings.append(Finding(INDEX_FILE, name, f"is said to be in {file}, which does not have it"))
            elif shard is not None and shard.name != file and name not in self._entries_of(file):
                self.findings.append(Finding(INDEX_FILE, name, f"is said to be in {file}, but is in {shard.name}"))
        for name, shard in self.where.items():
            if name not in index:
                self.findings.append(Finding(INDEX_FILE, name, f"is in {shard.name}, but not in the index"))
        size = sum(entry.end - entry.begin for shard in self.shards for entry in shard.entries.values())
        if not self.findings and self._total_size is not None and self._total_size != size:
            self.findings.append(Finding(INDEX_FILE, None, f"says total_size {self._total_size}; the shards hold {size}"))

    def _entries_of(self, file: str):
        return next((shard.entries for shard in self.shards if shard.name == file), {})

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, memory-mapped (see [`Shard.tensor`])."""
        return self.where[name].tensor(name)

    def compare(self, model: torch.nn.Module, dtype: Optional[torch.dtype]) -> Iterator[Finding]:
        """Compare names, shapes and dtypes with those of a model (which may be on `meta`).

        Args:
            model (`nn.Module`): its parameters have the published names and shapes.
            dtype (`torch.dtype`, *optional*): the config's. A parameter that is no plain weight (integers, and what
                its module lists in `kept`) has a dtype of its own.
        """
        missing_from = SINGLE_FILE if (self.folder / SINGLE_FILE).is_file() else INDEX_FILE
        expected = set()
        for prefix, module in model.named_modules():
            kept = getattr(module, "kept", ())
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}"
                expected.add(name)
                if name not in self.where:
                    if name not in self._explained:
                        yield Finding(missing_from, name, "is missing")
                    continue
                shard, shape = self.where[name], tuple(parameter.shape)
                entry = shard.entries[name]
                if entry.shape != shape:
                    yield Finding(shard.name, name, f"has shape {list(entry.shape)}; the config wants {list(shape)}")
                own = key in kept or not parameter.dtype.is_floating_point
                wanted = parameter.dtype if own else dtype or entry.dtype
                if entry.dtype != wanted:
                    yield Finding(shard.name, name, f"has dtype {_name(entry.dtype)}; the config wants {_name(wanted)}")
        for name, shard in self.where.items():
            if name not in expected:
                yield Finding(shard.name, name, "is in the file, but not in the model of the config")

    def fill(self, model: torch.nn.Module, progress=iter):
        """Put the tensors into a model on `meta`, memory-mapped where the dtype is the parameter's, else converted.

        Args:
            model (`nn.Module`): as built, on `meta`; the dtypes of its parameters are what they become.
            progress (*optional*): wraps the list of modules, to show how far it is.
        """
        for prefix, module in progress(list(model.named_modules())):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    mapped = self.tensor(f"{prefix}.{key}")
                    tensor = mapped.to(parameter.dtype)
                    filled = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    if tensor is mapped:  # see `release`
                        filled.as_in_file = filled._version
                    module._parameters[key] = filled


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def release(parameter: torch.Tensor):
    """Give back the memory of a memory-mapped parameter; it is read from its file again when it is next used.

    Does nothing for a tensor that lies elsewhere or has been written to since it was mapped.
    """
    if getattr(parameter, "as_in_file", None) != parameter._version or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-parameter.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: the others have neighbours
    last = (parameter.data_ptr() + parameter.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED))


@functools.cache
def _libc():
    return ctypes.CDLL(None)
