"""`kimi-k26 quantize IN OUT`: a checkpoint's routed experts become INT4 words, or words become plain weights again.

Shard by shard and tensor by tensor, so that memory holds one weight at a time. Each shard is written under another name
and renamed when it is whole; a run that was killed goes on where it was, once the finished shards are verified.

To INT4: a bfloat16 weight is rounded exactly as compressed-tensors rounds it; a float32 weight is rounded from its own
values, against a scale kept in bfloat16. To bfloat16: a weight is its stored value times its scale, rounded to bfloat16
(and written as float32 where that is the dtype of the config). This loses nothing, but it is not undone by rounding to
INT4 again: that takes new scales from the largest weight of each group. All other tensors keep every bit, and all files
that are no weights are copied.
"""

import copy
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from . import CommandError
from .switch import locked

GROUP_SIZE = 32  # inputs per scale, as published
RECORD = ".kimi-k26-quantize.json"  # in OUT while a conversion is under way
CHUNK = 2**24  # bytes copied at once
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
PARTS = ("weight_packed", "weight_scale", "weight_shape")

# The published block: what compressed-tensors writes for these weights.
BLOCK = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP_SIZE,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def add_arguments(parser) -> None:
    parser.add_argument("source", metavar="IN", type=Path, help="the checkpoint folder to read")
    parser.add_argument("target", metavar="OUT", type=Path, help="the folder to write: new, empty, or an unfinished one")
    parser.add_argument("--to", choices=("int4", "bfloat16"), default="int4", help="what experts become (%(default)s)")


def run(args) -> int:
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        lines = convert(args.source, args.target, args.to, show_progress=True)
    except OSError as error:
        again = "run the command again to go on from there"
        raise CommandError(f"{error.filename or args.target}: {error.strerror or error}; {again}") from error
    finally:
        logging.set_verbosity(verbosity)
    for line in lines:
        print(line)
    return 0


@dataclass
class Piece:
    """One tensor of OUT: its header entry, and the tensor of IN that it comes from."""

    name: str
    dtype: str  # as headers write it
    shape: tuple[int, ...]
    size: int  # bytes
    source: str
    begin: int = 0


def convert(source: Path, target: Path, to: str = "int4", show_progress: bool = False) -> list[str]:
    """Writes the checkpoint `source` to `target` with its routed experts in another form.

    Args:
        source: A checkpoint of this model, bfloat16 or float32 outside the experts.
        target: The folder to write.
        to: "int4" or "bfloat16".
        show_progress: Whether a bar on standard error shows how much of IN has been read.

    Returns:
        Lines that say what was done.

    Raises:
        CommandError: IN is damaged, or in that form already, or its widths do not divide; OUT holds something else, or another run is at work there.
        OSError: A file could not be read or written. The same call again goes on from there.
    """
    import torch
    from tqdm import tqdm

    from ..checkpoint_kimi_k26 import SINGLE_FILE, Checkpoint, CheckpointError

    source, target = (Path(os.path.realpath(path)) for path in (source, target))
    if source == target or source in target.parents or target in source.parents:
        raise CommandError(f"IN and OUT must be apart: {source} and {target}")
    old_config, new_config = _configs(source, to)
    try:
        checkpoint = Checkpoint(source)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    findings = checkpoint.findings + list(checkpoint.compare(*_on_meta(old_config)))
    if findings:
        raise CommandError(str(CheckpointError(source, findings)))
    experts = _experts(new_config if to == "int4" else old_config)
    dtype = getattr(torch, _dtype(old_config))
    plans = {shard.name: _plan(shard, experts, to, dtype) for shard in checkpoint.shards}
    plans = {name: pieces for name, pieces in plans.items() if pieces}
    others = sorted(path.name for path in source.iterdir() if _is_other(path))

    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        record = _begin(source, target, to, checkpoint, [*plans, *others])
        needed = sum(piece.size for name, pieces in plans.items() if name not in record["done"] for piece in pieces)
        if shutil.disk_usage(target).free < needed:
            raise CommandError(f"{target} has not enough room: {needed / 2**20:,.0f} MiB more are needed")
        kept = 0
        total = sum(_read_size(checkpoint, pieces) for pieces in plans.values())
        with tqdm(total=total, desc="Converting", unit="B", unit_scale=True, file=sys.stderr, disable=not show_progress) as progress:
            for name, pieces in plans.items():
                if name in record["done"] and _checksum(target / name) == record["done"][name]:
                    kept += 1
                    progress.update(_read_size(checkpoint, pieces))
                    continue
                _write_shard(target / name, pieces, checkpoint, dtype, to, progress)
                record["done"][name] = _checksum(target / name)
                _write_json(target / RECORD, record)
        for name in others:
            _copy(source / name, target / name)
        if set(plans) != {SINGLE_FILE}:
            _write_json(target / "model.safetensors.index.json", _index(plans))
        _write_json(target / "config.json", new_config)  # last, as without it the folder loads nowhere
        written = Checkpoint(target)
        findings = written.findings + list(written.compare(*_on_meta(new_config)))
        if findings:
            raise CommandError(str(CheckpointError(target, findings)))
        os.unlink(target / RECORD)
        size = sum(piece.size for pieces in plans.values() for piece in pieces)
        lines = [f"{target}: {len(experts):,} expert weights as {to}, {len(plans)} files, {size / 2**30:,.2f} GiB"]
        return lines + ([f"{kept} files were there from an earlier run, and sound"] if kept else [])


# ---- What is to be written ----


def _configs(source: Path, to: str) -> tuple[dict, dict]:
    """`config.json` as it is and as it will be."""
    from .. import KimiK26Config
    from ..checkpoint_kimi_k26 import names_twice, read_json

    try:
        old = read_json((source / "config.json").read_bytes())
        twice = names_twice(old)
        if twice:
            raise ValueError(f"{twice[0]} is listed twice")
        config = KimiK26Config(**old)
    except FileNotFoundError:
        raise CommandError(f"{source} has no config.json") from None
    except (ValueError, TypeError) as error:
        raise CommandError(f"config.json: {error}") from None
    new, block = copy.deepcopy(old), config.text_config.expert_quantization
    new.setdefault("text_config", {})
    if config.text_config.n_routed_experts is None:
        raise CommandError(f"{source} has no routed experts, and nothing else is quantized")
    if _dtype(old) not in ("bfloat16", "float32"):
        raise CommandError(f"config.json: dtype must be bfloat16 or float32, got {_dtype(old)}")
    if to == "int4":
        if block is not None:
            raise CommandError(f"the experts of {source} are INT4 already")
        new["text_config"]["quantization_config"] = copy.deepcopy(BLOCK)
        try:
            KimiK26Config(**new)
        except ValueError as error:  # widths that groups do not divide
            raise CommandError(f"config.json: {error}") from None
    else:
        if block is None:
            raise CommandError(f"the experts of {source} are not INT4")
        for part in (new, new["text_config"]):
            part.pop("quantization_config", None)
    return old, new


def _dtype(config: dict) -> str:
    return config.get("dtype") or config.get("torch_dtype") or "bfloat16"


def _on_meta(config: dict) -> tuple:
    """The model of a config without memory, and the dtype of its plain weights."""
    import torch

    from .. import KimiK26Config, KimiK26ForConditionalGeneration

    with torch.device("meta"):
        model = KimiK26ForConditionalGeneration(KimiK26Config(**config))
    return model, getattr(torch, _dtype(config))


def _experts(config: dict) -> set[str]:
    """Names of the modules whose weights are INT4 words under `config`."""
    from ..quantization_kimi_k26 import KimiK26Int4Linear

    return {name for name, module in _on_meta(config)[0].named_modules() if isinstance(module, KimiK26Int4Linear)}


def _plan(shard, experts: set[str], to: str, dtype) -> list[Piece]:
    """The tensors that come of a shard, with their places: larger elements first, so that all are aligned."""
    from ..checkpoint_kimi_k26 import DTYPES
    from ..quantization_kimi_k26 import VALUES_PER_WORD

    letters = {dtype: name for name, dtype in DTYPES.items()}
    pieces = []

    def add(name, letter, shape, origin):
        size = DTYPES[letter].itemsize
        for side in shape:
            size *= side
        pieces.append(Piece(name, letter, shape, size, origin))

    for name, entry in sorted(shard.entries.items(), key=lambda item: item[1].begin):
        stem, _, kind = name.rpartition(".")
        if stem not in experts:
            add(name, letters[entry.dtype], entry.shape, name)
        elif to == "int4":
            rows, columns = entry.shape
            add(f"{stem}.weight_packed", "I32", (rows, columns // VALUES_PER_WORD), name)
            add(f"{stem}.weight_scale", "BF16", (rows, columns // GROUP_SIZE), name)
            add(f"{stem}.weight_shape", "I32", (2,), name)
        elif kind == "weight_packed":  # it brings its scales along, wherever they are
            rows, words = entry.shape
            add(f"{stem}.weight", letters[dtype], (rows, words * VALUES_PER_WORD), name)
    pieces.sort(key=lambda piece: -DTYPES[piece.dtype].itemsize)
    at = 0
    for piece in pieces:
        piece.begin = at
        at += piece.size
    return pieces


def _index(plans: dict[str, list[Piece]]) -> dict:
    where = {piece.name: name for name, pieces in plans.items() for piece in pieces}
    total = sum(piece.size for pieces in plans.values() for piece in pieces)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def _is_other(path: Path) -> bool:
    """Whether a file or folder of IN is copied as it is: no weights, and no hidden folder."""
    if path.is_dir():
        return not path.name.startswith(".") and path.name != "__pycache__"
    return path.is_file() and path.name not in ("config.json", RECORD) and not path.name.endswith(WEIGHT_FILES)


# ---- Writing ----


def _begin(source: Path, target: Path, to: str, checkpoint, names: list[str]) -> dict:
    """The record of this conversion: that of the run before, where `target` holds one."""
    files = [source / "config.json", *(shard.path for shard in checkpoint.shards)]
    state = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    record = {"source": str(source), "to": to, "files": state, "done": {}}
    present = {path.name for path in target.iterdir()}
    if not present:
        _write_json(target / RECORD, record)
        return record
    if RECORD not in present:
        started = present == {_partial(RECORD)}  # killed before the record was whole
        if not started:
            raise CommandError(f"{target} is not empty, and holds no unfinished conversion")
        _write_json(target / RECORD, record)
        return record
    try:
        before = json.loads((target / RECORD).read_text())
        same = {key: before[key] for key in ("source", "to", "files")} == {k: v for k, v in record.items() if k != "done"}
        record["done"] = dict(before["done"])
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{target / RECORD} is malformed: empty the folder and begin again") from None
    if not same:
        raise CommandError(f"{target} holds an unfinished conversion of other files; empty it, or name another folder")
    names = [*names, RECORD, "config.json", "model.safetensors.index.json"]
    foreign = present - set(names) - {_partial(name) for name in names}
    if foreign:
        raise CommandError(f"{target} holds what this conversion does not write: {', '.join(sorted(foreign))}")
    return record


def _write_shard(path: Path, pieces: list[Piece], checkpoint, dtype, to: str, progress) -> None:
    header = {"__metadata__": {"format": "pt"}}
    for piece in pieces:
        offsets = [piece.begin, piece.begin + piece.size]
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {piece.name: piece for piece in pieces}
    partial = path.with_name(_partial(path.name))
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for origin in dict.fromkeys(piece.source for piece in pieces):
            if origin in places:  # as it is
                file.seek(8 + len(text) + places[origin].begin)
                for raw in checkpoint.where[origin].bytes_of(origin, CHUNK):
                    file.write(raw)
            else:
                for name, tensor in _converted(origin, checkpoint, dtype, to).items():
                    file.seek(8 + len(text) + places[name].begin)
                    file.write(_raw(tensor))
            progress.update(_size(checkpoint, origin))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _converted(origin: str, checkpoint, dtype, to: str) -> dict:
    """The tensors that come of one expert weight."""
    import torch

    from ..quantization_kimi_k26 import dequantize_int4, quantize_int4

    stem, shard = origin.rpartition(".")[0], checkpoint.where[origin]
    tensor = shard.read(origin)
    if to == "int4":
        if not tensor.isfinite().all():
            raise CommandError(f"{shard.name}: {origin}: holds NaN or infinity")
        words, scale = quantize_int4(tensor, GROUP_SIZE)
        shape = torch.tensor(tensor.shape, dtype=torch.int32)
        return {f"{stem}.{part}": value for part, value in zip(PARTS, (words, scale, shape))}
    scale_name = f"{stem}.weight_scale"
    weight = dequantize_int4(tensor, checkpoint.where[scale_name].read(scale_name), dtype)
    if not weight.isfinite().all():
        raise CommandError(f"{checkpoint.where[scale_name].name}: {scale_name}: holds NaN or infinity")
    return {f"{stem}.weight": weight}


def _raw(tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _size(checkpoint, name: str) -> int:
    entry = checkpoint.where[name].entries[name]
    return entry.end - entry.begin


def _read_size(checkpoint, pieces: list[Piece]) -> int:
    return sum(_size(checkpoint, origin) for origin in {piece.source for piece in pieces})


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file; None where there is none."""
    if not path.is_file():
        return None
    value = 0
    with open(path, "rb") as file:
        while raw := file.read(CHUNK):
            value = zlib.crc32(raw, value)
    return value


def _partial(name: str) -> str:
    return f".{name}.partial"


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(_partial(path.name))
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(_partial(target.name))
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, partial)
        os.replace(partial, target)
