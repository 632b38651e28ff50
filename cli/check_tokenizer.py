"""What `kimi-k26 check` says of a folder's tokenizer: its files, its tokens and their ids, its chat template."""

from pathlib import Path

from .. import TikTokenTokenizer
from ..checkpoint_kimi_k26 import Finding
from ..soundness_kimi_k26 import TOKENIZER_CONFIG, VOCABULARY, added_tokens
from ..vocabulary_kimi import read_ranks
from .tiny import CONTROL_TOKENS, SPOKEN_TOKENS


# What the chat template and the processor write.
NEEDED_TOKENS = (
    "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<think>", "</think>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
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


def judge_tokenizer(folder: Path, contents: dict, content: dict | None, findings: list) -> list[Finding]:
    """What is wrong with the tokenizer, whose config has this `content` and these `findings`."""
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


def _names(content: dict, added: dict[int, str]) -> list[Finding]:
    """Tokens that the tokenizer's config names, or this model needs, and that no id has, or two."""

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


def _order(content: dict, added: dict[int, str]) -> list[Finding]:
    """Control tokens whose ids do not follow each other as the published ones do: two may have been swapped; and an end of a turn
    that is no special token, so that it would stay in the text of a reply."""
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


def _ids_of(file: str, values: dict, content: dict, added: dict[int, str], where: str = "") -> list[Finding]:
    """Ids of a config that are not those of the tokenizer's tokens."""
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


def _loads(folder: Path) -> list[Finding]:
    """What the tokenizer itself says, and its chat template, which has to show all of a chat."""
    try:
        tokenizer = TikTokenTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever it is, a user would meet it
        return [Finding(TOKENIZER_CONFIG, None, words(error))]
    if tokenizer.chat_template is None:
        return []
    try:
        shown = tokenizer.apply_chat_template(PROBE, tools=PROBE_TOOLS, tokenize=False, preserve_thinking=True)
    except Exception as error:
        return [Finding("chat_template.jinja", None, words(error))]
    missing = [word for word in PROBE_WORDS if word not in shown]
    if missing:
        return [Finding("chat_template.jinja", None, f"does not show what is said: {missing[0]!r} of a chat is not in the text it makes")]
    findings = [Finding("chat_template.jinja", None, f"never writes {token}") for token in NEEDED_TOKENS if token not in shown]
    if not shown.startswith("<|"):
        findings.append(Finding("chat_template.jinja", None, f"begins each prompt with {shown[:8]!r}: is there a byte order mark?"))
    return findings


def words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
