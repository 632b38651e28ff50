"""A dialogue with a checkpoint: its messages, its pictures and videos, and what the model has read of them."""

import shlex
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..response_kimi import ResponseParser, join_deltas
from . import TEMPERATURE, TOP_P
from .loading import end_ids

THINKING = {
    "on": {"thinking": True},
    "off": {"thinking": False},
    "keep": {"thinking": True, "preserve_thinking": True},
}


class ChatError(Exception):
    """Something about a line that the user can mend. The dialogue is as it was."""


class Stopped(Exception):
    """Ctrl-C while an answer was written."""


class Page(Protocol):
    """What shows an answer."""

    def begin(self, unread: int) -> None:
        """An answer begins, once so many tokens have been read."""

    def show(self, delta: dict) -> None:
        """A piece of it, as `ResponseParser` gives it."""


@dataclass(frozen=True)
class Settings:
    """max_new_tokens: of an answer. temperature: 0 is greedy; None the recommended one, by thinking. top_p: 0 to 1."""

    max_new_tokens: int = 32768
    temperature: float | None = None
    top_p: float = TOP_P


@dataclass
class Answer:
    """reply: `reasoning`, `content`, `tool_calls`. ending: "whole", "stopped" or "length". known: tokens of the prompt
    that did not have to be read again, of all `prompt`; said: tokens. kept: whether it became part of the dialogue."""

    reply: dict
    ending: str
    kept: bool
    prompt: int
    known: int
    said: int
    seconds: float


class Dialogue:
    """Messages, and a cache with what the model has read of them.

    Args:
        model, processor: of one checkpoint.
        system: the system prompt, if any.
        think: "on", "off" or "keep".

    Attributes:
        messages: those that have been answered, and the answers.
        waiting: pictures and videos that go with the next message.
    """

    def __init__(self, model, processor, settings: Settings = Settings(), system: str | None = None, think: str = "on"):
        self.model, self.processor, self.settings, self.think = model, processor, settings, think
        self._beginning = [{"role": "system", "content": system}] if system else []
        self._stop = False
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                module.register_forward_pre_hook(self._check)
        self.clear()

    def clear(self) -> None:
        """Forgets all but the system prompt."""
        self.messages, self.waiting = list(self._beginning), []
        self._cache, self._known = None, []  # `_known`: the ids whose latents are in the cache

    def attach(self, kind: str, path: str) -> int:
        """An "image" or "video" to go with the next message → its tokens. The file is read now, and not again.

        Raises:
            ChatError: it is not there or cannot be used.
        """
        from ..media_kimi_k26 import MediaError, MediaLimits

        if self.model.config.vision_config is None:
            raise ChatError("this checkpoint has no vision part: it takes text alone")
        try:
            file = find(path)
            MediaLimits().check("max_bytes", file.stat().st_size, "encoded size in bytes")
            part = {"type": kind, kind: file.read_bytes()}
            inputs = self._inputs([{"role": "user", "content": [part]}])
        except OSError as error:
            raise ChatError(f"{path}: {error.strerror or error}") from error
        except MediaError as error:
            raise ChatError(f"{path}: " + str(error).removeprefix("messages[0].content[0]: ")) from error
        self.waiting.append(part)
        return int((inputs["input_ids"] == self.processor.image_token_id).sum())

    def ask(self, text: str, page: Page) -> Answer:
        """A message and its answer, which `page` shows while it is written.

        An answer that ended before it said anything is not kept, nor is the message: its pictures wait for another.

        Raises:
            ChatError: the dialogue is too long. Whatever is raised, the dialogue is as it was.
        """
        content = [*self.waiting, {"type": "text", "text": text}] if self.waiting else text
        message, flags = {"role": "user", "content": content}, THINKING[self.think]
        inputs = self._inputs([*self.messages, message], **flags)
        ids = inputs["input_ids"][0].tolist()
        limit = self.model.config.text_config.max_position_embeddings
        if len(ids) >= limit:
            raise ChatError(f"the dialogue has {len(ids)} tokens, and the model reads {limit}: /clear begins a new one")
        known = self._recall(ids)
        page.begin(len(ids) - known)
        pen = Pen(ResponseParser(flags["thinking"], self.processor.tokenizer), page)
        start, ending = time.perf_counter(), "whole"
        try:
            with self._stoppable():
                self.model.generate(
                    **self._unread(inputs, known).to(self.model.device),
                    **self._choice(),
                    max_new_tokens=min(self.settings.max_new_tokens, limit - len(ids)),
                    eos_token_id=end_ids(self.model),
                    past_key_values=self._cache,
                    streamer=pen,
                )
            if pen.said[-1] not in end_ids(self.model):
                ending = "length"
        except Stopped:
            ending = "stopped"
            pen.end()
        if pen.said:
            self._known = [*ids, *pen.said[:-1]]  # each step reads the token before the one it says
        reply = join_deltas(pen.deltas)
        kept = ending == "whole" or bool(reply["content"] or reply["tool_calls"])
        if kept:
            self.messages += [message, {"role": "assistant", **reply}]
            self.waiting = []
        return Answer(reply, ending, kept, len(ids), known, len(pen.said), time.perf_counter() - start)

    def _inputs(self, messages: list[dict], **flags):
        return self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **flags
        )

    def _recall(self, ids: list[int]) -> int:
        """Cuts the cache to the beginning that it shares with a prompt → its length. One token at least is to be read.

        Messages are only ever appended, so that equal ids are equal pictures, too.
        """
        from transformers import DynamicCache

        pairs = enumerate(zip(ids[:-1], self._known))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(ids) - 1, len(self._known)))
        self._known = ids[:shared]
        if not shared:
            self._cache = DynamicCache()
        for layer in self._cache.layers:  # of different lengths, where the last answer was stopped
            surplus = layer.get_seq_length() - shared
            if surplus:
                layer.crop(-surplus)
        return shared

    def _unread(self, inputs, known: int):
        """The inputs without the pictures and clips whose tokens are all among the `known` ones."""
        if "grid_thws" not in inputs:
            return inputs
        grids = inputs["grid_thws"]
        rows, columns = self.model.config.vision_config.merge_kernel_size
        tokens = grids[:, 1] * grids[:, 2] // (rows * columns)
        seen = int((inputs["input_ids"][0, :known] == self.processor.image_token_id).sum())
        done = int((tokens.cumsum(0) <= seen).sum())
        inputs["pixel_values"] = inputs["pixel_values"][int(grids[:done].prod(-1).sum()) :]
        inputs["grid_thws"] = grids[done:]
        if done == len(grids):
            del inputs["pixel_values"], inputs["grid_thws"]
        return inputs

    def _choice(self) -> dict:
        """How `generate` chooses tokens."""
        temperature = self.settings.temperature
        temperature = TEMPERATURE[self.think != "off"] if temperature is None else temperature
        if temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_p": self.settings.top_p, "top_k": 0}

    @contextmanager
    def _stoppable(self):
        """Inside, Ctrl-C raises `Stopped` at the next layer. Anywhere else it would leave things half done."""

        def note(*_):
            self._stop = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._stop = False

    def _check(self, *_) -> None:
        if self._stop:
            raise Stopped


class Pen:
    """A streamer for `generate` that shows the reply in the thread that writes it.

    Attributes:
        said: ids of the reply.
        deltas: as `ResponseParser` gives them.
    """

    def __init__(self, parser, page: Page):
        self.said, self.deltas = [], []
        self._parser, self._page, self._has_prompt = parser, page, False

    def put(self, value) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        ids = value.reshape(-1).tolist()
        self.said += ids
        self._show(self._parser.feed(ids))

    def end(self) -> None:
        self._show(self._parser.finish())

    def _show(self, deltas: list[dict]) -> None:
        self.deltas += deltas
        for delta in deltas:
            self._page.show(delta)


def find(path: str) -> Path:
    """A file by its name as users type or drop it: with `~`, quotes or backslashes. Raises `OSError`."""
    file = Path(path).expanduser()
    if not file.exists():
        try:
            words = shlex.split(path)
        except ValueError:  # a lone quote
            words = []
        if len(words) == 1:
            file = Path(words[0]).expanduser()
    if file.exists() and not file.is_file():
        raise OSError("is not a file")
    return file
