"""Latents of the requests at work: one batch whose rows have lengths of their own."""

import torch
from transformers.cache_utils import Cache

from ...cache_kimi_k26 import LatentLayer

# Room for so many tokens is not worth giving back.
SMALL = 2**14

# One row of a cache: for each layer the latents (length, rank) and the rotary keys (length, rope).
Contents = list[tuple[torch.Tensor, torch.Tensor]]


class RowLayer(LatentLayer):
    """One layer's rows: `keys` and `values` are views of buffers that the cache lays out, zero where unwritten."""

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache
        self.buffers: tuple[torch.Tensor, ...] = ()

    def allocate(self, like: torch.Tensor, widths: tuple[int, int]) -> None:
        """Buffers `(places, 1, columns, width)`. Zeros, as what a mask hides is still multiplied: it has to be finite."""
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        shape = (self.cache.places, 1, self.cache.columns)
        self.buffers = tuple(like.new_zeros(*shape, width) for width in widths)
        self.look()

    def look(self, ahead: int = 0) -> None:
        """See all rows from the beginning of the longest to the end, and `ahead` columns after it."""
        rows, end = self.cache.rows, self.cache.end
        seen = slice(end - self.cache.longest, end + ahead)
        self.keys, self.values = (buffer[:rows, :, seen] for buffer in self.buffers)

    def extend(self, like: torch.Tensor, widths: tuple[int, int], new: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        if not self.is_initialized:
            self.allocate(like, widths)
        self.look(ahead=new)
        return self.keys, self.values, self.cache.longest


class RowCache(Cache):
    """A cache of the library whose rows join and leave, each with its own length.

    All rows end at one column, where a step writes a token of each in place; a mask hides what stands before the shorter
    ones. Buffers are made anew only when a row or the column finds no room, or when they are mostly empty.

    Args:
        layers: decoder layers of the model.
        room: tokens that the first row can grow to before the buffers do.
    """

    def __init__(self, layers: int, room: int = 0):
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])
        self.places, self.columns, self.end = 1, max(1, room), 0
        self.lengths: list[int] = []

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def open_row(self) -> None:
        """An empty first row, for a prompt to be read into."""
        self.lengths, self.end = [0], 0

    def add_row(self, *pieces: Contents) -> None:
        """A new last row with a copy of these latents, one piece after the other."""
        length = sum(piece[0][0].shape[0] for piece in pieces)
        if self.rows == 0:
            self.end = min(length, self.columns)
        if self.rows == self.places or length > self.end:
            self._move(self.rows + 1, max(length, self.longest))
        self.lengths.append(length)
        for layer, *parts in zip(self.layers, *pieces):
            if not layer.is_initialized:
                layer.allocate(parts[0][0], tuple(part.shape[-1] for part in parts[0]))
            for buffer, some in zip(layer.buffers, zip(*parts)):
                torch.cat(some, out=buffer[self.rows - 1, 0, self.end - length : self.end])
            layer.look()

    def remove_row(self, row: int, wipe: bool = False) -> None:
        """The last row takes the place of `row`. `wipe`: what the row held may not be finite."""
        last, length = self.rows - 1, self.lengths[-1]
        self.lengths[row] = length
        self.lengths.pop()
        for layer in self.layers:
            for buffer in layer.buffers:
                if wipe:
                    buffer[row] = 0
                if row < last:
                    buffer[row, :, self.end - length : self.end] = buffer[last, :, self.end - length : self.end]
            layer.look()
        if self.places * self.columns > max(SMALL, 4 * self.rows * self.longest):
            self._move(self.rows, self.longest)

    def row(self, row: int) -> Contents:
        """The latents of a row, as views."""
        own = slice(self.end - self.lengths[row], self.end)
        return [tuple(buffer[row, 0, own] for buffer in layer.buffers) for layer in self.layers]

    def begin_step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Room for one more token in each row → its positions `(rows, 1)` and what it sees.

        The mask is `(rows, longest + 1)`, false for the padding before a row, or `None` where there is none.
        """
        if self.end == self.columns:
            self._move(self.rows, self.longest)
        positions = torch.tensor(self.lengths, device=device).unsqueeze(1)
        if min(self.lengths) == self.longest:
            return positions, None
        columns = torch.arange(self.longest + 1, device=device)
        return positions, columns >= self.longest - positions

    def end_step(self, tokens: int = 1) -> None:
        """Every row has grown by so many tokens; more that were written are forgotten."""
        self.lengths = [length + tokens for length in self.lengths]
        self.end += tokens
        for layer in self.layers:
            if layer.is_initialized and layer.keys.shape[2] != self.longest:
                layer.look()

    def _move(self, rows: int, end: int) -> None:
        """To new buffers for so many rows that end at column `end`, with some to spare."""
        before, kept = self.end, self.longest
        self.places = max(1, rows if rows <= self.places else rows + rows // 2)
        self.end, self.columns = end, end + end // 4 + 64
        for layer in self.layers:
            if layer.is_initialized:
                held = layer.buffers
                layer.allocate(held[0], (held[0].shape[-1], held[1].shape[-1]))
                for buffer, old in zip(layer.buffers, held):
                    buffer[: self.rows, :, end - kept : end] = old[: self.rows, :, before - kept : before]
