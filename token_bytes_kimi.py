"""Ids → bytes: a table of what all tokens stand for."""

from array import array
from collections.abc import Collection

import numpy as np


class TokenBytes:
    """The bytes of all tokens, one behind the other: many ids become their text in one gather.

    Args:
        tokens: the bytes of each id; None where an id has no token.
    """

    # Ids at once: what is held meanwhile, some 40 bytes per byte of text, stays in the processor's caches.
    STRIDE = 16_384

    def __init__(self, tokens: list[bytes | None]):
        self._lengths = np.array([-1 if token is None else len(token) for token in tokens])
        used = self._lengths.clip(0)
        self._starts = used.cumsum() - used
        self._bytes = np.frombuffer(b"".join(filter(None, tokens)), np.uint8)
        self._shorter = frozenset(), self._lengths  # with what was skipped last

    def join(self, ids: list[int], skipped: Collection[int] = frozenset()) -> bytes:
        """The bytes of `ids`, those in `skipped` left out.

        Raises:
            IndexError, OverflowError, ValueError: an id has no token.
            TypeError: an id is no integer.
        """
        known, lengths = self._shorter if skipped else (skipped, self._lengths)
        if known != skipped:  # rarely: a caller skips the special tokens, always the same ones
            lengths = self._lengths.copy()
            lengths[[*skipped]] = 0
            self._shorter = frozenset(skipped), lengths
        rows, parts = np.asarray(array("I", ids)), []
        for begin in range(0, len(rows), self.STRIDE):
            row = rows[begin : begin + self.STRIDE]
            length = lengths.take(row)
            # What is to be added to a byte's place in the text for its place in the table.
            shift = self._starts.take(row) - length.cumsum() + length
            places = shift.repeat(length)  # ValueError: a length of -1
            places += np.arange(len(places))
            parts.append(self._bytes.take(places).tobytes())
        return b"".join(parts)
