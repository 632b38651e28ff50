"""Latents of dialogues that have been answered, for those that go on or begin alike."""

from collections.abc import Sequence

import numpy as np

from .latents import Contents


class Run:
    """Tokens that some dialogues have in common, after those of its parents.

    Attributes:
        keys: int64, `(length,)`, at least one.
        next: runs that may follow, by their first key.
        used: when it was last of use.
    """

    def __init__(self, keys: np.ndarray, contents: Contents, parent: "Run | None"):
        self.keys, self.contents, self.parent = keys, contents, parent
        self.next: dict[int, Run] = {}
        self.used = 0


class Prefixes:
    """A tree of runs of tokens with their latents: what dialogues begin with alike is kept once.

    Tokens are told apart by int64 keys: their id, or for the tokens of a picture a number made from its content. Where
    there is no room the ends of the least recently used dialogues go first.

    Args:
        budget: tokens held at most.
        dialogues: held at most, that is, ends of the tree.
    """

    def __init__(self, budget: int, dialogues: int = 128):
        self.budget, self.dialogues = budget, dialogues
        self._clock = 0
        self.clear()

    def clear(self) -> None:
        self.tokens, self._root, self._runs = 0, Run(np.empty(0, np.int64), [], None), []

    def __len__(self) -> int:
        """Dialogues held."""
        return sum(not run.next for run in self._runs)

    def find(self, keys: np.ndarray, running: Sequence[tuple[np.ndarray, Contents]] = ()) -> tuple[int, list[Contents]]:
        """How many tokens of `keys` are known already, and their latents in pieces, in order.

        Args:
            keys: int64, `(length,)`.
            running: rows at work, which serve as well: their keys and latents.
        """
        self._clock += 1
        run, known, pieces = self._root, 0, []
        while known < len(keys) and (run := run.next.get(int(keys[known]))) is not None:
            run.used = self._clock
            length = shared(run.keys, keys[known:])
            pieces.append(cut(run.contents, 0, length))
            known += length
            if length < len(run.keys):
                break
        for others, contents in running:
            length = shared(others, keys)
            if length > known:
                known, pieces = length, [cut(contents, 0, length)]
        return known, pieces

    def add(self, keys: np.ndarray, contents: Contents) -> None:
        """Keep a copy of a row, or of what is new in it."""
        if len(keys) > self.budget:
            return
        self._clock += 1
        run, known = self._root, 0
        while known < len(keys):
            after = run.next.get(int(keys[known]))
            if after is None:
                run = self._hang(run, keys[known:], cut(contents, known, len(keys)))
            else:
                length = shared(after.keys, keys[known:])
                run = after if length == len(after.keys) else self._split(after, length)
            run.used = self._clock
            known += len(run.keys)
        while self.tokens > self.budget or len(self) > self.dialogues:
            self._drop(min((run for run in self._runs if not run.next), key=lambda run: run.used))

    def _hang(self, parent: Run, keys: np.ndarray, contents: Contents) -> Run:
        """A new run with copies of these."""
        run = Run(keys.copy(), [(latents.clone(), rotary.clone()) for latents, rotary in contents], parent)
        parent.next[int(keys[0])] = run
        self._runs.append(run)
        self.tokens += len(keys)
        return run

    def _split(self, run: Run, length: int) -> Run:
        """The first `length` tokens of a run become a run of their own."""
        self._drop(run)
        first = self._hang(run.parent, run.keys[:length], cut(run.contents, 0, length))
        rest = self._hang(first, run.keys[length:], cut(run.contents, length, len(run.keys)))
        rest.next, rest.used = run.next, run.used
        for after in rest.next.values():
            after.parent = rest
        return first

    def _drop(self, run: Run) -> None:
        del run.parent.next[int(run.keys[0])]
        self._runs.remove(run)
        self.tokens -= len(run.keys)


def cut(contents: Contents, start: int, stop: int) -> Contents:
    return [(latents[start:stop], rotary[start:stop]) for latents, rotary in contents]


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
