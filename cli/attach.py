"""`kimi-k26 attach FOLDER`: a downloaded checkpoint folder gets this project's code, and `--undo` takes it out again.

The flat code files are copied into the folder and `auto_map` in its JSON files points at them. Nothing else changes:
`model_type` and `architectures` stay, and the processor has the names by which other engines ask the published one, so
that they should still serve the folder (`docs/serving.md` says what of it was tried). What was replaced is kept in a
hidden sub-folder, from which `--undo` restores it. Either all files change or none does (`switch.py`).
"""

import ast
import functools
import hashlib
import json
import os
from pathlib import Path

from . import CommandError
from .jsontext import put
from .switch import STATE_FOLDER, Entry, apply, check_name, copy_file, locked, recover, unfinished, write_file

MODEL = "modeling_kimi_k26.KimiK26ForConditionalGeneration"
PROCESSOR = "processing_kimi_k26.KimiK26Processor"
IMAGE_PROCESSOR = "processing_kimi_k26.KimiK26ImageProcessor"
ENTRY_MODULES = ("configuration_kimi_k26", "tokenization_kimi", "processing_kimi_k26", "modeling_kimi_k26")

# File -> where in it -> the value. AutoProcessor asks processor_config.json, preprocessor_config.json,
# tokenizer_config.json and config.json in turn, and the first that names a class ends the search.
CONFIG = {
    ("auto_map", "AutoConfig"): "configuration_kimi_k26.KimiK26Config",
    ("auto_map", "AutoModel"): MODEL,
    ("auto_map", "AutoModelForCausalLM"): MODEL,
    ("auto_map", "AutoModelForImageTextToText"): MODEL,
    ("auto_map", "AutoModelForMultimodalLM"): MODEL,
}
TOKENIZER = {("auto_map", "AutoTokenizer"): ["tokenization_kimi.TikTokenTokenizer", None]}
PREPROCESSOR = {("auto_map", "AutoProcessor"): PROCESSOR, ("auto_map", "AutoImageProcessor"): IMAGE_PROCESSOR}
EVERYTHING = PREPROCESSOR | TOKENIZER | CONFIG

# The published values, for a folder that lacks them.
MEDIA_PROC_CFG = {
    "in_patch_limit": 16384,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": 2,
    "fixed_output_tokens": None,
    "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 4096,
    "in_patch_limit_video": None,
    "sample_fps": 2.0,
    "max_num_frames_each_video": None,
    "temporal_merge_kernel_size": 4,
    "timestamp_mode": "hh:mm:ss.fff",
}

TEMPLATE = "chat_template.jinja"
MODEL_TYPES = ("kimi_k25", "kimi_k26")
RECORD = f"{STATE_FOLDER}/record.json"
ORIGINALS = f"{STATE_FOLDER}/original"


def add_arguments(parser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint folder, with or without weights")
    parser.add_argument("--undo", action="store_true", help="restore the folder as it was before")
    parser.add_argument("--force", action="store_true", help="with --undo: drop changes made to the files since")
    parser.add_argument("--dry-run", action="store_true", help="say what would change and change nothing")


def run(args) -> int:
    folder = Path(os.path.realpath(args.folder))
    if not folder.is_dir():
        raise CommandError(f"{args.folder} is not a folder")
    if args.force and not args.undo:
        raise CommandError("--force goes with --undo: attaching loses no change, so it needs no force")
    with locked(folder):
        if unfinished(folder):
            if args.dry_run:
                raise CommandError("an earlier run was interrupted; run again without --dry-run to settle that first")
            side = recover(folder)
            print("an earlier run was interrupted: " + ("finished it" if side == "new" else "undid it"))
        work = functools.partial(undo, force=args.force) if args.undo else attach
        try:
            lines = work(folder, dry_run=args.dry_run)
        except OSError as error:
            raise CommandError(f"{error.filename or args.folder}: {error.strerror or error}; nothing has changed") from error
        for line in lines:
            print(line)
    return 0


def attach(folder: Path, *, dry_run: bool = False) -> list[str]:
    """Puts the code into a checkpoint folder and points its JSON files at it.

    Args:
        folder: The checkpoint folder; needs a `config.json`, the weights may be missing.
        dry_run: Only say what would change.

    Returns:
        Lines that say what was done.

    Raises:
        CommandError: The folder is no Kimi checkpoint or one of its JSON files is malformed; nothing was written.
        OSError: Something could not be read or written; nothing has changed.
    """
    record = _read_record(folder)
    wanted, notes = _wanted(folder, record)
    target: dict[str, Entry] = {}
    lines = []
    for name, data in wanted.items():
        path, entry = folder / name, record.get(name)
        current = _read(path)
        if current == data:
            continue
        changed = entry is not None and current is not None and _digest(current) != entry["sha256"]
        if changed and _leads_here(name, current):  # the user has changed what was put there: an undo says so
            entry = {**entry, "edited": True}
        elif entry is None or changed:
            # Not ours, or changed since it was: it is what an undo has to bring back.
            original = None
            if path.is_symlink():
                original = {"link": os.readlink(path)}
            elif current is not None:
                original = "file"
                target[f"{ORIGINALS}/{name}"] = functools.partial(copy_file, source=path)
            entry = {"original": original}
        replaced = current is not None and not path.is_symlink()
        mode = path.stat().st_mode & 0o7777 if replaced else None
        target[name] = functools.partial(write_file, data=data, mode=mode)
        record[name] = {**entry, "sha256": _digest(data)}
        lines.append(f"  {'added  ' if current is None else 'changed'}  {name}")
    for name in [name for name in record if name not in wanted]:  # from an older version of the code
        current = _read(folder / name)
        if current is None or _digest(current) == record[name]["sha256"]:
            target |= _restored(folder, name, record.pop(name))
            lines.append(f"  removed  {name}")
    if not lines:
        return [f"{folder} is attached already; nothing to change", *notes]
    target[RECORD] = functools.partial(write_file, data=_dump(record))
    if not dry_run:
        apply(folder, target)
    return [f"{'would attach' if dry_run else 'attached'} {folder}", *lines, *notes]


def undo(folder: Path, *, force: bool = False, dry_run: bool = False) -> list[str]:
    """Restores the files as they were before the first `attach`, bit for bit.

    Args:
        folder: The checkpoint folder.
        force: Restore also files that were changed after `attach`, whose changes are lost.
        dry_run: Only say what would change.

    Returns:
        Lines that say what was done.

    Raises:
        CommandError: Files were changed after `attach` (they are named), or an original is missing; nothing changed.
        OSError: Something could not be read or written; nothing has changed.
    """
    record = _read_record(folder)
    if not record:
        if (folder / f"{MODEL.partition('.')[0]}.py").exists():
            return [f"{folder} has the code, but no record of what was there before, as a copy of an attached folder; nothing to undo"]
        return [f"{folder} is not attached; nothing to undo"]
    target: dict[str, Entry] = {}
    lines, changed = [], []
    for name, entry in reversed(record.items()):  # the JSON files first, then the code they point at
        current = _read(folder / name)
        is_ours = current is None or _digest(current) == entry["sha256"] and not entry.get("edited")
        if not is_ours and not _is_original(folder, name, entry):
            changed.append(name)
        target |= _restored(folder, name, entry)
        lines.append(f"  {'removed ' if entry['original'] is None else 'restored'}  {name}")
    if changed and not force:
        raise CommandError(
            f"changed since they were attached: {', '.join(changed)}. Keep a copy of what you need and run again with "
            "--force, which drops these changes; nothing was changed now"
        )
    target[RECORD] = None
    if not dry_run:
        apply(folder, target)
    return [f"{'would restore' if dry_run else 'restored'} {folder}", *lines]


def _restored(folder: Path, name: str, entry: dict) -> dict[str, Entry]:
    """The changes that bring one recorded file back."""
    original = entry["original"]
    if original is None:
        return {name: None}
    if original != "file":
        return {name: original["link"]}
    kept = folder / ORIGINALS / name
    if not kept.is_file():
        raise CommandError(f"{kept} is missing: the original of {name} cannot be restored")
    if _is_original(folder, name, entry):  # restored by hand: left with its own times
        return {f"{ORIGINALS}/{name}": None}
    return {name: functools.partial(copy_file, source=kept), f"{ORIGINALS}/{name}": None}


def _is_original(folder: Path, name: str, entry: dict) -> bool:
    """Whether the file holds again what it held before `attach`."""
    path, original = folder / name, entry["original"]
    if original == "file":
        return not path.is_symlink() and _read(path) == _read(folder / ORIGINALS / name)
    return original is not None and path.is_symlink() and os.readlink(path) == original["link"]


def _leads_here(name: str, data: bytes) -> bool:
    """Whether a JSON file points at this project's code."""
    try:
        named = json.loads(data).get("auto_map") if name.endswith(".json") else None
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(named, dict) and any(value in EVERYTHING.values() for value in named.values())


def _wanted(folder: Path, record: dict) -> tuple[dict[str, bytes], list[str]]:
    """Every file that `attach` answers for with the content it shall have, in an order in which any beginning of the
    list already loads; and notes for the user."""
    texts = {}
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "config.json"):
        data = _read(folder / name)
        if data is not None:
            texts[name] = _json_text(name, data)
    if "config.json" not in texts:
        raise CommandError(f"{folder} has no config.json: it is no checkpoint folder")
    model_type = json.loads(texts["config.json"]).get("model_type")
    if model_type is not None and model_type not in MODEL_TYPES:
        raise CommandError(
            f'config.json: model_type is {model_type!r}; this code is for a Kimi-K2.6 checkpoint ("kimi_k25")'
        )

    wanted, notes = code_files(), []
    template = _read(folder / TEMPLATE)
    ours = template is not None and TEMPLATE in record and _digest(template) == record[TEMPLATE]["sha256"]
    if template is not None and not ours:
        wanted[TEMPLATE] = template
    elif (folder / "chat_template.json").exists() or _value(texts, "tokenizer_config.json", "chat_template"):
        notes.append(f"  note: the folder has a chat template of another form; {TEMPLATE} was not added")
    else:
        wanted[TEMPLATE] = _package_file(TEMPLATE)

    if "preprocessor_config.json" not in texts:
        content = {"auto_map": {key: value for (_, key), value in PREPROCESSOR.items()}, "media_proc_cfg": MEDIA_PROC_CFG}
        texts["preprocessor_config.json"] = json.dumps(content, indent=2) + "\n"
    edits = {"preprocessor_config.json": dict(PREPROCESSOR), "tokenizer_config.json": TOKENIZER, "config.json": CONFIG}
    present = _value(texts, "preprocessor_config.json", "media_proc_cfg") or {}
    if isinstance(present, dict):
        missing = {("media_proc_cfg", key): value for key, value in MEDIA_PROC_CFG.items() if key not in present}
        edits["preprocessor_config.json"] |= missing
    if "processor_config.json" in texts:
        edits["processor_config.json"] = dict(PREPROCESSOR)
        if isinstance(_value(texts, "processor_config.json", "image_processor"), dict):
            edits["processor_config.json"]["image_processor", "auto_map", "AutoImageProcessor"] = IMAGE_PROCESSOR
    if "tokenizer_config.json" not in texts:
        notes.append("  note: there is no tokenizer_config.json, so AutoTokenizer cannot load this folder")

    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "config.json"):
        if name not in texts:
            continue
        # An entry of ours that stands in a file where it need not stand must not lead to other code.
        old = _value(texts, name, "auto_map")
        stray = {path: value for path, value in EVERYTHING.items() if isinstance(old, dict) and path[1] in old}
        text = texts[name]
        for path, value in (edits[name] | stray).items():
            text = put(text, path, value)
        wanted[name] = text.encode("utf-8")
    return wanted, notes


def code_files() -> dict[str, bytes]:
    """The flat modules that remote code needs, each after those it imports, by file name."""
    found: dict[str, bytes] = {}

    def visit(module: str) -> None:
        name = f"{module}.py"
        if name in found:
            return
        data = _package_file(name)
        for node in ast.walk(ast.parse(data)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                visit(node.module)
        found[name] = data

    for module in ENTRY_MODULES:
        visit(module)
    return found


def _package_file(name: str) -> bytes:
    data = _read(Path(__file__).resolve().parents[1] / name)
    if data is None:
        raise CommandError(f"the installed kimi_k26 package lacks {name}; install it again")
    return data


def _read(path: Path) -> bytes | None:
    """A file's content, by way of links; None where there is none."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder, where a file is expected")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _json_text(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
        if isinstance(json.loads(text), dict):
            return text
        problem = "its outermost value is not an object"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise CommandError(f"{name} is not valid JSON of a checkpoint: {problem}; nothing was changed")


def _value(texts: dict[str, str], name: str, key: str):
    return json.loads(texts[name]).get(key) if name in texts else None


def _read_record(folder: Path) -> dict[str, dict]:
    """By file name: the digest of what was put there and what was there before (None, "file" or {"link": text})."""
    data = _read(folder / RECORD)
    if data is None:
        return {}
    try:
        files = json.loads(_json_text(RECORD, data))["files"]
        for name, entry in files.items():
            check_name(name)
            original = entry["original"]
            if not isinstance(entry["sha256"], str) or not (
                original in (None, "file") or isinstance(original["link"], str)
            ):
                raise ValueError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{folder / RECORD} was not written by this command ({error}); nothing was changed") from None
    return files


def _dump(record: dict) -> bytes:
    return (json.dumps({"format": 1, "files": record}, indent=1) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
