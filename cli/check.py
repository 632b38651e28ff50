"""`kimi-k26 check FOLDER`: every file of a checkpoint folder against its config, without loading the model.

What loading would refuse is found by the same functions, in the same words; beyond that, values however large the
checkpoint is, and what is wrong with the tokenizer and the other small files. Weights are read a few MiB at a time.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
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
END_TOKENS = ("<|im_end|>", "[EOS]", "[EOT]")
# A chat with all that a template must show, and words of each part of it.
PROBE_CALL = {"id": "functions.weigh:0", "type": "function", "function": {"name": "weigh", "arguments": '{"thing": "amber"}'}}
PROBE = [
    {"role": "system", "content": "copper"},
    {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "walnut"}]},
    {"role": "assistant", "reasoning_content": "velvet", "content": "juniper", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "tool_call_id": "functions.weigh:0", "content": "marble"},
    {"role": "assistant", "content": "saffron"},
    {"role": "user", "content": "cobalt"},
]
PROBE_TOOLS = [{"type": "function", "function": {"name": "weigh", "description": "granite", "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}}}}]
PROBE_WORDS = ("copper", "walnut", "velvet", "juniper", "functions.weigh:0", "amber", "marble", "saffron", "cobalt", "granite")


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
        absurd = _absurd_counts(config, checkpoint.where)
        weights += absurd
        if not absurd:
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
    tokenizer = _object(folder, "tokenizer_config.json")
    findings += _code(folder, contents | {"tokenizer_config.json": tokenizer[0]})
    if contents.get("preprocessor_config.json") is not None:
        try:
            processor = KimiK26ImageProcessor.from_pretrained(folder)
            findings += _patches(processor.media_config(), contents["config.json"].get("vision_config"))
        except Exception as error:  # whatever it is, a user would meet it
            findings.append(Finding("preprocessor_config.json", None, _words(error)))
    for key, value in (contents.get("generation_config.json") or {}).items():
        if key in SAMPLING and value is not None:
            kind, words, fits = SAMPLING[key]
            if type(value) not in (kind, int if kind is float else kind) or not fits(value):
                findings.append(Finding("generation_config.json", key, f"must be {words}, got {value!r}"))
        if key == "eos_token_id" and value == []:
            findings.append(Finding("generation_config.json", key, "is an empty list: no token would end a reply"))
    return findings + _tokenizer(folder, contents, *tokenizer)


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


def _code(folder: Path, contents: dict) -> list:
    """Classes that JSON files point at with `auto_map`, and that the folder's code does not have. A folder without any is sound."""
    from ..checkpoint_kimi_k26 import Finding

    if not any(folder.glob("*.py")):
        return []
    findings, known = [], {}
    for file, content in contents.items():
        named = (content or {}).get("auto_map", {})
        if not isinstance(named, dict):
            findings.append(Finding(file, "auto_map", f"must be an object of class names, got {named!r}"))
            continue
        for key, value in named.items():
            for name in value if isinstance(value, list) else [value]:
                module, dot, made = name.rpartition(".") if isinstance(name, str) else ("", "", "")
                if name is None or isinstance(name, str) and "--" in name:  # no fast tokenizer; code of another repository
                    continue
                if not dot:
                    findings.append(Finding(file, f"auto_map.{key}", f"must be module.Class, got {name!r}"))
                    continue
                findings += _module(folder, module, known)
                if known[module] is not None and made not in known[module]:
                    findings.append(Finding(file, f"auto_map.{key}", f"is {name}, which {module}.py does not define"))
    return findings


def _module(folder: Path, module: str, known: dict[str, set | None]) -> list:
    """What is wrong with a module of the folder and with those that it imports. What each defines goes into `known`, `None` where it
    cannot be read."""
    from ..checkpoint_kimi_k26 import Finding

    if module in known:
        return []
    file, known[module], findings = f"{module}.py", None, []
    try:
        nodes = list(_statements(ast.parse((folder / file).read_bytes()).body))
    except FileNotFoundError:
        return [Finding(file, None, "is missing: the folder's code imports it")]
    except (OSError, SyntaxError, ValueError) as error:
        return [Finding(file, None, f"is no code that can be imported: {error}")]
    known[module] = {name for node in nodes for name in _defined(node)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            findings += _module(folder, node.module, known)
            for name in node.names if known[node.module] is not None else ():
                if name.name not in known[node.module] and name.name != "*":
                    findings.append(Finding(f"{node.module}.py", None, f"does not define {name.name}, which {file} imports"))
    return findings


def _statements(body: list) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from _statements(getattr(node, part, []))


def _defined(node: ast.AST) -> list[str]:
    """Names that a statement gives to something."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(name.asname or name.name).partition(".")[0] for name in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _tokenizer(folder: Path, contents: dict, content: dict | None, findings: list) -> list:
    """What is wrong with the tokenizer, whose config has this `content` and these `findings`."""
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG, VOCABULARY, added_tokens
    from ..vocabulary_kimi import read_ranks

    there = [name for name in (VOCABULARY, TOKENIZER_CONFIG) if (folder / name).exists()]
    if len(there) < 2:
        absent = {VOCABULARY, TOKENIZER_CONFIG} - set(there)
        return [Finding(name, None, f"is missing, though {there[0]} is there") for name in absent if there]
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
    findings += _names(content, added) + _order(content, added)
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


def _order(content: dict, added: dict[int, str]) -> list:
    """Control tokens whose ids do not follow each other as the published ones do: two may have been swapped; and an end of a turn
    that is no special token, so that it would stay in the text of a reply."""
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG
    from .tiny import CONTROL_TOKENS, SPOKEN_TOKENS

    published = {text: offset for offset, text in (CONTROL_TOKENS | SPOKEN_TOKENS).items()}
    known, findings = [(index, text) for index, text in sorted(added.items()) if text in NEEDED_TOKENS], []
    for (before, first), (after, second) in zip(known, known[1:]):
        if published[first] > published[second]:
            problem = f"has the id {before}, before {second} with {after}; as published it comes behind that"
            findings.append(Finding(TOKENIZER_CONFIG, first, problem))
    for index, token in content["added_tokens_decoder"].items():
        if isinstance(token, dict) and token.get("content") == END_TOKENS[0] and token.get("special") is False:
            findings.append(Finding(TOKENIZER_CONFIG, END_TOKENS[0], "is not special: it would stay in the text of replies"))
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
    """What the tokenizer itself says, and its chat template, which has to show all of a chat."""
    from .. import TikTokenTokenizer
    from ..checkpoint_kimi_k26 import Finding
    from ..soundness_kimi_k26 import TOKENIZER_CONFIG

    try:
        tokenizer = TikTokenTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever it is, a user would meet it
        return [Finding(TOKENIZER_CONFIG, None, _words(error))]
    if tokenizer.chat_template is None:
        return []
    try:
        shown = tokenizer.apply_chat_template(PROBE, tools=PROBE_TOOLS, tokenize=False, preserve_thinking=True)
    except Exception as error:
        return [Finding("chat_template.jinja", None, _words(error))]
    missing = [word for word in PROBE_WORDS if word not in shown]
    if missing:
        return [Finding("chat_template.jinja", None, f"does not show what is said: {missing[0]!r} of a chat is not in the text it makes")]
    findings = [Finding("chat_template.jinja", None, f"never writes {token}") for token in NEEDED_TOKENS if token not in shown]
    if not shown.startswith("<|"):
        findings.append(Finding("chat_template.jinja", None, f"begins each prompt with {shown[:8]!r}: is there a byte order mark?"))
    return findings


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
