"""A chat as text, and which of its control tokens the template wrote.

A chat template writes control tokens and pastes other people's words between them; in the finished text the two look
alike. To tell them apart, the chat is rendered a second time, from a template that writes its control tokens in *ink*:
private-use characters that occur nowhere in the chat, one for each character control tokens are made of. What comes out
in ink was written by the template, whatever it did with the words it was given: cut, joined, stripped, put into JSON.
The words themselves are neither searched nor escaped, so nothing typed there can pass for ink. The two texts must be
equal once the ink is taken off, so what is found in the second holds for the first, which is the published one.
"""

import inspect
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, Optional

from jinja2 import Environment
from transformers import PreTrainedTokenizer
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .tool_declaration_kimi import encode_tools_to_typescript, tool_schemas


logger = logging.get_logger(__name__)

# Version 4 of the library knows nothing but content to continue.
_CONTINUES_ANY_FIELD = inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters["continue_final_message"].annotation is not bool
Range = tuple[int, int]  # first character, and the one after the last

# Templates that build a control token from a role ('<|im_' + role + '|>') mean it, so these words may stand inside one.
ROLES = ("system", "developer", "user", "assistant", "tool")
PRIVATE_USE = (*range(0x10FFFD, 0xFFFFF, -1), *range(0xFFFFD, 0xEFFFF, -1))
_PRIVATE = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_FORMAT_FIELD = re.compile(r"(%(?:\(\w*\))?\w|\{\w*\})")  # of '%s' % …, '{}'.format(…): the renderer has to read it
_COMPARING = frozenset(("==", "!=", "<", "<=", ">", ">=", "in", "not", "is"))
# Methods and filters that look for their first argument in a text.
_SEARCHING = frozenset((
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex", "count",
    "replace", "strip", "lstrip", "rstrip", "trim", "removeprefix", "removesuffix",
))  # fmt: skip


@dataclass(frozen=True)
class ControlText:
    """Where a text may speak control: `ranges` of its control tokens, in order; elsewhere `names` are ordinary text."""

    names: frozenset[str]
    ranges: list[Range]

    def within(self, start: int, end: int) -> list[Range]:
        """The ranges that lie in one from `start` to `end`."""
        found = self.ranges[bisect_left(self.ranges, (start, start)) : bisect_left(self.ranges, (end, end))]
        return found if not found or found[-1][1] <= end else found[:-1]


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat. `control` None: control tokens are read wherever they stand. `spoken`: ranges of the assistant's
    own words, where the caller asked for them."""

    text: str
    control: Optional[ControlText] = None
    spoken: Optional[list[Range]] = None

    def spoken_mask(self, offsets: list[Range]) -> list[int]:
        """1 for each token that lies in the assistant's words, 0 for the others; `offsets`: the range of each token."""
        starts = [first for first, _ in self.spoken]
        mask = []
        for start, end in offsets:
            at = bisect_right(starts, start) - 1
            mask.append(int(at >= 0 and start < end <= self.spoken[at][1]))
        return mask

    def replace(self, edits: list[tuple[Range, str]]) -> "RenderedChat":
        """The chat with other text in some ranges, given in order; control tokens in the new text are trusted."""
        if not edits:
            return self
        ends = [end for (_, end), _ in edits]
        moved = [0, *accumulate(len(new) - (end - start) for (start, end), new in edits)]

        def place(position: int) -> int:
            return position + moved[bisect_right(ends, position)]

        parts, done = [], 0
        for (start, end), new in edits:
            parts += [self.text[done:start], new]
            done = end
        control = self.control
        if control is not None:
            replaced = {span for span, _ in edits}
            ranges = [(place(start), place(end)) for start, end in control.ranges if (start, end) not in replaced]
            for (start, _), new in edits:
                at = place(start)
                ranges += [(at + first, at + last) for first, last in _find(new, control.names)]
            control = ControlText(control.names, sorted(ranges))
        spoken = None if self.spoken is None else [(place(start), place(end)) for start, end in self.spoken]
        return RenderedChat("".join([*parts, self.text[done:]]), control, spoken)


def render_chats(
    tokenizer: PreTrainedTokenizer,
    conversation,
    *,
    tools: Optional[list] = None,
    chat_template: Optional[str] = None,
    add_generation_prompt: Optional[bool] = None,
    continue_final_message: bool | str = False,
    thinking: Optional[bool] = True,
    preserve_thinking: Optional[bool] = False,
    tokenize: bool = True,
    sanitize_control_tokens: bool = True,
    want_spoken: bool = False,
    placeholders: Iterable[str] = (),
    **variables,
) -> list[RenderedChat]:
    """Render one conversation or several; see `TikTokenTokenizer.apply_chat_template` for the arguments.

    Args:
        tokenize, sanitize_control_tokens: with both, find out which control tokens the template wrote; else `control`
            is None.
        want_spoken: also find the assistant's own words, which the template marks by `{% generation %}`.
        placeholders: words to find like control tokens, which the caller will replace by others.
        variables: further variables of the template, which count as content, and `documents`.

    Raises:
        TypeError: a flag is not a bool, a message no dict, a role no string, or a tool neither dict nor function.
        ValueError: there is no message or no template, or the template's own text cannot be told from the content.
    """
    optional = {"thinking": thinking, "preserve_thinking": preserve_thinking}
    optional["add_generation_prompt"] = add_generation_prompt
    for name, flag in {**optional, "tokenize": tokenize, "sanitize_control_tokens": sanitize_control_tokens}.items():
        if not isinstance(flag, bool) and not (flag is None and name in optional):
            allowed = "True, False or None" if name in optional else "True or False"
            raise TypeError(f"{name} must be {allowed}, not {describe(flag)}")
    if isinstance(continue_final_message, str) and not _CONTINUES_ANY_FIELD:
        if continue_final_message != "content":
            raise ValueError(f"continue_final_message={continue_final_message!r} needs transformers 5; before, only content can be continued")
        continue_final_message = True
    if want_spoken and continue_final_message:
        raise ValueError("the assistant's words cannot be marked together with continue_final_message")
    chats = check_messages(conversation)
    if add_generation_prompt is None:
        add_generation_prompt = not (continue_final_message or want_spoken)
    if tools is not None:
        tools = tool_schemas(tools)
    if tools and "tools_ts_str" not in variables:
        try:
            variables["tools_ts_str"] = encode_tools_to_typescript(tools)
        except ValueError as error:
            logger.warning(f"The tools are shown as JSON: {str(error)[:200]}")  # not once: what was said once is kept for ever
            variables["tools_ts_str"] = ""
    variables = {
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "thinking": thinking is not False,
        "preserve_thinking": bool(preserve_thinking),
        **variables,
    }

    def render(template: str, special_tokens: dict[str, Any]) -> tuple[list[str], list[Optional[list[Range]]]]:
        if not want_spoken:
            named = {**special_tokens, **variables}
            texts = PreTrainedTokenizer.apply_chat_template(
                tokenizer, chats, chat_template=template, tokenize=False, **named
            )
            return texts, [None] * len(texts)
        named = {**tokenizer.special_tokens_map, **special_tokens, **variables}
        return render_jinja_template(
            conversations=chats, chat_template=template, return_assistant_tokens_mask=True, **named
        )

    template = tokenizer.get_chat_template(chat_template, tools)
    if not (tokenize and sanitize_control_tokens):
        return [RenderedChat(text, None, spoken) for text, spoken in zip(*render(template, {}))]
    names = frozenset(placeholders) | tokenizer.control_tokens(template)
    for everywhere in (True, False):
        texts, all_spoken = render(template, {})
        ink = _ink(names, set(_PRIVATE.findall("".join(texts))))
        special_tokens = {name: ink.write(token) for name, token in tokenizer.special_tokens_map.items()}
        try:
            inked = render(_inked_template(ink, template, everywhere), special_tokens)[0]
        except Exception:  # the template could not do with ink what it does with its own words, say read them as a date
            continue
        found = [ink.read(_valid(text)) for text in inked]
        if all(_valid(text) == read for text, (read, _) in zip(texts, found)):
            return [
                RenderedChat(read, ControlText(names, ranges), _valid_ranges(text, spoken))
                for text, spoken, (read, ranges) in zip(texts, all_spoken, found)
            ]
    raise ValueError(
        "the chat template compares or changes its own control tokens in such a way that they cannot be told from the"
        " text of the messages; change the template, or pass sanitize_control_tokens=False if you trust all messages"
    )


def check_messages(conversation) -> list:
    """A conversation, or a batch of them → a list of conversations, of which every message has a role.

    Raises:
        TypeError: a message or a tool call is no dict, or a role no string; names its index, and in a batch the conversation's.
        ValueError: there is no message; names the conversation.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(f"conversation must be a list of messages or of such lists, not {describe(conversation)}")
    if not conversation:
        raise ValueError("conversation is empty; give at least one message")
    is_batch = is_batch_of_chats(conversation)
    chats = [getattr(chat, "messages", chat) for chat in conversation] if is_batch else [conversation]
    for c, messages in enumerate(chats):
        batch = f"conversations[{c}]" * is_batch
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"{batch} must be a list of messages, not {describe(messages)}")
        if not messages:
            raise ValueError(f"{batch} is empty; give at least one message")
        for m, message in enumerate(messages):
            place = f"{batch}.messages[{m}]".lstrip(".")
            if not hasattr(message, "get"):
                raise TypeError(f"{place} must be a dict, not {describe(message)}")
            if not isinstance(message.get("role"), str):
                raise TypeError(f"{place}: role must be a string, not {describe(message.get('role'))}")
            calls = message.get("tool_calls") or ()
            if not isinstance(calls, (list, tuple)):
                raise TypeError(f"{place}.tool_calls must be a list of dicts, not {describe(calls)}")
            for t, call in enumerate(calls):
                if not hasattr(call, "get"):
                    raise TypeError(f"{place}.tool_calls[{t}] must be a dict, not {describe(call)}")
    return chats


def is_batch_of_chats(conversation) -> bool:
    """The library's rule for what is one conversation and what several."""
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    return isinstance(first, (list, tuple)) or hasattr(first, "messages")


class Ink:
    """Characters that stand for those of control tokens where the template writes.

    Args:
        names: the control tokens.
        dyes: private-use characters that do not occur in the chat, one for each of their letters.
    """

    def __init__(self, names: frozenset[str], dyes: str):
        self._on = dict(zip(map(ord, _letters(names)), dyes))
        self._off = {ord(dye): letter for letter, dye in self._on.items()}
        self._names = names
        # A template may put a control token together ('<|im_' + role + '|>'), so ends of literals are looked at, too.
        self._starts = {name[:n] for name in names for n in range(1, len(name)) if not name[0].isalnum()}
        self._ends = {name[n:] for name in names for n in range(1, len(name)) if not name[-1].isalnum()}
        self._longest = max(map(len, names))
        dyed = f"[{dyes}]+"  # private-use characters mean nothing in a pattern
        self._drops = re.compile(rf"{dyed}(?:(?:\s+|{'|'.join(ROLES)}){dyed})*")

    def write(self, literal):
        """A literal, or a list of them, with what is or may become a control token in ink."""
        if isinstance(literal, (list, tuple)):
            return [self.write(one) for one in literal]
        parts = _FORMAT_FIELD.split(literal)
        return "".join(part if at % 2 else self._write(part) for at, part in enumerate(parts))

    def _write(self, words: str) -> str:
        inked = longest_first(self._names).sub(lambda match: match.group().translate(self._on), words)
        for n in range(1, min(self._longest, len(words) + 1)):
            if words[-n:] in self._starts:
                inked = inked[:-n] + words[-n:].translate(self._on)
            if words[:n] in self._ends:
                inked = words[:n].translate(self._on) + inked[n:]
        return inked

    def read(self, text: str) -> tuple[str, list[Range]]:
        """The text without the ink, and the ranges of the control tokens that were written in it."""
        parts, ranges, done = [], [], 0
        for match in self._drops.finditer(text):
            own = match.group().translate(self._off)
            parts += [text[done : match.start()], own]
            ranges += [(match.start() + start, match.start() + end) for start, end in _find(own, self._names)]
            done = match.end()
        return "".join([*parts, text[done:]]), ranges


def _ink(names: frozenset[str], taken: set[str]) -> Ink:
    """Ink for a chat in which the private-use characters `taken` occur."""
    count = len(_letters(names))
    # From the end, as fonts use the beginning: so nearly all chats share one ink, and one template.
    dyes = islice((chr(code) for code in PRIVATE_USE if chr(code) not in taken), count)
    found = "".join(dyes)
    if len(found) < count:
        raise ValueError(f"the messages hold {len(taken)} of Unicode's private-use characters: too few are left")
    return _ink_of(names, found)


# These depend on nothing but their arguments. The library, too, compiles a template only once.
@lru_cache(maxsize=8)
def _ink_of(names: frozenset[str], dyes: str) -> Ink:
    return Ink(names, dyes)


@lru_cache(maxsize=8)
def _letters(names: frozenset[str]) -> list[str]:
    return sorted({letter for name in names for letter in name if not letter.isspace()})


@lru_cache(maxsize=16)
def _inked_template(ink: Ink, source: str, everywhere: bool) -> str:
    """The template with its control tokens in ink. `everywhere` False: not those that it looks for in the messages, as
    in `'</think>' in message.content`, which are to be found there as they were typed."""
    tokens = [(kind, value) for _, kind, value in Environment(trim_blocks=True, lstrip_blocks=True).lex(source)]
    plain = set() if everywhere else _looked_for(tokens)
    parts = []
    for at, (kind, value) in enumerate(tokens):
        if kind == "data":
            value = ink.write(value)
        elif kind == "string" and at not in plain:
            literal = value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja reads it
            inked = ink.write(literal)
            if inked != literal:
                value = "'" + inked.encode("unicode-escape").decode("ascii").replace("'", "\\'") + "'"
        parts.append(value)
    # Jinja drops one newline at the end of a template. One is gone already, and another must not follow.
    return "".join(parts) + "\n" * source.endswith("\n")


def _looked_for(tokens: list[tuple[str, str]]) -> set[int]:
    """Indices of the strings among a template's tokens that are compared with something or searched for in it."""
    solid = [at for at, (kind, _) in enumerate(tokens) if kind not in ("whitespace", "comment")]
    values = ["", "", *(tokens[at][1] for at in solid), ""]
    found, brackets = set(), [False]  # for each open bracket, whether what stands there now is looked for
    calls = []  # and whether it is a call
    for n, at in enumerate(solid, start=2):
        (kind, value), before, after = tokens[at], values[n - 1], values[n + 1]
        if kind == "operator" and value in "([{":
            calls.append(value == "(" and values[n - 2] in (".", "|"))
            searching = calls[-1] and before in _SEARCHING
            brackets.append(searching or before in _COMPARING or (brackets[-1] and not calls[-1]))
        elif kind == "operator" and value in ")]}" and calls:
            calls.pop()
            brackets.pop()
        elif kind == "operator" and value == "," and calls and calls[-1]:
            brackets[-1] = False
        elif kind == "string" and (brackets[-1] or before in _COMPARING or after in _COMPARING):
            found.add(at)
    return found


def _find(text: str, names: frozenset[str]) -> list[Range]:
    """Ranges of the control tokens in a text that is trusted."""
    return [match.span() for match in longest_first(names).finditer(text)]


@lru_cache(maxsize=8)
def longest_first(names: frozenset[str]) -> re.Pattern:
    """A pattern that finds any of the names; of several that begin together the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _valid(text: str) -> str:
    """Text as UTF-8 can carry it: a surrogate pair becomes its character, a lone surrogate U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _valid_ranges(text: str, ranges: Optional[list[Range]]) -> Optional[list[Range]]:
    """Ranges of `text` → ranges of `_valid(text)`."""
    if ranges is None or len(_valid(text)) == len(text):
        return ranges
    return [(len(_valid(text[:start])), len(_valid(text[:end]))) for start, end in ranges]


def describe(value) -> str:
    """A value and its type, for messages of errors."""
    return f"{value!r:.80} of type {type(value).__name__}" if value is not None else "None"
