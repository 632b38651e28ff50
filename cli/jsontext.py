"""Setting values in a JSON text without touching any of its other characters.

Parsing and dumping a file again would rewrite numbers (1e-05), escapes, indents and line ends that are not ours. Here
only the value that changes is written, in the style of the text around it.
"""

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """One `"key": value` of an object, as offsets into the text."""

    key: str
    start: int  # of the key's opening quote
    key_end: int
    value_start: int
    value_end: int


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _members(text: str, at: int) -> list[_Member]:
    """The members of the object whose brace is at `at`, in order. The text must be valid JSON."""
    found = []
    at = _skip(text, at + 1)
    while text[at] == '"':
        start = at
        key, key_end = scanstring(text, at + 1)
        value_start = _skip(text, _skip(text, key_end) + 1)  # past the colon
        _, value_end = _DECODER.raw_decode(text, value_start)
        found.append(_Member(key, start, key_end, value_start, value_end))
        at = _skip(text, value_end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _render(value, text: str, depth: int) -> str:
    """`value` as JSON in the style of `text`, for a member that stands `depth` objects deep."""
    lead = _SPACE.match(text, _skip(text, 0) + 1).group()
    if _skip(text, 0) + 2 == len(text.rstrip()) or "\n" not in lead:  # an empty object, or all in one line
        return json.dumps(value, ensure_ascii=False)
    unit = lead.rpartition("\n")[2]
    newline = "\r\n" if "\r\n" in lead else "\n"
    return json.dumps(value, ensure_ascii=False, indent=unit).replace("\n", newline + unit * depth)


def put(text: str, path: tuple[str, ...], value) -> str:
    """Sets one value in a JSON text.

    Args:
        text: A valid JSON text whose outermost value is an object.
        path: The keys that lead to the value. An object missing on the way is made, at the end of the one around it;
            a value on the way that is no object is replaced by one.
        value: What to set; anything `json.dumps` takes.

    Returns:
        The text, the very same when it holds that value already.
    """
    at, depth = _skip(text, 0), 1
    while True:
        key, rest = path[0], path[1:]
        members = _members(text, at)
        member = next((m for m in reversed(members) if m.key == key), None)  # of two equal keys, the last counts
        if member is not None and rest and text[member.value_start] == "{":
            at, depth, path = member.value_start, depth + 1, rest
            continue
        for outer in reversed(rest):
            value = {outer: value}
        if member is not None:
            if json.loads(text[member.value_start : member.value_end]) == value:
                return text
            return text[: member.value_start] + _render(value, text, depth) + text[member.value_end :]
        rendered = _render(value, text, depth)
        if not members:
            return text[: at + 1] + f'"{key}": {rendered}' + text[_skip(text, at + 1) :]
        first, last = members[0], members[-1]
        if len(members) > 1:
            between = text[first.value_end : members[1].start]
        else:
            between = "," + (text[at + 1 : first.start] or " ")
        colon = text[first.key_end : first.value_start]
        return text[: last.value_end] + between + json.dumps(key) + colon + rendered + text[last.value_end :]
