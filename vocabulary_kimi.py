"""The byte-pair vocabulary: its file, where text is cut, and how tokens are written as strings."""

import base64
import binascii
import codecs
import os
import re
import string
from collections.abc import Iterator


# How text is cut before byte pairs are merged. `&&` is set intersection.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIAL_IDS = 256  # behind the byte pairs
MEDIA_PAD = "<|media_pad|>"  # that of them which stands for a picture or a clip

# tiktoken panics on longer input. The published tokenizer cuts at exactly these lengths, and where text is cut shows in
# the ids, so they are part of the vocabulary.
MAX_PIECE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_SPACE, _OTHER, _RUN = (re.compile(pattern) for pattern in (r"\s", r"\S", r"\s+|\S+"))

# One printable character per byte, so that tokens which are not UTF-8 have a string form that leads back to the bytes.
# The table is the one byte-level vocabularies have used since GPT-2: printable Latin-1 stands for itself, the other
# bytes take the characters from U+0100 on.
_PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER_BYTES = sorted(set(range(256)) - set(_PRINTABLE_BYTES))
_CHAR_OF_BYTE = {byte: chr(byte) for byte in _PRINTABLE_BYTES} | {b: chr(256 + i) for i, b in enumerate(_OTHER_BYTES)}
_BYTE_OF_CHAR = {char: byte for byte, char in _CHAR_OF_BYTE.items()}
_CHARMAP = "".join(_CHAR_OF_BYTE[byte] for byte in range(256))  # the same as Python's codecs read it

_ENCODED = (string.ascii_letters + string.digits + "+/=").encode()  # Base64's characters, those of ranks among them


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Read a `tiktoken.model` file: one `BASE64 RANK` per line → bytes to rank, in the order of the ranks.

    Raises:
        ValueError: a line is not of that form, or the ranks are not 0, 1, 2, … each once; names file and line.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        ranks = _read_at_once(data)
    except ValueError:
        ranks = dict(_read_line_by_line(data.split(b"\n"), path))
    in_order = list(range(len(ranks)))
    if list(ranks.values()) == in_order:
        return ranks
    if sorted(ranks.values()) != in_order:
        raise ValueError(f"{path}: the ranks of its {len(ranks)} tokens must be 0 to {len(ranks) - 1}, each once")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _read_at_once(data: bytes) -> dict[bytes, int]:
    """What a file says whose lines are as `write_ranks` writes them; `ValueError` for any other.

    Base64 is decoded without the checks of each token, which take longer than all else: four characters each, and padding
    nowhere but at the end of a token, is asked of the whole.
    """
    if not data.endswith(b"\n"):
        data += b"\n"
    parts = data.split()
    tokens, ranks = parts[::2], parts[1::2]
    padding = data.count(b"= ") + data.count(b"== ")
    if data.translate(None, _ENCODED) != b" \n" * len(tokens) or data.count(b"=") != padding:
        raise ValueError("lines of another form")
    if len(tokens) != len(ranks) or any(length % 4 for length in map(len, tokens)):
        raise ValueError("no token or no rank")
    return dict(zip(map(binascii.a2b_base64, tokens), map(int, ranks)))


def _read_line_by_line(lines: list[bytes], path) -> Iterator[tuple[bytes, int]]:
    """The slower way, which can say where a file is malformed."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            yield base64.b64decode(token, validate=True), int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected 'BASE64 RANK', found {line[:80]!r}") from error


def write_ranks(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Write a vocabulary in the order of its ranks; what `read_ranks` read comes back byte for byte."""
    with open(path, "wb") as file:
        for token in sorted(ranks, key=ranks.__getitem__):
            file.write(base64.b64encode(token) + b" %d\n" % ranks[token])


def printable(token: bytes) -> str:
    """A token's bytes as characters of the table above."""
    return codecs.charmap_decode(token, "strict", _CHARMAP)[0]


def spelled(token: str) -> bytes:
    """The bytes a token string stands for: the way back from `printable`, else the string's UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8", errors="replace")


def split_long_text(text: str) -> Iterator[str]:
    """Cut `text` into pieces tiktoken can take: at most 400,000 characters, no run of whitespace or of non-whitespace
    longer than 25,000. Joined they are `text`; ordinary text is one piece."""
    for start in range(0, len(text), MAX_PIECE_CHARS):
        piece = text[start : start + MAX_PIECE_CHARS]
        # A run longer than the limit fills one of these windows, so text without such a window needs no closer look.
        half = MAX_RUN_CHARS // 2
        windows = ((i, i + half) for i in range(0, len(piece) - half + 1, half))
        if len(piece) <= MAX_RUN_CHARS or all(_SPACE.search(piece, *w) and _OTHER.search(piece, *w) for w in windows):
            yield piece
            continue
        cut = 0
        for run in _RUN.finditer(piece):
            for end in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield piece[cut:end]
                cut = end
        yield piece[cut:]
