"""Tokens of a reply → what is sent: deltas, log probabilities, the reason of the end; whole or as chunks."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from ...response_kimi import CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, ResponseParser, join_deltas
from ...vocabulary_kimi import spelled
from .sampling import Sampled


@dataclass
class Event:
    """What happened in a reply: deltas in OpenAI's shape with the log probabilities of their tokens, or its end."""

    index: int  # of the choice
    deltas: list[dict[str, Any]] = field(default_factory=list)
    logprobs: Optional[dict[str, list[dict]]] = None
    reason: Optional[str] = None  # why it ended: "stop", "length" or "tool_calls"
    failure: Optional[str] = None  # why it could not go on: see `engine.Reply.fail`
    gone: bool = False  # the client has left


class StopTexts:
    """Finds the first of some texts in a text that comes in pieces, and lets through what cannot be part of one."""

    def __init__(self, stops: list[str]):
        self._stops, self._tail = stops, ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The next piece → what can be sent, and whether a stop was reached, which is not sent."""
        text = self._tail + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._tail = ""
            return text[: min(found)], True
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._tail = text[start:]
                return text[:start], False
        self._tail = ""
        return text, False

    def flush(self) -> str:
        """What was kept back, as nothing follows."""
        text, self._tail = self._tail, ""
        return text


class Reply:
    """One choice of an answer: reads its tokens in the engine's thread and sends events.

    Args:
        index: of the choice.
        tokenizer: a `TikTokenTokenizer`.
        thinking: whether the prompt leaves thinking open.
        send: takes the `Event`s.
        stops: texts that end the content.
        one_call: end with the first tool call.
        logprobs: whether to tell the log probabilities of content and reasoning.
    """

    def __init__(
        self,
        index: int,
        tokenizer,
        thinking: bool,
        send: Callable[[Event], None],
        stops: list[str],
        one_call: bool = False,
        logprobs: bool = False,
    ):
        self.index, self.reasoning_tokens, self.has_calls = index, 0, False
        self._tokenizer, self._send, self._logprobs = tokenizer, send, logprobs
        self._parser = ResponseParser(thinking, tokenizer)
        self._stops = StopTexts(stops)
        known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._special = set(known.values())
        self._opens_calls = {known.get(SECTION_BEGIN), known.get(CALL_BEGIN)}
        self._closes_calls = known.get(SECTION_END)
        self._last_token = known.get(CALL_END) if one_call else None
        self._in_calls = False

    def take(self, sampled: Sampled) -> Optional[str]:
        reasons = self._parser.in_reasoning
        self.reasoning_tokens += reasons
        deltas, stopped = self._filter(self._parser.feed(sampled.token))
        told = self._tell(sampled, reasons) if self._logprobs else None
        if deltas or told:
            self._send(Event(self.index, deltas, told))
        return "stop" if stopped or sampled.token == self._last_token else None

    def end(self, reason: str) -> None:
        deltas = self._parser.finish()
        if reason == "length":  # a call whose name is not complete is none
            begun = {part["index"] for delta in deltas for part in delta.get("tool_calls", ()) if "id" in part}
            deltas = [delta for delta in deltas if not any(part["index"] in begun for part in delta.get("tool_calls", ()))]
        deltas, stopped = self._filter(deltas)
        kept = "" if stopped else self._stops.flush()
        deltas += [{"content": kept}] if kept else []
        if self.has_calls and reason == "stop":
            reason = "tool_calls"
        self._send(Event(self.index, deltas, reason=reason))

    def fail(self, cause: str) -> None:
        self._send(Event(self.index, failure=cause))

    def _filter(self, deltas: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        """The deltas up to a stop text, and whether there was one."""
        sent = []
        for delta in deltas:
            if "tool_calls" in delta:
                kept = self._stops.flush()
                sent += [{"content": kept}] if kept else []
                self.has_calls = True
            if "content" in delta:
                text, stopped = self._stops.feed(delta["content"])
                sent += [{"content": text}] if text else []
                if stopped:
                    return sent, True
            else:
                sent.append(delta)
        return sent, False

    def _tell(self, sampled: Sampled, reasons: bool) -> Optional[dict[str, list[dict]]]:
        """Log probabilities of a token of the reasoning or the content; markers and calls are neither."""
        if sampled.token in self._special:
            self._in_calls = sampled.token in self._opens_calls or (self._in_calls and sampled.token != self._closes_calls)
            return None
        if self._in_calls:
            return None
        entry = self._entry(sampled.token, sampled.logprob)
        entry["top_logprobs"] = [self._entry(*pair) for pair in sampled.top]
        return {"reasoning" if reasons else "content": [entry]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = spelled(self._tokenizer.convert_ids_to_tokens(token))
        # JSON has no infinity; this is what OpenAI's API says instead.
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


class Answer:
    """All choices of one request, put into OpenAI's objects.

    Args:
        model: its name.
        replies: one for each choice.
        sequences: theirs, which count tokens.
        with_usage: whether a stream ends with the usage.
    """

    def __init__(self, model: str, replies: list[Reply], sequences: list, with_usage: bool = False):
        self.replies, self.sequences, self.with_usage = replies, sequences, with_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._opened: set[int] = set()
        self._deltas: list[list[dict]] = [[] for _ in replies]
        self._told: list[dict[str, list]] = [{} for _ in replies]
        self._reasons: list[Optional[str]] = [None] * len(replies)

    @property
    def is_over(self) -> bool:
        return None not in self._reasons

    @property
    def reasons(self) -> list[Optional[str]]:
        return self._reasons

    def add(self, event: Event) -> None:
        """An event, for the whole answer."""
        self._deltas[event.index] += event.deltas
        for key, entries in (event.logprobs or {}).items():
            self._told[event.index].setdefault(key, []).extend(entries)
        self.close(event)

    def close(self, event: Event) -> None:
        if event.reason is not None:
            self._reasons[event.index] = event.reason

    def whole(self) -> dict[str, Any]:
        """`chat.completion`, of all events that were added."""
        choices = []
        for index, reason in enumerate(self._reasons):
            reply = join_deltas(self._deltas[index])
            calls = reply["tool_calls"]
            message = {
                "role": "assistant",
                "content": reply["content"] or (None if calls else ""),
                "reasoning": reply["reasoning"] or None,
                "reasoning_content": reply["reasoning"] or None,
                **({"tool_calls": calls} if calls else {}),
            }
            told = _logprobs(self._told[index]) if self.replies[index]._logprobs else None
            choices.append({"index": index, "message": message, "logprobs": told, "finish_reason": reason})
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """`chat.completion.chunk`s for one event."""
        parts: list[dict] = []
        if event.index not in self._opened:
            self._opened.add(event.index)
            parts.append({"role": "assistant", "content": ""})
        for delta in event.deltas:
            if "reasoning" in delta:
                delta = {**delta, "reasoning_content": delta["reasoning"]}
            parts.append(delta)
        if event.logprobs and not event.deltas:
            parts.append({})
        made = [self._chunk(event.index, part) for part in parts]
        if event.logprobs:
            made[-1]["choices"][0]["logprobs"] = _logprobs(event.logprobs)
        if event.reason is not None:
            self.close(event)
            made.append(self._chunk(event.index, {}, event.reason))
        return made

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage, where it is wanted."""
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}
        return [chunk] if self.with_usage else []

    def usage(self) -> dict[str, Any]:
        prompt = len(self.sequences[0].prompt.ids)
        said = sum(len(sequence.said) for sequence in self.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": self.sequences[0].cached},
            "completion_tokens_details": {"reasoning_tokens": sum(reply.reasoning_tokens for reply in self.replies)},
        }

    def _chunk(self, index: int, delta: dict, reason: Optional[str] = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.with_usage else chunk


def _logprobs(told: dict[str, list]) -> dict[str, list]:
    """OpenAI's form; the reasoning has a list of its own."""
    return {"content": told.get("content", []), "refusal": None, "reasoning": told.get("reasoning", [])}
