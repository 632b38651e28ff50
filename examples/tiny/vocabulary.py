"""The vocabulary: byte pairs learnt from the dialogues, and the published special tokens behind them."""

import json
from collections import Counter
from pathlib import Path

import regex
import tiktoken

from kimi_k26.vocabulary_kimi import SPLIT_PATTERN, write_ranks

SPECIAL_IDS = 256

# Offsets behind the byte-pair ranks, as published; the ids between are `<|reserved_token_N|>`. Markers of tools and
# thinking are part of what the model says, so they are not "special" and survive `skip_special_tokens`.
CONTROL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    254: "[UNK]",
    255: "[PAD]",
}
SPOKEN_TOKENS = {
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    22: "<think>",
    23: "</think>",
}
MARKERS = {**CONTROL_TOKENS, **SPOKEN_TOKENS}


def learn_ranks(texts: list[str], merges: int) -> dict[bytes, int]:
    """Byte-pair ranks of some texts, so that what a small model has to copy looks the same wherever it stands.

    First letters join letters (and signs join signs), the most frequent pair first; never digits, so a number is read
    digit by digit. Only then a space joins a whole word, the most frequent words first: a made-up name is cut into
    the same pieces after a space, a quotation mark or an underscore.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    split = regex.compile(f"(?V1){SPLIT_PATTERN}")
    pieces = Counter(piece for text in texts for piece in split.findall(text))
    words: Counter = Counter()
    spaced: Counter = Counter()
    for piece, count in pieces.items():
        body = piece
        if len(piece) > 1 and not piece[0].isalpha() and piece[1].isalpha():
            body = piece[1:]
            if piece[0] == " ":
                spaced[body.encode()] += count
        if not any(char.isdigit() for char in body):
            words[tuple(bytes([byte]) for byte in body.encode())] += count
    while len(ranks) < 256 + merges * 2 // 3:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks.setdefault(left + right, len(ranks))
        words = _joined(words, left, right)
    for word, count in sorted(spaced.items(), key=lambda item: (-item[1], item[0])):
        if len(ranks) == 256 + merges:
            break
        # Two letters are a word of the language only if they are frequent; else they are a piece of a made-up one.
        if word in ranks and (len(word) > 2 or count > len(texts) // 50):
            ranks.setdefault(b" " + word, len(ranks))
    return ranks


def _joined(words: Counter, left: bytes, right: bytes) -> Counter:
    joined: Counter = Counter()
    for word, count in words.items():
        if (left, right) in zip(word, word[1:]):
            pieces, at = [], 0
            while at < len(word):
                both = word[at : at + 2] == (left, right)
                pieces.append(left + right if both else word[at])
                at += 2 if both else 1
            word = tuple(pieces)
        joined[word] += count
    return joined


def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The tokenizer's inner part alone, quick enough to write training data with."""
    first = len(ranks)
    specials = {MARKERS.get(k, f"<|reserved_token_{first + k}|>"): first + k for k in range(SPECIAL_IDS)}
    return tiktoken.Encoding("tiny", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def write_tokenizer(folder: Path, ranks: dict[bytes, int]) -> None:
    """`tiktoken.model` and `tokenizer_config.json`, in the published form."""
    write_ranks(ranks, folder / "tiktoken.model")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    config = {
        "added_tokens_decoder": {
            str(len(ranks) + offset): {"content": content, **plain, "special": offset in CONTROL_TOKENS}
            for offset, content in sorted(MARKERS.items())
        },
        "additional_special_tokens": [token for token in CONTROL_TOKENS.values() if token not in named.values()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "tokenizer_class": "TikTokenTokenizer",
        **named,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
