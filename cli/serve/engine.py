"""The engine: one thread in which all running requests are decoded together.

A prompt is read piece by piece (a picture, or a chunk of tokens) between the steps of those that are already answering;
then its latents join the batch as one row for each reply wanted. A row leaves when its reply ends or its client has
gone. What a dialogue leaves behind is kept for its next turn.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional, Protocol

import numpy as np
import torch

from .latents import RowCache
from .prefixes import Prefixes
from .sampling import Sampled, Sampler, sample

logger = logging.getLogger(__name__)


# Pieces of prompts have few different lengths: for each that is new, PyTorch's libraries make and keep kernels.
PAD_TO = 16

# Chunks of a prompt that nobody waits for: each has its costs, which the first token of the reply has to wait for.
ALONE = 8


class QueueFull(Exception):
    """There is no place left to wait in."""


class Stopped(Exception):
    """The engine takes no more requests."""


class Reply(Protocol):
    """Where tokens go; called in the engine's thread."""

    def take(self, sampled: Sampled) -> Optional[str]:
        """A token of the reply → why it ends with it, or None."""

    def end(self, reason: str) -> None:
        """The reply is over: "stop" or "length"."""

    def fail(self, cause: str) -> None:
        """The reply cannot go on: "timeout", "stopped", "schema" (its guide failed) or "error"."""


class Guide(Protocol):
    """What a reply may say."""

    failed: Optional[str]

    def restrict(self, logits: torch.Tensor) -> None:
        """Forbids tokens in `(vocabulary,)`, in place."""

    def accept(self, token: int) -> None:
        """The token that was chosen."""


@dataclass
class Clip:
    """A picture or a clip of a video: its patches as the processor gives them, and the place of its tokens."""

    pixel_values: torch.Tensor  # (patches, 3, patch, patch), in the dtype of the model
    grid: torch.Tensor  # (1, 3): frames, patch rows, patch columns
    start: int
    tokens: int


@dataclass
class Prompt:
    """What a request says. `keys`: an int64 for each token by which known beginnings are found (see `Prefixes`)."""

    ids: list[int]
    keys: np.ndarray
    clips: list[Clip] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of its pictures and videos."""
        return sum(clip.pixel_values.nbytes for clip in self.clips)


@dataclass(eq=False)
class Sequence:
    """One reply to a prompt: what was said so far and how it goes on.

    max_tokens: length of the reply at most. deadline: `time.monotonic()` at which it is given up.
    """

    prompt: Prompt
    reply: Reply
    sampler: Sampler
    max_tokens: int
    deadline: float
    guide: Optional[Guide] = None
    said: list[int] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that did not have to be read
    cancelled: bool = False

    def keys(self) -> np.ndarray:
        return np.concatenate((self.prompt.keys, np.array(self.said, dtype=np.int64)))


class Reading:
    """A prompt that is being read, for one or several replies (several: all of them still at their beginning)."""

    def __init__(self, sequences: list[Sequence]):
        self.sequences = sequences
        self.prompt, self.ids = sequences[0].prompt, [*sequences[0].prompt.ids, *sequences[0].said]
        self.cache: Optional[RowCache] = None
        self.features: dict[int, torch.Tensor] = {}  # by clip, while its tokens are not all read

    @property
    def done(self) -> int:
        return self.cache.longest if self.cache is not None else 0


class Engine:
    """Answers many requests at once with one model.

    Args:
        model: a `KimiK26ForConditionalGeneration`.
        end_ids: ids with which a reply ends.
        rows: replies decoded together at most.
        queue: replies waiting at most.
        chunk: tokens of a prompt read between two steps, while there are others; `ALONE` times as many without.
        cache_tokens: places in the batch, rows times the longest, at most. Where they run out the youngest reply waits
            and is read again later. Also the longest that prompt and reply together can be.
        prefix_tokens: tokens of answered dialogues that are kept.
    """

    slack = 128  # whoever joins finds places for so many tokens more, so as not to be sent back at once

    def __init__(self, model, end_ids, rows=16, queue=64, chunk=512, cache_tokens=2**20, prefix_tokens=2**18):
        self.model, self.end_ids, self.device = model, frozenset(end_ids), model.device
        self.rows, self.queue, self.chunk, self.cache_tokens = rows, queue, chunk, cache_tokens
        self.layers = model.config.text_config.num_hidden_layers
        self.prefixes = Prefixes(prefix_tokens)
        self.counts: Counter[str] = Counter()  # and seconds of reading and stepping
        self._waiting: deque[list[Sequence]] = deque()
        self._reading: deque[Reading] = deque()
        self._running: list[Sequence] = []  # in the order of the cache's rows
        self._cache = RowCache(self.layers)
        self._changed = threading.Condition()  # guards _waiting, _open and _halt
        self._open, self._halt = True, False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # -- from other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Replies to one prompt. Raises `QueueFull` or `Stopped`."""
        with self._changed:
            if not self._open:
                raise Stopped
            if sum(map(len, self._waiting)) + len(sequences) > self.queue + self._free_rows():
                raise QueueFull
            self._waiting.append(sequences)
            self._changed.notify()

    def close(self, halt: bool = False) -> None:
        """No more requests; those at work are finished, or with `halt` ended at once."""
        with self._changed:
            self._open, self._halt = False, self._halt or halt
            self._changed.notify()

    def join(self, timeout: Optional[float] = None) -> bool:
        """Waits until the thread has ended after `close`; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def closed(self) -> bool:
        return not self._open

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self._running) + sum(len(reading.sequences) for reading in tuple(self._reading))

    @property
    def waiting(self) -> int:
        return sum(map(len, tuple(self._waiting)))

    def _free_rows(self) -> int:
        return max(0, self.rows - self.running)

    # -- the thread ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._changed:
                while self._open and not (self._waiting or self._reading or self._running):
                    self._changed.wait()
                if self._halt:
                    break
                self._admit()
            if not (self._open or self._waiting or self._reading or self._running):
                break
            self._drop()
            ready = self._guarded("reading", self._read, lambda: self._reading.popleft().sequences)
            if ready is not None:
                self._guarded("stepping", lambda: self._join(*ready), self._empty)
            self._guarded("stepping", self._step, self._empty)
        self._fail(self._everyone(), "stopped")

    def _guarded(self, kind: str, work: Callable, victims: Callable[[], list[Sequence]]):
        """What `work` gives. Whatever goes wrong takes along those that were worked on, and not the engine."""
        began = time.perf_counter()
        try:
            return work()
        except Exception:
            logger.exception("the engine could not go on with some requests")
            self._fail(victims(), "error")
        finally:
            self.counts[f"{kind}_seconds"] += time.perf_counter() - began

    def _fail(self, sequences: list[Sequence], cause: str) -> None:
        for sequence in sequences:
            sequence.reply.fail(cause)
        self.counts[f"failed_{cause}"] += len(sequences)

    def _empty(self) -> list[Sequence]:
        """Everyone leaves the batch."""
        left, self._running, self._cache = self._running, [], RowCache(self.layers)
        return left

    def _everyone(self) -> list[Sequence]:
        with self._changed:
            waiting = [sequence for sequences in self._waiting for sequence in sequences]
            self._waiting.clear()
        reading = [sequence for one in self._reading for sequence in one.sequences]
        self._reading.clear()
        return [*waiting, *reading, *self._empty()]

    def _admit(self) -> None:
        """Whoever waits goes on as long as there are rows, and places in the batch for them."""
        while self._waiting:
            first = self._waiting[0]
            if self.running + len(first) > self.rows:
                return
            lengths = [len(s.prompt.ids) + len(s.said) for s in self._running]
            lengths += [len(one.ids) for one in self._reading for _ in one.sequences]
            length = len(first[0].prompt.ids) + len(first[0].said) + self.slack
            if lengths and (len(lengths) + len(first)) * max(*lengths, length) > self.cache_tokens:
                return
            self._reading.append(Reading(self._waiting.popleft()))

    def _drop(self) -> None:
        """Those whose client has gone leave, and those whose time is over."""
        now = time.monotonic()

        def stays(sequence: Sequence) -> bool:
            if sequence.deadline < now and not sequence.cancelled:
                self._fail([sequence], "timeout")
                sequence.cancelled = True
            return not sequence.cancelled

        with self._changed:
            for sequences in self._waiting:
                sequences[:] = [sequence for sequence in sequences if stays(sequence)]
            self._waiting = deque(sequences for sequences in self._waiting if sequences)
        for reading in self._reading:
            reading.sequences = [sequence for sequence in reading.sequences if stays(sequence)]
        self._reading = deque(reading for reading in self._reading if reading.sequences)
        for row in reversed(range(len(self._running))):
            if not stays(self._running[row]):
                self._leave(row)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _read(self) -> Optional[tuple[Reading, torch.Tensor]]:
        """One piece of the prompt whose turn it is; when it is read through, the prompt and its logits."""
        if not self._reading:
            return None
        reading = self._reading[0]
        if reading.cache is None:
            self._open_cache(reading)
        start = reading.done
        alone = not self._running and len(self._reading) == 1
        stop = min(start + self.chunk * (ALONE if alone else 1), len(reading.ids))
        clips = [
            number
            for number, clip in enumerate(reading.prompt.clips)
            if clip.start < stop and clip.start + clip.tokens > start
        ]
        unseen = [number for number in clips if number not in reading.features]
        if unseen:
            clip = reading.prompt.clips[unseen[0]]
            reading.features[unseen[0]] = self.model.get_image_features(
                clip.pixel_values.to(self.device), clip.grid.to(self.device)
            )
            if len(unseen) > 1:  # one at a time, as this may take long
                self._reading.rotate(-1)
                return None
        # What follows is not seen by what comes before it, and its latents are written over.
        fill = [0] * (padded(stop - start) - (stop - start))
        ids = torch.tensor([[*reading.ids[start:stop], *fill]], device=self.device)
        logits = self.model(
            input_ids=ids,
            past_key_values=reading.cache,
            use_cache=True,
            logits_to_keep=torch.tensor([stop - start - 1], device=self.device),
            **self._media(reading, clips, start, start + ids.shape[1]),
        ).logits[:, -1]
        reading.cache.end_step(stop - start)
        self.counts["prompt_tokens_read"] += stop - start
        for number in clips:
            clip = reading.prompt.clips[number]
            if clip.start + clip.tokens <= stop:
                del reading.features[number]
        if stop < len(reading.ids):
            self._reading.rotate(-1)
            return None
        return self._reading.popleft(), logits

    def _join(self, reading: Reading, logits: torch.Tensor) -> None:
        """The replies to a prompt that has been read enter the batch, each with its first token."""
        first, contents = len(self._running), reading.cache.row(0)
        self._running += reading.sequences
        for _ in reading.sequences:
            self._cache.add_row(contents)
        rows = range(first, len(self._running))
        self._take(rows, logits.expand(len(rows), -1))

    def _open_cache(self, reading: Reading) -> None:
        """A cache for the prompt, which begins with what is known of it already."""
        reading.cache = cache = RowCache(self.layers, len(reading.ids) + PAD_TO)
        keys = reading.sequences[0].keys()
        running = [(sequence.prompt.keys, self._cache.row(row)) for row, sequence in enumerate(self._running)]
        length, pieces = self.prefixes.find(keys[:-1], running)
        if not pieces:
            cache.open_row()
            return
        cache.add_row(*pieces)
        self.counts["prompt_tokens_reused"] += length
        for sequence in reading.sequences:
            sequence.cached = 0 if sequence.said else length

    def _media(self, reading: Reading, clips: list[int], start: int, stop: int) -> dict[str, torch.Tensor]:
        """Features of these clips, and which of them stands where among the tokens from `start` to `stop`."""
        if not clips:
            return {}
        index = torch.full((1, stop - start), -1)
        row = 0
        for number in clips:
            clip = reading.prompt.clips[number]
            first, last = max(clip.start, start), min(clip.start + clip.tokens, stop)
            index[0, first - start : last - start] = torch.arange(first - clip.start, last - clip.start) + row
            row += clip.tokens
        features = torch.cat([reading.features[number] for number in clips])
        return {"media_features": features, "media_index": index.to(self.device)}

    # -- replies ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One more token for every row."""
        self._make_room()
        if not self._running:
            return
        positions, mask = self._cache.begin_step(self.device)
        last = torch.tensor([[sequence.said[-1]] for sequence in self._running], device=self.device)
        logits = self.model(
            input_ids=last,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._cache.end_step()
        self.counts["steps"] += 1
        self._take(range(len(self._running)), logits)

    def _make_room(self) -> None:
        """The youngest wait again while the batch has outgrown its places."""
        while len(self._running) > 1 and len(self._running) * (self._cache.longest + 1) > self.cache_tokens:
            sequence = self._running[-1]
            self._leave(len(self._running) - 1, keep=True)
            with self._changed:
                self._waiting.appendleft([sequence])
            self.counts["preempted"] += 1

    def _take(self, rows: range, logits: torch.Tensor) -> None:
        """The next token of these rows goes to their replies; those that end with it leave."""
        sequences = [self._running[row] for row in rows]
        chosen = sample(logits, [s.sampler for s in sequences], [s.guide for s in sequences])
        for row, sequence, sampled in reversed(list(zip(rows, sequences, chosen))):
            failed = sampled is None or (sequence.guide is not None and sequence.guide.failed)
            if failed:
                logger.error("a reply cannot go on: %s", "its logits are not finite" if sampled is None else failed)
                self._fail([sequence], "error" if sampled is None else "schema")
                self._leave(row, wipe=sampled is None)
                continue
            sequence.said.append(sampled.token)
            self.counts["tokens_said"] += 1
            if sequence.guide is not None:
                sequence.guide.accept(sampled.token)
            if sampled.token in self.end_ids:
                reason = "stop"
            else:
                reason = sequence.reply.take(sampled)
                full = len(sequence.said) >= sequence.max_tokens
                full = full or len(sequence.prompt.ids) + len(sequence.said) >= self.cache_tokens
                reason = reason or ("length" if full else None)
            if reason is not None:
                self._leave(row, keep=True)
                sequence.reply.end(reason)

    def _leave(self, row: int, keep: bool = False, wipe: bool = False) -> None:
        """A row is given up; with `keep` its latents stay known. The last row takes its place."""
        sequence = self._running[row]
        if keep:
            length = self._cache.lengths[row]
            self.prefixes.add(sequence.keys()[:length], self._cache.row(row))
        self._cache.remove_row(row, wipe)
        self._running[row] = self._running[-1]
        self._running.pop()


def padded(tokens: int) -> int:
    """A length that so many tokens are filled up to, one of a few."""
    return -(-tokens // PAD_TO) * PAD_TO if tokens > PAD_TO else 1 << (tokens - 1).bit_length()


def prompt_keys(ids: list[int], clips: list[Clip], digests: list[int]) -> np.ndarray:
    """Keys of a prompt: the ids, and for the tokens of each clip a negative number made from its `digest`."""
    keys = np.array(ids, dtype=np.int64)
    for clip, digest in zip(clips, digests):
        keys[clip.start : clip.start + clip.tokens] = -1 - digest
    return keys
