"""Text → ids: tiktoken gets it in pieces as long as it takes, those of a long text at once on all cores; tokens that a user added are
found before."""

import os
from collections.abc import Iterator

import tiktoken
from transformers import AddedToken

from .chat_kimi import ControlText, Range, longest_first
from .vocabulary_kimi import split_long_text


_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: all bytes of a character but its first


class TextIds:
    """What turns text into ids.

    Calls take `plain`: no token that is written in the text is read as such; and `control`: which of the control tokens that
    are written there are read as such, `None` for all.

    Args:
        encoding: byte pairs and special tokens.
        added: id → token, those a user added and, as the library lists them among these, special ones of the encoding.
    """

    def __init__(self, encoding: tiktoken.Encoding, added: dict[int, AddedToken]):
        known = encoding._special_tokens
        own = [t for t in added.values() if t.content not in known or t.lstrip or t.rstrip or t.single_word]
        self._encoding, self._added = encoding, dict(added)
        self._ids = {**known, **{token.content: index for index, token in added.items()}}
        # tiktoken finds its own special tokens. Only where a user added others must the text be searched beforehand,
        # and then for all of them together, as the longest match wins.
        self._names = {token.content for token in own} | set(known)
        self._pattern = longest_first(frozenset(self._names)) if own else None

    def __call__(self, text: str, plain: bool, control: ControlText | None) -> list[int]:
        segments = self._segments(text, plain, control)
        all_ids = next(segments, ([],))[0]
        for ids, _, _ in segments:
            all_ids += ids
        return all_ids

    def with_offsets(self, text: str, plain: bool, control: ControlText | None) -> tuple[list[int], list[Range]]:
        """Ids of `text` and for each the range of characters it holds bytes of (several may share a character)."""
        # tiktoken replaces what UTF-8 cannot carry; doing it first keeps the counts right.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        all_ids, offsets = [], []
        for ids, start, end in self._segments(text, plain, control):
            all_ids += ids
            if len(ids) == 1:
                offsets.append((start, end))
                continue
            for token in self._encoding.decode_tokens_bytes(ids):
                begun = len(token.translate(None, _CONTINUATION_BYTES))  # characters whose first byte is in this token
                continues = token[0] in _CONTINUATION_BYTES  # a character begun before
                offsets.append((start - continues, start + begun))
                start += begun
        return all_ids, offsets

    def _segments(self, text: str, plain: bool, control: ControlText | None) -> Iterator[tuple[list[int], int, int]]:
        """Ids of consecutive parts of `text` with the character range of each part."""
        if plain or self._pattern is None:
            options = {"allowed_special": set() if plain or control else "all", "disallowed_special": ()}
            pieces, start = list(split_long_text(text)), 0
            if len(pieces) > 1 and (plain or not control):
                threads = min(len(pieces), os.cpu_count() or 1)
                for piece, ids in zip(pieces, self._encoding.encode_batch(pieces, num_threads=threads, **options)):
                    yield ids, start, start + len(piece)
                    start += len(piece)
                return
            for piece in pieces:
                begin, end = start, start + len(piece)
                # A token that was cut in two is none, here as elsewhere.
                for first, last in control.within(start, end) if control and not plain else ():
                    yield self._encoding.encode_ordinary(text[start:first]), start, first
                    yield [self._ids[text[first:last]]], first, last
                    start = last
                yield self._encoding.encode(piece[start - begin :], **options), start, end
                start = end
            return

        def between(start, end):
            for ids, first, last in self._segments(text[start:end], plain=True, control=None):
                yield ids, start + first, start + last

        done = 0
        for start, end in self._written_tokens(text, control):
            index = self._ids[text[start:end]]
            token = self._added.get(index, AddedToken(text[start:end]))
            alone = text[start - 1 : start] in ("", " ") and text[end : end + 1] in ("", " ")
            if start < done or (token.single_word and not alone):  # the token before may have taken leading spaces
                continue
            left = len(text[done:start].rstrip()) + done if token.lstrip else start
            yield from between(done, left)
            yield [index], start, end
            done = len(text) - len(text[end:].lstrip()) if token.rstrip else end
        yield from between(done, len(text))

    def _written_tokens(self, text: str, control: ControlText | None) -> Iterator[Range]:
        """Where `text` holds tokens to look up: all of them, or with `control` the control tokens that it allows and
        all that are none."""
        if control is None:
            yield from (match.span() for match in self._pattern.finditer(text))
            return
        ordinary, done = longest_first(frozenset(self._names - control.names)), 0
        for start, end in [*control.ranges, (len(text), len(text))]:
            yield from (match.span() for match in ordinary.finditer(text, done, start))
            if start < end:
                yield start, end
            done = end
