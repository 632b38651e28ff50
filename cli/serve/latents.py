"""Latents of the requests at work: one batch whose rows have lengths of their own, and prefixes kept for later."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

# Room for so many tokens is not worth giving back.
SMALL = 2**14

# One row of a cache: for each layer the latents (length, rank) and the rotary keys (length, rope).
Contents = list[tuple[torch.Tensor, torch.Tensor]]


class LatentLayer(DynamicLayer):
    """One layer's buffers: keys `(places, 1, room, rank)` and values `(places, 1, room, rope)`, zero where unwritten."""

    def __init__(self, cache: "LatentCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.cache.places, 1, self.cache.room)
        # Zeros, as what a mask hides is still multiplied, by nothing: it has to be finite.
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes the new tokens behind those of each row, and gives back all rows up to the longest, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        rows, new = key_states.shape[0], key_states.shape[2]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if rows == 1:
                buffer[0, 0, cache.lengths[0] : cache.lengths[0] + new] = states[0, 0]
            else:
                buffer[cache.row_index, 0, cache.ends] = states[:, 0, 0]
        seen = cache.longest + new
        return self.keys[:rows, :, :seen], self.values[:rows, :, :seen]

    def move(self):
        """To buffers of the size the cache has now."""
        if not self.is_initialized:
            return
        keys, values = self.keys, self.values
        self.lazy_initialization(keys, values)
        rows, length = self.cache.rows, self.cache.longest
        self.keys[:rows, :, :length] = keys[:rows, :, :length]
        self.values[:rows, :, :length] = values[:rows, :, :length]

    def get_seq_length(self, *args) -> int:
        return self.cache.longest


class LatentCache(Cache):
    """A cache of the library whose rows join and leave, each with its own length.

    Every row starts at column 0, so that nothing moves when another row comes, grows or goes. A step writes one token to
    each row in place; buffers are made anew only when rows or lengths outgrow them, or fill less than a quarter.

    Args:
        layers: decoder layers of the model.
        room: tokens a row can hold before the buffers grow.
    """

    def __init__(self, layers: int, room: int = 0):
        super().__init__(layers=[LatentLayer(self) for _ in range(layers)])
        self.places, self.room = 1, max(1, room)
        self.lengths: list[int] = []

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def open_row(self) -> None:
        """An empty first row, for a prompt to be read into."""
        self.lengths = [0]

    def add_row(self, contents: Contents) -> None:
        """A new last row with a copy of these latents."""
        length = contents[0][0].shape[0]
        self._grow(self.rows + 1, max(self.longest, length) + 1)
        for layer, (keys, values) in zip(self.layers, contents):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys[self.rows, 0, :length] = keys
            layer.values[self.rows, 0, :length] = values
        self.lengths.append(length)

    def remove_row(self, row: int, wipe: bool = False) -> None:
        """The last row takes the place of `row`. `wipe`: what the row held may not be finite."""
        last = self.rows - 1
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                if wipe:
                    buffer[row] = 0
                if row < last:
                    length = self.lengths[last]
                    buffer[row, :, :length] = buffer[last, :, :length]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if 4 * self.rows * (self.longest + 1) < self.places * self.room > SMALL:
            self._move(self.rows, self.longest + 1)

    def row(self, row: int) -> Contents:
        """The latents of a row, as views."""
        length = self.lengths[row]
        return [(layer.keys[row, 0, :length], layer.values[row, 0, :length]) for layer in self.layers]

    def begin_step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Room for one more token in each row → its positions `(rows, 1)` and the mask of what it sees.

        The mask is `(rows, 1, 1, longest + 1)`, true where visible, or `None` where every row sees all.
        """
        self._grow(self.rows, self.longest + 1)
        self.ends = torch.tensor(self.lengths, device=device)
        self.row_index = torch.arange(self.rows, device=device)
        positions = self.ends.unsqueeze(1)
        if min(self.lengths) == self.longest:
            return positions, None
        keys = torch.arange(self.longest + 1, device=device)
        return positions, (keys <= positions)[:, None, None]

    def end_step(self, tokens: int = 1) -> None:
        """Every row has grown by so many tokens."""
        self.lengths = [length + tokens for length in self.lengths]

    def _grow(self, rows: int, length: int) -> None:
        if rows > self.places or length > self.room:
            self._move(max(rows, self.places), max(length, self.room))

    def _move(self, rows: int, length: int) -> None:
        """To new buffers for so many rows and tokens, with some to spare."""
        self.places = rows if rows == self.places else rows + rows // 2
        self.room = length if length == self.room else length + length // 4 + 64
        for layer in self.layers:
            layer.move()


class Prefixes:
    """Latents of dialogues that have been answered, for those that go on. The least recently used go first.

    Tokens are told apart by int64 keys: their id, or for the tokens of a picture a number made from its content.

    Args:
        budget: tokens held at most.
        dialogues: held at most.
    """

    def __init__(self, budget: int, dialogues: int = 128):
        self.budget, self.dialogues, self.tokens = budget, dialogues, 0
        self._entries: list[tuple[np.ndarray, Contents]] = []  # the latest last

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: np.ndarray, running: Sequence[tuple[np.ndarray, Contents]] = ()) -> tuple[int, Contents | None]:
        """How many tokens of `keys` are known already, and the latents of at least so many.

        Args:
            keys: int64, `(length,)`.
            running: rows at work, which serve as well: their keys and latents.
        """
        best, found, at = 0, None, None
        for number, (known, contents) in enumerate([*self._entries, *running]):
            length = shared(known, keys)
            if length > best:
                best, found, at = length, contents, number
        if at is not None and at < len(self._entries):
            self._entries.append(self._entries.pop(at))
        return best, found

    def add(self, keys: np.ndarray, contents: Contents) -> None:
        """Keep a copy of a row. What it continues is not needed any more."""
        if len(keys) > self.budget or any(shared(known, keys) == len(keys) for known, _ in self._entries):
            return
        self._entries = [entry for entry in self._entries if shared(entry[0], keys) < len(entry[0])]
        self._entries.append((keys.copy(), [(latents.clone(), rotary.clone()) for latents, rotary in contents]))
        self.tokens = sum(len(known) for known, _ in self._entries)
        while self.tokens > self.budget or len(self) > self.dialogues:
            self.tokens -= len(self._entries.pop(0)[0])

    def clear(self) -> None:
        self._entries, self.tokens = [], 0


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
