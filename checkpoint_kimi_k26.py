"""Shards on disk: safetensors headers read and checked, tensors as memory maps.

A checkpoint of hundreds of GiB opens in seconds: a tensor is a view of the file, and its bytes are read when they are
first used. Whatever is wrong with the files is found before anything is built from them.
"""

import json
import math
import mmap
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The safetensors format: https://github.com/huggingface/safetensors#format
HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER = 100_000_000
FORMATS = ("pt", "mlx")  # what `__metadata__` may say the tensors were written for
SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
FEW = 8  # findings of one kind are given one by one up to so many, else as one
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


_TWICE = object()  # the key under which `read_json` notes the names that an object has more than once


def read_json(text: bytes) -> dict:
    """A JSON object; names that are listed twice in it, or in an object of it, are under the key `_TWICE` there.

    Raises:
        ValueError: it is no JSON, or no object.
    """

    def build(pairs):
        built = dict(pairs)
        if len(built) < len(pairs):
            built[_TWICE] = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        return built

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=build)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 and endless numbers are ValueErrors too
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"is not an object but a {type(content).__name__}")
    return content


def names_twice(content) -> list[str]:
    """The names that objects inside the result of [`read_json`] have more than once; they are taken out of it."""
    found, parts = [], [content]
    for part in parts:  # which grow
        if isinstance(part, dict):
            found += part.pop(_TWICE, [])
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return found


def _together(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Tensors that the same thing is wrong with, as (name, what to add to the problem): many become one."""
    names = list(names)
    if len(names) <= FEW:
        yield from ((name, "") for name in names)
    else:
        yield names[0], f", and {len(names) - 1} more tensors alike"


def _by_module(names: set[str], others: set[str]) -> Iterator[tuple[str, int, str]]:
    """Tensors by the largest module of which all tensors are among them: (first name, how many more, module).

    Args:
        names: of the tensors.
        others: names of tensors that are not among them, which divide them into modules.
    """
    shared = {name[:end] for name in others for end in _dots(name)} if names else set()
    groups = defaultdict(list)
    for name in sorted(names):
        groups[next((name[:end] for end in _dots(name) if name[:end] not in shared), name)].append(name)
    for module, group in groups.items():
        yield group[0], len(group) - 1, module


def _dots(name: str) -> list[int]:
    return [at for at, letter in enumerate(name) if letter == "."]


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
        self.data_begin = self.size = 0  # bytes, as the header has them; 0 where it is damaged
        self.in_place = False  # whether every tensor lies where it should, so that its bytes can be judged
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
            text = file.read(length)
        self.size = size
        if not text.startswith(b"{"):
            raise ValueError(f"the header is not valid JSON: it begins with {text[:8]!r}")
        try:
            header = read_json(text)
        except ValueError as error:
            raise ValueError(f"the header {error}") from None
        for name in header.pop(_TWICE, ()):
            self._report(name, "is listed twice in the header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._report("__metadata__", "must be an object of strings")
        elif metadata.get("format", FORMATS[0]) not in FORMATS:
            self._report("__metadata__", f"says format {metadata['format']!r}; known are {', '.join(FORMATS)}")
        for name, fields in header.items():
            entry = self._entry(name, fields)
            if entry is not None:
                self.entries[name] = entry
        self._check_places(size - self.data_begin)

    def _entry(self, name, fields) -> Optional[Entry]:
        if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
            return self._report(name, "must have dtype, shape and data_offsets in the header")
        for key in fields.get(_TWICE, ()):
            self._report(name, f"has {key} twice in the header")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
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
        whole = not self.findings  # else what is missing from the header leaves gaps of its own
        at, before, behind = 0, None, []
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < at:
                self._report(name, f"begins at byte {entry.begin}, inside {before} (which ends at {at})")
            elif entry.begin > at and whole and not self.findings:
                self._report(name, f"begins at byte {entry.begin}, but the data before it ends at {at}")
            if entry.end > available:
                behind.append(name)
            if entry.end >= at:
                at, before = entry.end, name
        if behind:
            more = f", and {len(behind) - 1} more tensors lie behind it" if len(behind) > 1 else ""
            end = self.entries[behind[0]].end
            self._report(behind[0], f"ends at byte {end}, but the file holds {available} bytes of data{more}")
        elif at < available and whole and not self.findings:
            self._report(None, f"holds {available - at} bytes behind its last tensor")
        self.in_place = whole and not self.findings

    def bytes_of(self, name: str, chunk: int) -> Iterator[memoryview]:
        """The bytes of a tensor, `chunk` at a time, in one buffer that is used again; nothing stays mapped.

        Raises:
            OSError: the file cannot be read to the tensor's end.
        """
        entry = self.entries[name]
        buffer = bytearray(min(chunk, entry.end - entry.begin))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.data_begin + entry.begin)
            for begin in range(entry.begin, entry.end, chunk):
                view = memoryview(buffer)[: min(chunk, entry.end - begin)]
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError(f"{self.path}: {name}: the file ends inside it")
                    done += count
                yield view

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own; nothing stays mapped."""
        entry = self.entries[name]
        size = entry.end - entry.begin
        if not size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(next(self.bytes_of(name, size)), dtype=entry.dtype).view(entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the memory-mapped file: private, so that writing to it leaves the file as it is.

        Each tensor has a storage of its own, by which the library's saver tells tensors that share memory.
        """
        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._bytes is None:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        first = self.data_begin + entry.begin
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=entry.end - entry.begin, offset=first)
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
        leftovers (`list[Finding]`): what is odd and hinders no loading: files that look like weights and are no part of
            the checkpoint (the library's `save_pretrained` leaves old ones behind), an index with a wrong total size
            (widely used checkpoints have one).

    Raises:
        FileNotFoundError: when the folder has neither of the two files.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.findings: list[Finding] = []
        self.leftovers: list[Finding] = []
        index, names = self._choose_files()
        self.shards = []
        for name in names:
            path = self.folder / name
            if path.is_file():
                self.shards.append(Shard(path))
            else:
                what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "missing"
                whence = f", though {INDEX_FILE} names it" if index else ""
                self.findings.append(Finding(name, None, f"is {what}{whence}"))
        self.where: dict[str, Shard] = {}
        twice = defaultdict(list)
        for shard in self.shards:
            self.findings += shard.findings
            for name in shard.entries:
                if self.where.setdefault(name, shard) is not shard:
                    twice[shard.name, self.where[name].name].append(name)
        for (file, other), names in twice.items():
            self._report_all(file, names, f"is in {other} as well")
        # Files whose content is not known, and tensors that are missed for a reason already given.
        self._listed = index is not None
        self._broken = {finding.file for finding in self.findings if finding.tensor is None}
        self._explained = {finding.tensor for finding in self.findings}
        if index:
            self._explained |= {name for name, file in index.items() if file in self._broken}
            self._check_index(index)

    def _report_all(self, file, names, problem):
        self.findings += [Finding(file, name, problem + more) for name, more in _together(names)]

    def _choose_files(self) -> tuple[Optional[dict[str, str]], list[str]]:
        """The index (`None` where it does not count) and the names of the shards."""
        single, index = (os.path.lexists(self.folder / name) for name in (SINGLE_FILE, INDEX_FILE))
        if not single and not index:
            raise FileNotFoundError(f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}")
        shards = sorted(path.name for path in self.folder.iterdir() if SHARD_NAME.fullmatch(path.name))
        weight_map = self._read_index() if index else None
        if single and not (weight_map and set(weight_map.values()) == {SINGLE_FILE}):
            # The single file goes before an index, as in the library.
            if index:
                problem = f"stands beside {SINGLE_FILE}, which goes before it, but names other files"
                self.leftovers.append(Finding(INDEX_FILE, None, problem))
            return None, [SINGLE_FILE]
        names = sorted(set(weight_map.values())) if weight_map else shards
        for name in shards:
            if name not in names:
                self.leftovers.append(Finding(name, None, f"is not named in {INDEX_FILE}"))
        return weight_map, names

    def _read_index(self) -> Optional[dict[str, str]]:
        def wrong(problem, name=None):
            self.findings.append(Finding(INDEX_FILE, name, problem))

        try:
            content = read_json((self.folder / INDEX_FILE).read_bytes())
        except (OSError, ValueError) as error:
            return wrong(str(error))
        for name in names_twice(content):
            wrong("is listed twice", name)
        metadata, weight_map = content.get("metadata"), content.get("weight_map")
        if not isinstance(metadata, dict) or "total_size" not in metadata:
            self.leftovers.append(Finding(INDEX_FILE, None, "should have metadata, an object with total_size"))
            metadata = {}
        self._total_size = metadata.get("total_size")
        if not isinstance(weight_map, dict) or not weight_map:
            return wrong("must have a weight_map, an object of tensor → file")
        good = {}
        for name, file in weight_map.items():
            if isinstance(file, str) and file and Path(file).name == file:
                good[name] = file
            else:
                wrong(f"is mapped to {file!r}, which is no file of the folder", name)
        return good

    def _check_index(self, index: dict[str, str]):
        said = Counter(finding.tensor for finding in self.findings if finding.file == INDEX_FILE)
        entries = {shard.name: shard.entries for shard in self.shards}
        absent, elsewhere, unlisted = defaultdict(list), defaultdict(list), defaultdict(list)
        for name, file in index.items():
            shard = self.where.get(name)
            if shard is None and name not in self._explained:
                absent[file].append(name)
            elif shard is not None and shard.name != file and name not in entries.get(file, ()):
                elsewhere[file, shard.name].append(name)
        for name, shard in self.where.items():
            if name not in index and name not in said:
                unlisted[shard.name].append(name)
        for file, names in absent.items():
            self._report_all(INDEX_FILE, names, f"is said to be in {file}, which does not have it")
            self._explained.update(names)
        for (file, other), names in elsewhere.items():
            self._report_all(INDEX_FILE, names, f"is said to be in {file}, but is in {other}")
        for file, names in unlisted.items():
            self._report_all(INDEX_FILE, names, f"is in {file}, but not in the index")
        size = sum(entry.end - entry.begin for shard in self.shards for entry in shard.entries.values())
        if not self.findings and self._total_size is not None and self._total_size != size:
            self.leftovers.append(Finding(INDEX_FILE, None, f"says total_size {self._total_size!r}; the shards hold {size}"))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, memory-mapped (see [`Shard.tensor`])."""
        return self.where[name].tensor(name)

    def beyond(self, model: torch.nn.Module) -> list[str]:
        """Names of tensors that the model has no place for."""
        return sorted(self.where.keys() - {name for name, _ in model.named_parameters()})

    def compare(self, model: torch.nn.Module, dtype: Optional[torch.dtype], may_be_part: bool = False) -> Iterator[Finding]:
        """Compare names, shapes and dtypes with those of a model (which may be on `meta`).

        What is wrong with many tensors in the same way is one finding, with the first of them.

        Args:
            model (`nn.Module`): its parameters have the published names and shapes.
            dtype (`torch.dtype`, *optional*): the config's. A parameter that is no plain weight (integers, and what
                its module lists in `kept`) has a dtype of its own.
            may_be_part (`bool`): the model need not have a place for every tensor.
        """
        expected, shapes, dtypes = set(), defaultdict(list), defaultdict(list)
        for prefix, module in model.named_modules():
            kept = getattr(module, "kept", {})
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}"
                expected.add(name)
                if name not in self.where:
                    continue
                entry, shape = self.where[name].entries[name], tuple(parameter.shape)
                if entry.shape != shape:
                    problem = f"has shape {list(entry.shape)}; the config wants {list(shape)}"
                    shapes[re.sub(r"\d+", "*", name), problem].append(name)
                own = key in kept or not parameter.dtype.is_floating_point
                wanted = parameter.dtype if own else dtype or entry.dtype
                if entry.dtype != wanted:
                    problem = f"has dtype {_name(entry.dtype)}; the config wants {_name(wanted)}"
                    dtypes[problem].append(name)
        packed, wanted = (any(name.endswith(".weight_packed") for name in names) for names in (self.where, expected))
        if packed != wanted and not self._broken:
            had, has = ("INT4 words", "no") if packed else ("plain weights", "a")
            yield Finding("config.json", None, f"has {has} text_config.quantization_config, but the experts are {had}")
            return
        missing = expected - self.where.keys() - self._explained
        if self._broken and not self._listed:  # what the broken file holds is written nowhere else
            missing = set()
        file = INDEX_FILE if self._listed else SINGLE_FILE
        for name, others, module in _by_module(missing, expected - missing):
            yield Finding(file, name, "is missing" + (f", with the {others} other tensors of {module}" if others else ""))
        for (_, problem), names in shapes.items():
            yield from (Finding(self.where[name].name, name, problem + more) for name, more in _together(names))
        for problem, names in dtypes.items():
            yield from (Finding(self.where[name].name, name, problem + more) for name, more in _together(names))
        for name, others, module in _by_module(self.where.keys() - expected, expected) if not may_be_part else ():
            more = f"; so are the {others} other tensors of {module}" if others else ""
            yield Finding(self.where[name].name, name, f"is in the file, but not in the model of the config{more}")

    def fill(self, model: torch.nn.Module, progress=iter, device_of=None):
        """Put the tensors into a model on `meta`, memory-mapped where the dtype is the parameter's, else converted.

        Args:
            model (`nn.Module`): as built, on `meta`; the dtypes of its parameters are what they become.
            progress (*optional*): wraps the list of modules, to show how far it is.
            device_of (*optional*): a module's name → the device that its weights are copied to, or `None`.
        """
        for prefix, module in progress(list(model.named_modules())):
            device = device_of(prefix) if device_of is not None and module._parameters else None
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    mapped = self.tensor(f"{prefix}.{key}")
                    tensor = mapped.to(device=device, dtype=parameter.dtype)
                    filled = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    if tensor is mapped:  # see `release`
                        filled.as_in_file = (filled.data_ptr(), filled._version)
                    module._parameters[key] = filled


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
