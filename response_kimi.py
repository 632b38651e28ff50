"""What the model says: ids or text → reasoning, content and tool calls, whole or while it is being written.

A reply with thinking follows the `<think>` that ends the prompt, and reads, in one line,

    REASONING</think>CONTENT<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{JSON}<|tool_call_end|> (and more calls)
    <|tool_calls_section_end|><|im_end|>

Models leave parts of this out, so every part is optional here, and nothing is lost: what has no place in this form
stays as it was written, in `content` where it may be meant for the reader, in a call that says it is `malformed`, or as
`stray`.

- A call needs no section around it. A section or a call that begins while thinking ends the thinking.
- A marker that begins nothing (a section without a call, a call without an id) is one that is talked about, and stays
  in the text. So does a marker spelled out in ids: one that has its own token is only read from that token.
- White space between the markers of a section is layout, as is that around the id of a call and around a JSON object.
- Words after a call are content, in a section too; words between the beginning of a section and its first call are
  stray.
"""

import codecs
import json
import queue
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .vocabulary_kimi import spelled


THINK, THINK_END = "<think>", "</think>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
REPLY_END, PAD = "<|im_end|>", "[PAD]"

MARKERS = (THINK, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END, REPLY_END, PAD)

# Every spelling of a marker. Each has its only "<" or "[" at its beginning, so no two overlap.
SPELLINGS = {
    **{marker: marker for marker in MARKERS},
    "<|tool_call_section_begin|>": SECTION_BEGIN,
    "<|tool_call_section_end|>": SECTION_END,
    "[EOS]": REPLY_END,
}
LONGEST = max(map(len, SPELLINGS))

# A section that has no call by then, or a call outside a section that has no arguments, is taken for ordinary text.
PATIENCE = 1024  # characters

CALL_ID = re.compile(r"(?:functions\.)?(?P<name>\S+):[0-9]+")
# What tells a call outside a section: one word before arguments, and without these an id, which may be cut off.
WORD = re.compile(r"[\w.:/-]+")
ID_ALONE = re.compile(r"functions\.[\w.:/-]*|[\w.:/-]+:[0-9]+")
SPACE = " \t\r\n"  # of JSON

ODD_ID = "the id is not functions.NAME:INDEX"
NO_ARGUMENTS = "the marker of the arguments is missing"
NOT_CLOSED = "the call is not closed"
ODD_ARGUMENTS = "the arguments are not a JSON object"


def parse_response(text_or_ids, thinking: bool = True, tokenizer=None) -> dict[str, Any]:
    """A whole reply, without its prompt → `{"reasoning": str, "content": str, "tool_calls": list}`.

    Given a role, the result is a message again, from which the chat template makes the tokens it came from.

    Args:
        text_or_ids: text, UTF-8 bytes, or ids (a list, array or tensor of one dimension).
        thinking: whether the prompt left thinking open. If not, all but the calls is content.
        tokenizer: a `TikTokenTokenizer`; needed for ids.

    Returns:
        Calls are `{"id", "type": "function", "function": {"name", "arguments"}}`, id and arguments as they were
        written. One with something wrong also has `malformed`, the list of what. Words between the beginning of a
        section and its first call are in a list `stray`, which is there only if they are.

    >>> reply = parse_response("Add them.</think>It is 4.<|im_end|>")
    >>> reply["reasoning"], reply["content"], reply["tool_calls"]
    ('Add them.', 'It is 4.', [])

    Raises:
        TypeError: neither text, bytes nor ids; or ids without a tokenizer.
        ValueError: an id is not in the vocabulary.
    """
    parser = ResponseParser(thinking, tokenizer)
    reply = join_deltas([*parser.feed(text_or_ids), *parser.finish()])
    return {**reply, "stray": parser.stray} if parser.stray else reply


def join_deltas(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All deltas of a reply → its reasoning, content and tool calls, as `parse_response` gives them."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        for key in texts.keys() & delta.keys():
            texts[key].append(delta[key])
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"]}})
                arguments.append([])
            arguments[part["index"]].append(part["function"]["arguments"])
            if "malformed" in part:
                calls[part["index"]]["malformed"] = part["malformed"]
    for call, pieces in zip(calls, arguments):
        call["function"]["arguments"] = "".join(pieces)
    return {"reasoning": "".join(texts["reasoning"]), "content": "".join(texts["content"]), "tool_calls": calls}


class ResponseParser:
    """Reads a reply piece by piece.

    Pieces are all text, all UTF-8 bytes or all ids, of any size, split anywhere. Each `feed` gives the deltas that are
    certain by then, in OpenAI's shape: `{"reasoning": text}`, `{"content": text}` or `{"tool_calls": [part]}`. The part
    that begins a call is `{"index", "id", "type", "function": {"name", "arguments": ""}}`, those that follow are
    `{"index", "function": {"arguments": text}}`, the last with `malformed` where something is wrong with the call.
    Joined, the deltas are what `parse_response` gives, wherever the reply was split.

    Args:
        thinking: whether the prompt left thinking open. If not, all but the calls is content.
        tokenizer: a `TikTokenTokenizer`; needed for ids.

    Attributes:
        in_reasoning: whether the words that come next are reasoning.
        stray: words between the beginning of a section and its first call, and doubled markers in a section. No delta
            holds them.
    """

    def __init__(self, thinking: bool = True, tokenizer=None):
        if not isinstance(thinking, bool):
            raise TypeError(f"thinking must be True or False, not {thinking!r:.80}")
        self.in_reasoning = thinking
        self.stray: list[str] = []
        self._lexer = _Lexer(tokenizer)
        self._finished = False
        self._deltas: list[dict[str, Any]] = []
        self._state = self._in_prose  # the method that takes the next text or marker
        self._at_start = True
        self._in_section = False
        self._opener = ""  # the marker, as it was spelled, that began the section or the call
        self._held: list[str] = []  # text that waits for the next marker to say what it is
        self._held_size = 0
        self._call_index = -1
        self._arguments: list[str] = []  # of the call, as far as they have been sent
        self._problems: list[str] = []  # of the call

    def feed(self, piece) -> list[dict[str, Any]]:
        """The next piece (text, bytes, an id or ids) → deltas. What follows the end of the reply is ignored.

        Raises:
            TypeError: neither text, bytes nor ids; not of one kind with the pieces before; or ids without a tokenizer.
            ValueError: an id is not in the vocabulary.
            RuntimeError: `finish` was called before.
        """
        if self._finished:
            raise RuntimeError("this ResponseParser is finished; make a new one for the next reply")
        for marker, text in self._lexer.read(piece):
            self._take(marker, text)
        return self._take_deltas()

    def finish(self) -> list[dict[str, Any]]:
        """There are no more pieces → the last deltas. A call that is still open ends here, marked as malformed."""
        if not self._finished:
            self._finished = True
            for marker, text in self._lexer.finish():
                self._take(marker, text)
            self._take(REPLY_END, "")
        return self._take_deltas()

    def _take(self, marker: str | None, text: str) -> None:
        if marker in (THINK, THINK_END) and not self.in_reasoning:
            marker = None  # only reasoning has such markers; elsewhere these are words
        self._state(marker, text)

    def _take_deltas(self) -> list[dict[str, Any]]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append({"reasoning" if self.in_reasoning else "content": text})

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._held_size += len(text)

    def _release(self) -> str:
        text = "".join(self._held)
        self._held, self._held_size = [], 0
        return text

    # ---- States: each takes a text (marker None), or a marker as it was spelled. REPLY_END comes last. ----

    def _in_prose(self, marker: str | None, text: str) -> None:
        """Reasoning or content, outside sections and calls."""
        at_start, self._at_start = self._at_start, False
        if marker in (SECTION_BEGIN, CALL_BEGIN):
            self._opener = text
            self._state = self._in_opening if marker == SECTION_BEGIN else self._in_header
        elif marker == THINK_END:
            self.in_reasoning = False
        elif marker == THINK and at_start:
            pass  # the prompt ended with it, and here it is again
        else:
            self._say(text)

    def _in_opening(self, marker: str | None, text: str) -> None:
        """In a section, before its first call: holds the words in between."""
        if marker == CALL_BEGIN:
            words = self._release()
            if words.strip(SPACE):
                self.stray.append(words)
            self.in_reasoning = False
            self._in_section, self._opener = True, text
            self._state = self._in_header
        elif marker in (SECTION_BEGIN, SECTION_END, THINK_END, REPLY_END):
            words = self._release()
            self._state = self._in_prose
            if words.strip(SPACE):
                self._say(self._opener + words)
            elif marker == SECTION_END:  # an empty section
                self.in_reasoning = False
                return
            self._in_prose(marker, text)
        else:
            self._hold(text)
            self._lose_patience()

    def _in_header(self, marker: str | None, text: str) -> None:
        """In a call, before its arguments: holds the id."""
        if marker is None:
            self._hold(text)
            if not self._in_section:
                self._lose_patience()
            return
        header = self._release()
        call_id = header.strip(SPACE)
        if not (self._in_section or (WORD if marker == CALL_ARGUMENTS else ID_ALONE).fullmatch(call_id)):
            self._say(self._opener + header)
            self._state = self._in_prose
            self._state(marker, text)
        elif marker == CALL_ARGUMENTS:
            self._begin_call(call_id)
            self._state = self._in_arguments
        else:
            if call_id:
                self._begin_call(call_id, NO_ARGUMENTS)
                self._end_call(closed=marker == CALL_END)
            self._state = self._after_call
            if marker != CALL_END:
                self._state(marker, text)

    def _lose_patience(self) -> None:
        if self._held_size > PATIENCE:
            self._say(self._opener + self._release())
            self._state = self._in_prose

    def _in_arguments(self, marker: str | None, text: str) -> None:
        """In the arguments of a call: holds the white space at their end."""
        if marker in (CALL_END, CALL_BEGIN, SECTION_END, REPLY_END):
            self._end_call(closed=marker == CALL_END)
            self._state = self._after_call
            if marker != CALL_END:
                self._state(marker, text)
            return
        end = len(text.rstrip(SPACE))
        if end:
            words = self._release() + text[:end]
            if not self._arguments and words.lstrip(SPACE).startswith("{"):
                words = words.lstrip(SPACE)
            self._send_arguments(words)
        self._hold(text[end:])

    def _after_call(self, marker: str | None, text: str) -> None:
        """After a call: holds white space, which is layout if the section goes on or ends."""
        if marker is None and not text.strip(SPACE):
            self._hold(text)
        elif marker is None or not (self._in_section or marker == SECTION_END):
            self._say(self._release())
            self._state = self._in_words_of_section if self._in_section else self._in_prose
            self._state(marker, text)
        else:
            self._release()
            self._in_words_of_section(marker, text)

    def _in_words_of_section(self, marker: str | None, text: str) -> None:
        """In a section, in words after a call."""
        if marker in (CALL_ARGUMENTS, CALL_END):
            self.stray.append(text)
        elif marker == SECTION_END:
            self._in_section = False
            self._state = self._in_prose
        else:
            self._in_section &= marker != SECTION_BEGIN  # which ends the one before
            self._in_prose(marker, text)

    # ---- Calls ----

    def _begin_call(self, call_id: str, *problems: str) -> None:
        known = CALL_ID.fullmatch(call_id)
        name = known["name"] if known else call_id.removeprefix("functions.")
        self.in_reasoning = False
        self._call_index += 1
        self._arguments = []
        self._problems = [*problems] if known else [ODD_ID, *problems]
        self._send_call(id=call_id, type="function", function={"name": name, "arguments": ""})

    def _send_arguments(self, text: str) -> None:
        self._arguments.append(text)
        self._send_call(function={"arguments": text})

    def _end_call(self, closed: bool) -> None:
        space = self._release()
        if space and not (self._arguments and self._arguments[0][0] == "{" and self._arguments[-1][-1] == "}"):
            self._send_arguments(space)
        if not closed:
            self._problems.append(NOT_CLOSED)
        if not _is_json_object("".join(self._arguments)):
            self._problems.append(ODD_ARGUMENTS)
        if self._problems:
            self._send_call(function={"arguments": ""}, malformed=self._problems)

    def _send_call(self, **part) -> None:
        self._deltas.append({"tool_calls": [{"index": self._call_index, **part}]})


class _Lexer:
    """Pieces of one kind → texts and markers, as pairs (marker or None, the text as it was spelled)."""

    def __init__(self, tokenizer=None):
        self._tokenizer = tokenizer
        self._kind = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tail = ""  # may be the beginning of a marker
        self._ending: list[str] = []  # the end of the reply and what followed; dropped if no words come after it
        self._is_over = False  # the end of the reply came as a token
        self._marker_of_id: dict[int, str] = {}
        self._added: dict[int, bytes] = {}
        self._pattern = _pattern(SPELLINGS)

    def read(self, piece) -> Iterator[tuple[str | None, str]]:
        kind, piece = self._recognized(piece)
        if self._kind and kind != self._kind:
            raise TypeError(f"pieces of one reply must be of one kind: {self._kind} came before, now {kind}")
        if kind == "ids" and not self._kind:
            self._learn_tokens()
        self._kind = kind
        if kind == "ids":
            yield from self._read_ids(piece)
        else:
            yield from self._read_text(piece if kind == "text" else self._decoder.decode(piece))

    def finish(self) -> Iterator[tuple[str | None, str]]:
        yield from self._flush()

    def _recognized(self, piece) -> tuple[str, Any]:
        if isinstance(piece, str):
            return "text", piece
        if isinstance(piece, (bytes, bytearray)):
            return "bytes", bytes(piece)
        ids = piece.tolist() if hasattr(piece, "tolist") else piece
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, (list, tuple)):
            ids = [index.tolist() if hasattr(index, "tolist") else index for index in ids]
        if not isinstance(ids, (list, tuple)) or not all(isinstance(index, int) for index in ids):
            raise TypeError(f"a reply is text, bytes or a row of ids, not {piece!r:.80} of type {type(piece).__name__}")
        if self._tokenizer is None:
            raise TypeError("ids need a tokenizer: give tokenizer=, or the text")
        return "ids", ids

    def _learn_tokens(self) -> None:
        """Which ids are markers; these are not looked for in the text between."""
        added = self._tokenizer.added_tokens_decoder
        self._added = {index: token.content.encode() for index, token in added.items()}
        names = {token.content: index for index, token in added.items()}
        self._marker_of_id = {names[spelling]: marker for spelling, marker in SPELLINGS.items() if spelling in names}
        self._pattern = _pattern(set(SPELLINGS) - set(names))

    def _read_ids(self, ids) -> Iterator[tuple[str | None, str]]:
        words: list[bytes] = []
        for index in ids:
            if self._is_over:
                return
            if index not in self._marker_of_id:
                token = self._added.get(index)
                words.append(spelled(self._tokenizer.convert_ids_to_tokens(index)) if token is None else token)
                continue
            yield from self._read_text(self._decoder.decode(b"".join(words)))
            words = []
            yield from self._flush()
            marker = self._marker_of_id[index]
            self._is_over = marker in (REPLY_END, PAD)
            if not self._is_over:
                yield marker, self._added[index].decode()
        yield from self._read_text(self._decoder.decode(b"".join(words)))

    def _read_text(self, text: str) -> Iterator[tuple[str | None, str]]:
        text = self._tail + text
        done = 0
        for match in self._pattern.finditer(text):
            yield from self._without_end(None, text[done : match.start()])
            yield from self._without_end(SPELLINGS[match.group()], match.group())
            done = match.end()
        # Only the last "<" or "[" can begin a marker that the next piece completes.
        cut = max(text.rfind(first, max(done, len(text) - LONGEST)) for first in "<[")
        if cut < 0 or not any(spelling.startswith(text[cut:]) for spelling in SPELLINGS):
            cut = len(text)
        yield from self._without_end(None, text[done:cut])
        self._tail = text[cut:]

    def _flush(self) -> Iterator[tuple[str | None, str]]:
        """What was kept back is text after all."""
        text, self._tail = self._tail + self._decoder.decode(b"", final=True), ""
        self._decoder.reset()
        yield from self._without_end(None, text)

    def _without_end(self, marker: str | None, text: str) -> Iterator[tuple[str | None, str]]:
        """Keeps the end of the reply back: with words after it, it was one that is talked about, and text."""
        if not text:
            return
        if marker == REPLY_END or (self._ending and (marker == PAD or not text.strip(SPACE))):
            self._ending.append(text)
            return
        if self._ending:
            yield None, "".join(self._ending)
            self._ending = []
        yield (None if marker == PAD else marker), text


class ResponseStreamer:
    """Deltas of a reply while `generate` writes it: give it as `streamer`, run `generate` in a thread, iterate here.

    Args:
        tokenizer: the tokenizer of the model.
        thinking: as in `apply_chat_template` for the prompt.
        timeout: seconds to wait for the next token; None waits without end, also where `generate` fails.

    Raises:
        ValueError: `generate` writes more than one reply.
        TimeoutError: no token came in time.
    """

    def __init__(self, tokenizer, thinking: bool = True, timeout: float | None = None):
        self._parser = ResponseParser(thinking, tokenizer)
        self._deltas: queue.Queue = queue.Queue()
        self._timeout = timeout
        self._has_prompt = False

    def put(self, value) -> None:
        """Called by `generate`: with the prompt, (1, length), then with new ids, (count,)."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer shows one reply, and this prompt has {len(value)} rows")
        if not self._has_prompt:
            self._has_prompt = True
            return
        for delta in self._parser.feed(value.reshape(-1)):
            self._deltas.put(delta)

    def end(self) -> None:
        """Called by `generate` when it is done."""
        for delta in self._parser.finish():
            self._deltas.put(delta)
        self._deltas.put(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                delta = self._deltas.get(timeout=self._timeout)
            except queue.Empty:
                raise TimeoutError(f"no token came within {self._timeout} s") from None
            if delta is None:
                return
            yield delta


def _pattern(spellings: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(re.escape(spelling) for spelling in sorted(spellings)))


def _is_json_object(text: str) -> bool:
    def refuse(word):
        raise ValueError(f"{word} is not JSON")  # Python's reader takes NaN and Infinity

    try:  # numbers stay strings: their size does not matter here
        return isinstance(json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False
