"""The vocabulary: byte pairs learnt from the dialogues, with the published special tokens behind them."""

from collections import Counter

import regex
import tiktoken

from kimi_k26.cli.tiny import CONTROL_TOKENS, SPECIAL_IDS, SPOKEN_TOKENS
from kimi_k26.vocabulary_kimi import SPLIT_PATTERN

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
