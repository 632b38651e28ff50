"""Guides: what a reply may say. Calls are forced, and JSON kept to its schema, by llguidance over our own vocabulary.

Why llguidance: it takes tiktoken ranks and special tokens as they are, has no dependencies, and its masks for 163,840
tokens take some 10 µs (a new schema about 1 ms), so that no index has to be built for each schema.

Thinking comes before what is guided: while it is open a guide only keeps the reply from ending, or calling, inside it.
Where calls are free to come or not, a guide waits for the first of them, and keeps their names and arguments right.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import llguidance
import llguidance.numpy
import llguidance.tiktoken
import numpy as np
import tiktoken
import torch

from ...response_kimi import CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, THINK, THINK_END
from ...vocabulary_kimi import SPECIAL_IDS, SPLIT_PATTERN, spelled

logger = logging.getLogger(__name__)

TOOL_MARKERS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END)
MOST_CALLS = 16  # in one reply that is forced to call
# As models write it: `{"a": 1, "b": [1, 2]}`, or in lines that are indented.
LAYOUT = {"whitespace_pattern": r"\n? {0,16}"}
# Each optional property of an object is several ways to go on; the library takes some 300 by itself, and with these 1,000.
LIMITS = llguidance.LLParserLimits(max_items_in_row=8_000, step_max_items=500_000)


class SchemaError(ValueError):
    """A JSON schema that cannot be enforced; says why."""


class Guide:
    """Keeps one reply to a grammar.

    Args:
        matcher: of the grammar, which begins behind the thinking.
        thinking: whether thinking is open at first.
        think_end: id that closes it.
        banned: ids that must not come while it is open.
        entry: id that ends thinking as well, and is the first token of the grammar.
        forced: whether the reply is worth nothing without the guide.

    Attributes:
        failed: what went wrong inside the grammar's machine, if anything did; then a reply that is not forced is let go.
    """

    def __init__(self, matcher, thinking: bool, think_end: int, banned: Sequence[int], entry: Optional[int], forced: bool):
        self._matcher, self._thinking, self._think_end = matcher, thinking, think_end
        self._banned, self._entry, self._forced = list(banned), entry, forced
        self.failed: Optional[str] = None

    def restrict(self, logits: torch.Tensor) -> None:
        """Forbids what may not come next, in `(vocabulary,)`, in place."""
        if self._thinking:
            logits[self._banned] = -torch.inf
            return
        if self._matcher is None:
            return
        words = np.zeros((1, (len(logits) + 31) // 32), dtype=np.int32)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, words)
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
            return
        allowed = np.unpackbits(words.view(np.uint8)[0], bitorder="little")[: len(logits)]
        logits[torch.from_numpy(allowed == 0).to(logits.device)] = -torch.inf

    def copy(self) -> "Guide":
        """Another one for another reply, before this one has met a token."""
        matcher = self._matcher.deep_copy()
        return Guide(matcher, self._thinking, self._think_end, self._banned, self._entry, self._forced)

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        if self._thinking:
            self._thinking = token not in (self._think_end, self._entry)
            if token != self._entry:
                return
        if self._matcher is not None and not self._matcher.consume_token(token):
            self._fail(self._matcher.get_error() or f"token {token} does not fit the grammar")

    def _fail(self, why: str) -> None:
        if self._forced:
            self.failed = why
        else:
            self._matcher = None
            logger.warning("calls are not kept to their schemas any more: %s", why)


class Ban:
    """Some tokens must not come."""

    failed: Optional[str] = None

    def __init__(self, banned: Sequence[int]):
        self._banned = list(banned)

    def copy(self) -> "Ban":
        return self

    def restrict(self, logits: torch.Tensor) -> None:
        logits[self._banned] = -torch.inf

    def accept(self, token: int) -> None:
        pass


class Guides:
    """Makes guides for one tokenizer.

    Args:
        tokenizer: a `TikTokenTokenizer`.
        end_ids: ids with which a reply ends.
    """

    def __init__(self, tokenizer, end_ids: Iterable[int]):
        self._ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._end_ids = sorted(end_ids)
        ranks = tokenizer.vocab_size - SPECIAL_IDS
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        encoding = tiktoken.Encoding(
            "kimi",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={spelled(name): index for index, name in enumerate(names[:ranks])},
            special_tokens={name: ranks + index for index, name in enumerate(names[ranks:])},
        )
        self._vocabulary = llguidance.tiktoken.lltokenizer_from_encoding(
            encoding, n_vocab=len(tokenizer), eos_token=self._end_ids
        )

    def id_of(self, marker: str) -> int:
        """The id of a marker. Raises `SchemaError` where the vocabulary has none: then nothing can be forced."""
        if marker not in self._ids:
            raise SchemaError(f"the vocabulary has no token {marker}")
        return self._ids[marker]

    def no_calls(self) -> Ban:
        return Ban([self._ids[marker] for marker in TOOL_MARKERS if marker in self._ids])

    def calls(self, functions, first_index: int, thinking: bool, parallel: bool) -> Guide:
        """One or more calls of these functions and nothing else.

        Args:
            functions: with `name`, `parameters` and `strict`.
            first_index: number of the reply's first call in the whole dialogue.
            thinking: whether thinking comes first.
            parallel: whether there may be several calls.
        """
        rules = self._call_rules(functions, first_index, MOST_CALLS if parallel else 1)
        return self._guide("start: calls\n" + rules, thinking)

    def optional_calls(self, functions, thinking: bool, parallel: bool) -> Guide:
        """Any words, then perhaps calls of these functions, whose arguments follow the schemas as far as that can be
        enforced; all of a strict one."""
        names = self._names
        lines = [f"calls: {names[SECTION_BEGIN]} call{'+' * parallel} {names[SECTION_END]}", "NUMBER: /[0-9]{1,6}/"]
        ways = []
        for number, function in enumerate(functions):
            head = json.dumps(f"functions.{function.name}:")
            ways.append(f"{head} NUMBER {names[CALL_ARGUMENTS]} arguments{number}")
            try:
                lines.append(self._arguments(number, function))
            except SchemaError:
                if function.strict:
                    raise
                lines.append(f'arguments{number}: {self._json({"type": "object"}, False, function.name)}')
        lines.append(f"call: {names[CALL_BEGIN]} ({' | '.join(ways)}) {names[CALL_END]}")
        rules = "\n".join(["start: TEXT? calls?", "TEXT: /(.|\\n)+/", *lines])
        return self._guide(rules + "\n", thinking, may_end=True, forced=any(function.strict for function in functions))

    def json(self, schema: dict[str, Any], strict: bool, thinking: bool, functions=(), first_index: int = 0) -> Guide:
        """A JSON text of this schema; or calls, where there are functions."""
        body = f"start: body{' | calls' if functions else ''}\nbody: {self._json(schema, strict, 'response_format')}\n"
        if functions:
            body += self._call_rules(functions, first_index, MOST_CALLS)
        return self._guide(body, thinking)

    def _guide(self, lark: str, thinking: bool, may_end: bool = False, forced: bool = True) -> Guide:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise SchemaError(_in_one_line(matcher.get_error()))
        banned = [self._ids[THINK]] if THINK in self._ids else []
        banned += map(self.id_of, TOOL_MARKERS)
        entry = None
        if may_end:
            entry = self.id_of(SECTION_BEGIN)
            banned.remove(entry)
        else:
            banned += self._end_ids
        return Guide(matcher, thinking, self.id_of(THINK_END), banned, entry, forced)

    def _call_rules(self, functions, first_index: int, most: int) -> str:
        """`calls`: a section of at most `most` calls. Their numbers run on, so every place has a rule of its own."""
        names = self._names
        lines = [f"calls: {names[SECTION_BEGIN]} call0 {names[SECTION_END]}"]
        for place in range(most):
            ways = " | ".join(
                f'{json.dumps(f"functions.{function.name}:{first_index + place}")} {names[CALL_ARGUMENTS]} arguments{number}'
                for number, function in enumerate(functions)
            )
            more = f" call{place + 1}?" if place + 1 < most else ""
            lines.append(f"call{place}: {names[CALL_BEGIN]} ({ways}) {names[CALL_END]}{more}")
        lines += [self._arguments(number, function) for number, function in enumerate(functions)]
        return "\n".join(lines) + "\n"

    def _arguments(self, number: int, function) -> str:
        schema = {**(function.parameters or {"properties": {}, "additionalProperties": False}), "type": "object"}
        return f"arguments{number}: {self._json(schema, bool(function.strict), f'function {function.name}')}"

    @property
    def _names(self) -> dict[str, str]:
        """The markers as a grammar calls them."""
        return {marker: f"<[{self.id_of(marker)}]>" for marker in TOOL_MARKERS}

    def _json(self, schema: dict[str, Any], strict: bool, place: str) -> str:
        """A schema as part of a grammar. What cannot be enforced is left to the model, unless it is strict."""
        exact = {**schema, "x-guidance": LAYOUT}
        error = self._judge(exact)
        if error and not strict:
            exact["x-guidance"] = {**LAYOUT, "lenient": True, "coerce_one_of": True}
            error = self._judge(exact)
        if error:
            raise SchemaError(f"the schema of {place} cannot be enforced: {_in_one_line(error)}")
        return f"%json {json.dumps(exact)}"

    def _judge(self, schema: dict[str, Any]) -> str:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        return llguidance.LLMatcher.validate_grammar(grammar, self._vocabulary, limits=LIMITS)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:300]
