"""`kimi-k26 check FOLDER`: every file of a checkpoint folder against its config, without loading the model.

What loading would refuse is found by the same functions, in the same words; beyond that, values however large the
checkpoint is, and what is wrong with the tokenizer and the other small files. Weights are read a few MiB at a time.
"""

import json
import os
import sys
from pathlib import Path

from . import CommandError

JSON_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json")
# What the chat template and the processor write.
NEEDED_TOKENS = (
    "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<think>", "</think>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "max_length", "max_new_tokens")
END_TOKENS = ("<|im_end|>", "[EOS]", "[EOT]")


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
        with torch.device("meta"):
            model = KimiK26ForConditionalGeneration(config)
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
        return None, [Finding(name, None, f"cannot be read: {error.strerror}")]
    except ValueError as error:
        return None, [Finding(name, None, str(error))]
    return content, [Finding(name, key, "is listed twice") for key in names_twice(content)]


def _config(content: dict) -> tuple[object, list]:
    from .. import KimiK26Config
    from ..checkpoint_kimi_k26 import Finding

    if not isinstance(content.get("text_config"), dict):
        return None, [Finding("config.json", "text_config", "is missing, or no object")]
    try:
        return KimiK26Config(**content), []
    except (ValueError, TypeError) as error:
        return None, [Finding("config.json", None, str(error))]


def _small_files(folder: Path, config: dict | None) -> list:
    """What is wrong with the tokenizer and the JSON files beside the weights, and with their ids in `config`."""
    from .. import KimiK26ImageProcessor
    from ..checkpoint_kimi_k26 import Finding

    contents, findings = {"config.json": config or {}}, []
    for name in JSON_FILES:
        if os.path.lexists(folder / name):  # a link that leads nowhere is missing
            contents[name], wrong = _object(folder, name)
            findings += wrong
    if contents.get("preprocessor_config.json") is not None:
        try:
            processor = KimiK26ImageProcessor.from_pretrained(folder)
            findings += _patches(processor.media_config(), contents["config.json"].get("vision_config"))
        except Exception as error:  # whatever it is, a user would meet it
            findings.append(Finding("preprocessor_config.json", None, _words(error)))
    for key, value in (contents.get("generation_config.json") or {}).items():
        if key in SAMPLING and (isinstance(value, bool) or not isinstance(value, (int, float, type(None)))):
            findings.append(Finding("generation_config.json", key, f"must be a number, got {value!r}"))
    return findings + _tokenizer(folder, contents)


def _patches(made, read) -> list:
    """What the model does not take of the patches that the image processor makes."""
    from ..checkpoint_kimi_k26 import Finding

    findings = []
    for key, own in (("patch_size", made.patch_size), ("merge_kernel_size", list(made.merge))):
        wanted = read.get(key, own) if isinstance(read, dict) else own
        if wanted != own:
            findings.append(Finding("preprocessor_config.json", key, f"is {own}; config.json has {wanted}"))
    return findings


def _tokenizer(folder: Path, contents: dict) -> list:
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG, VOCABULARY, added_tokens
    from ..vocabulary_kimi import read_ranks

    there = [name for name in (VOCABULARY, TOKENIZER_CONFIG) if (folder / name).exists()]
    if len(there) < 2:
        absent = {VOCABULARY, TOKENIZER_CONFIG} - set(there)
        return [Finding(name, None, f"is missing, though {there[0]} is there") for name in absent if there]
    content, findings = _object(folder, TOKENIZER_CONFIG)
    try:
        ranks = read_ranks(folder / VOCABULARY)
        absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if absent:
            problem = f"has no token for the single byte {absent[0]:#04x}, so that text with it cannot be encoded"
            findings.append(Finding(VOCABULARY, None, problem))
    except (OSError, ValueError) as error:
        findings.append(Finding(VOCABULARY, None, str(error).removeprefix(str(folder / VOCABULARY)).lstrip(",: ")))
    if content is None:
        return findings
    try:
        added = added_tokens(content)
    except ValueError as error:
        return [*findings, Finding(TOKENIZER_CONFIG, None, str(error))]
    findings += _names(content, added)
    for file, values in contents.items():
        findings += _ids_of(file, values or {}, content, added)
    text_config = contents["config.json"].get("text_config")
    if isinstance(text_config, dict):
        findings += _ids_of("config.json", text_config, content, added, "text_config.")
    return findings or _loads(folder)


def _names(content: dict, added: dict[int, str]) -> list:
    """Tokens that the tokenizer's config names, or this model needs, and that no id has, or two."""
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG

    def report(name, problem):
        findings.append(Finding(TOKENIZER_CONFIG, name, problem))

    findings, texts = [], list(added.values())
    for text in sorted({text for text in texts if texts.count(text) > 1}):
        report(text, f"has the ids {[index for index, other in added.items() if other == text]}; it must have one")
    for text in NEEDED_TOKENS:
        if text not in texts:
            report(text, "is missing from added_tokens_decoder")
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        text = _text(content.get(key))
        if text is not None and text not in texts:
            report(key, f"is {text!r}, which added_tokens_decoder does not have")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = content.get(key) or []
        if not isinstance(listed, (list, dict)):
            report(key, f"must be a list of tokens, got {listed!r}")
            continue
        for text in map(_text, listed.values() if isinstance(listed, dict) else listed):
            if text not in texts:
                report(key, f"has {text!r}, which added_tokens_decoder does not have")
    return findings


def _ids_of(file: str, values: dict, content: dict, added: dict[int, str], where: str = "") -> list:
    """Ids of a config that are not those of the tokenizer's tokens."""
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG

    findings = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = _text(content.get(key.removesuffix("_id")))
        allowed = [*END_TOKENS, own] if key == "eos_token_id" else [own]
        wanted = {index: text for index, text in added.items() if text in allowed}
        value = values.get(key)
        for index in value if isinstance(value, list) else [value]:
            if index is not None and type(index) is not int:
                findings.append(Finding(file, where + key, f"must be a token id, a list of token ids, or null, got {value!r}"))
            elif index is not None and wanted and index not in wanted:
                ids = ", ".join(f"{index} {text}" for index, text in wanted.items())
                problem = f"is {index!r} ({added.get(index, 'an unnamed token')}); {TOKENIZER_CONFIG} has {ids}"
                findings.append(Finding(file, where + key, problem))
    return findings


def _text(token) -> str | None:
    """A token's text, written as a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _loads(folder: Path) -> list:
    """What the tokenizer itself says, and its chat template."""
    from .. import TikTokenTokenizer
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG

    try:
        tokenizer = TikTokenTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever it is, a user would meet it
        return [Finding(TOKENIZER_CONFIG, None, _words(error))]
    if tokenizer.chat_template is not None:
        try:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
            if "Hello" not in shown:
                return [Finding("chat_template.jinja", None, "does not show what is said: a message is not in the text it makes")]
        except Exception as error:
            return [Finding("chat_template.jinja", None, _words(error))]
    return []


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
