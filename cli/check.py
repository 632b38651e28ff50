"""`kimi-k26 check FOLDER`: every file of a checkpoint folder against its config, without loading the model.

What loading would refuse is found by the same functions, in the same words; beyond that, values however large the
checkpoint is, and what is wrong with the tokenizer and the other small files. Weights are read a few MiB at a time.
"""

import json
import os
import re
import sys
from pathlib import Path

from . import CommandError

JSON_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json")
# What `generate` takes of each: kind, in words, and whether a value is so.
SAMPLING = {
    "temperature": (float, "a number from 0", lambda value: 0 <= value < float("inf")),
    "top_k": (int, "a whole number from 0", lambda value: value >= 0),
    "top_p": (float, "a number above 0, up to 1", lambda value: 0 < value <= 1),
    "min_p": (float, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "typical_p": (float, "a number above 0, up to 1", lambda value: 0 < value <= 1),
    "repetition_penalty": (float, "a number above 0", lambda value: 0 < value < float("inf")),
    "max_length": (int, "a whole number above 0", lambda value: value > 0),
    "max_new_tokens": (int, "a whole number above 0", lambda value: value > 0),
    "num_beams": (int, "a whole number above 0", lambda value: value > 0),
    "do_sample": (bool, "true or false", lambda value: True),
}
def add_arguments(parser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {file, tensor, problem}")


def run(args) -> int:
    if not args.folder.is_dir():
        raise CommandError(f"{args.folder} is not a folder")
    from tqdm import tqdm
    from transformers import logging

    def progress(tensors):
        return tqdm(tensors, desc="Reading values", unit=" tensors", file=sys.stderr)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        findings, summary = check(args.folder, progress)
    finally:
        logging.set_verbosity(verbosity)
    if args.json:
        keys = ("file", "tensor", "problem")
        print(json.dumps([{key: getattr(finding, key) for key in keys} for finding in findings], indent=2))
    else:
        for finding in findings:
            print(finding)
        print(f"{summary}: {f'{len(findings)} findings' if findings else 'nothing wrong was found'}")
    return 1 if findings else 0


def check(folder: Path, progress=iter) -> tuple[list, str]:
    """Judges all files of a folder.

    Args:
        folder: The checkpoint folder; a tokenizer need not be there, weights and `config.json` must.
        progress: Wraps the list of tensors whose values are read.

    Returns:
        The findings (`checkpoint_kimi_k26.Finding`), and what was looked at, in words.
    """
    import torch

    from .. import KimiK26ForConditionalGeneration
    from ..checkpoint_kimi_k26 import INDEX_FILE, Checkpoint, Finding
    from ..soundness_kimi_k26 import check_ids, check_values, is_hollow
    from .check_tokenizer import words

    content, findings = _object(folder, "config.json")
    config, failed = _config(content) if content is not None else (None, [])
    findings += failed
    try:
        checkpoint = Checkpoint(folder)
    except FileNotFoundError as error:
        findings.append(Finding(INDEX_FILE, None, f"is missing: {error}"))
        return findings + _small_files(folder, content), "no weights"
    weights = checkpoint.findings + checkpoint.leftovers
    if config is not None:
        absurd = _absurd_counts(config, checkpoint.where)
        weights += absurd
        try:
            with torch.device("meta"):
                model = None if absurd else KimiK26ForConditionalGeneration(config)
        except Exception as error:  # of sizes and numbers that no model can have together
            model = None
            findings.append(Finding("config.json", None, words(error)))
        if model is not None:
            stored = content.get("dtype", content.get("torch_dtype"))
            weights += checkpoint.compare(model, getattr(torch, stored) if isinstance(stored, str) else None)
    weights += check_values(checkpoint, weights, progress)
    findings += weights
    if config is not None:
        findings += check_ids(folder, config)
    findings += _small_files(folder, content)
    size = sum(shard.size for shard in checkpoint.shards) / 2**30
    summary = f"{len(checkpoint.shards)} files of weights, {len(checkpoint.where):,} tensors, {size:,.2f} GiB"
    if checkpoint.shards and all(map(is_hollow, checkpoint.shards)):
        summary += " (sparse files without data: no values were judged)"
    return list(dict.fromkeys(findings)), summary


def _object(folder: Path, name: str) -> tuple[dict | None, list]:
    """A JSON file's object, or None; and what is wrong with it."""
    from ..checkpoint_kimi_k26 import Finding, names_twice, read_json

    try:
        content = read_json((folder / name).read_bytes())
    except FileNotFoundError:
        return None, [Finding(name, None, "is missing")]
    except OSError as error:
        return None, [Finding(name, None, f"cannot be read: {error.strerror or error}")]
    except ValueError as error:
        return None, [Finding(name, None, str(error))]
    return content, [Finding(name, key, "is listed twice") for key in names_twice(content)]


def _absurd_counts(config, names) -> list:
    """Counts so far from what the files hold that no model of them should be built."""
    from ..checkpoint_kimi_k26 import Finding

    counts = {
        "text_config.num_hidden_layers": (config.text_config.num_hidden_layers, r"language_model.*\.layers\.(\d+)\."),
        "text_config.n_routed_experts": (config.text_config.n_routed_experts or 0, r"\.experts\.(\d+)\."),
    }
    if config.vision_config is not None:
        counts["vision_config.vt_num_hidden_layers"] = config.vision_config.vt_num_hidden_layers, r"vision_tower.*\.blocks\.(\d+)\."
    findings = []
    for key, (count, pattern) in counts.items():
        held = max((int(found[1]) for found in map(re.compile(pattern).search, names) if found), default=0) + 1
        if count > 100 + 10 * held:
            findings.append(Finding("config.json", key, f"is {count:,}; the files have {held:,}"))
    return findings


def _config(content: dict) -> tuple[object, list]:
    from .. import KimiK26Config
    from ..checkpoint_kimi_k26 import Finding

    if not isinstance(content.get("text_config"), dict):
        return None, [Finding("config.json", "text_config", "is missing, or no object")]
    try:
        return KimiK26Config(**content), []
    except RecursionError:
        return None, [Finding("config.json", None, "is nested too deeply")]
    except (ValueError, TypeError) as error:
        return None, [Finding("config.json", None, str(error))]


def _small_files(folder: Path, config: dict | None) -> list:
    """What is wrong with the tokenizer and the JSON files beside the weights, and with their ids in `config`."""
    from .. import KimiK26ImageProcessor
    from ..checkpoint_kimi_k26 import Finding
    from .check_code import judge_code
    from .check_tokenizer import judge_tokenizer, words

    contents, findings = {"config.json": config or {}}, []
    for name in JSON_FILES:
        if os.path.lexists(folder / name):  # a link that leads nowhere is missing
            contents[name], wrong = _object(folder, name)
            findings += wrong
    tokenizer = _object(folder, "tokenizer_config.json")
    findings += judge_code(folder, contents | {"tokenizer_config.json": tokenizer[0]})
    if contents.get("preprocessor_config.json") is not None:
        try:
            processor = KimiK26ImageProcessor.from_pretrained(folder)
            findings += _patches(processor.media_config(), contents["config.json"].get("vision_config"))
        except Exception as error:  # whatever it is, a user would meet it
            findings.append(Finding("preprocessor_config.json", None, words(error)))
    for key, value in (contents.get("generation_config.json") or {}).items():
        if key in SAMPLING and value is not None:
            kind, wanted, fits = SAMPLING[key]
            if type(value) not in (kind, int if kind is float else kind) or not fits(value):
                findings.append(Finding("generation_config.json", key, f"must be {wanted}, got {value!r}"))
    generation = contents.get("generation_config.json")
    if generation is not None and generation.get("eos_token_id") in (None, []):
        findings.append(Finding("generation_config.json", "eos_token_id", "is missing: no token would end a reply"))
    return findings + judge_tokenizer(folder, contents, *tokenizer)


def _patches(made, read) -> list:
    """What the model does not take of the patches that the image processor makes."""
    from ..checkpoint_kimi_k26 import Finding

    findings, read = [], read if isinstance(read, dict) else {}
    for key, own in (("patch_size", made.patch_size), ("merge_kernel_size", list(made.merge))):
        wanted = read.get(key, own)
        if wanted != own:
            findings.append(Finding("preprocessor_config.json", key, f"is {own}; config.json has {wanted}"))
    frames = made.temporal_merge_kernel_size
    if frames > read.get("init_pos_emb_time", frames):
        problem = f"is {frames}; a clip has up to {read['init_pos_emb_time']} frames, says vision_config.init_pos_emb_time"
        findings.append(Finding("preprocessor_config.json", "temporal_merge_kernel_size", problem))
    if made.fixed_output_tokens is not None:
        problem = f"is {made.fixed_output_tokens}; the model gives as many features as a picture has merged patches"
        findings.append(Finding("preprocessor_config.json", "fixed_output_tokens", problem))
    return findings
