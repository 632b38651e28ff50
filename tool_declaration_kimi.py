"""Tool schemas → the TypeScript declaration that Kimi-K2.6 reads its tools from.

A list of tools in OpenAI's form

    [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON schema}}}]

becomes one text: a namespace with one `type NAME = (_: {...}) => any;` per function, descriptions and limits as comments.
Every schema is read twice: `_parse` walks it in key order, collects the definitions that a `$ref` may name, and refuses what
has no TypeScript form; printing comes after, when the definitions are complete. `chat_template.jinja` does the same work in
macros for renderers that have only the template; the tests hold the two to the same text.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import get_json_schema


_STEP = "  "
_UNION_NAMES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
# Which keys of a schema are printed as limits, by its type.
_LIMIT_KEYS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
# Python type of an enum value, by the declared type. A bool is an int in Python, so it passes as a number.
_ENUM_TYPES = {"string": str, "number": (int, float), "integer": int, "boolean": bool}


def sort_deeply(value: Any) -> Any:
    """Return `value` with the keys of every dict in it sorted; tuples become lists.

    Raises:
        TypeError: when a dict has keys that do not compare with each other.
    """
    if isinstance(value, dict):
        return {key: sort_deeply(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [sort_deeply(item) for item in value]
    return value


def tool_schemas(tools: list[dict | Callable]) -> list[dict]:
    """Tools as users hand them in → dicts with sorted keys; functions are read by the library's `get_json_schema`.

    Raises:
        TypeError: an item is neither a dict nor a function; names its index.
    """
    schemas = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) and not callable(tool):
            raise TypeError(f"tools[{index}] must be a dict or a function, not {tool!r} of type {type(tool).__name__}")
        schemas.append(sort_deeply(tool if isinstance(tool, dict) else get_json_schema(tool)))
    return schemas


def encode_tools_to_typescript(tools: list[dict] | None) -> str:
    """Declare `tools` in TypeScript.

    Tools whose `type` is not "function", and functions that are empty, are left out; when none is left the text is "".

    Args:
        tools: tools in OpenAI's form; their key order does not matter.

    Returns:
        The declaration, ending in a newline, or "".

    Raises:
        ValueError: a schema has no TypeScript form (an unknown `$ref`, `oneOf` alone, an enum value of another type than
            declared, malformed input of any kind). The message names the tool's index. Callers then show the JSON.
    """
    if not tools:
        return ""
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools must be a list of dicts, not {type(tools).__name__}")
    functions = []
    for index, tool in enumerate(tools):
        try:
            tool = sort_deeply(tool)
            if tool.get("type") == "function" and tool.get("function", {}):
                functions.append(_declare_function(tool["function"]))
        # A schema can be wrong in more ways than are worth a test each: a number where a list belongs, a key that is
        # missing, nesting deeper than the interpreter's stack.
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(f"tool {index} has no TypeScript form: {type(error).__name__}: {error}") from error
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


@dataclass
class _Definitions:
    """What `$ref` may point at, within one function."""

    known: dict[str, dict] = field(default_factory=dict)
    root_is_named: bool = False  # some schema refers to "#", so the parameters need an interface of their own

    def add(self, definitions: dict[str, Any] | None) -> None:
        if definitions:
            for name, schema in definitions.items():
                self.known[name] = schema

    def name_of(self, reference: str) -> str:
        if reference == "#":
            self.root_is_named = True
            return "parameters"
        if not reference.startswith("#/$defs/"):
            raise ValueError(f"$ref {reference!r} is neither '#' nor '#/$defs/NAME'")
        name = reference.split("/")[-1]
        if not isinstance(self.known.get(name), dict):
            raise ValueError(f"$ref {reference!r} names no definition; known are {sorted(self.known)}")
        return name


@dataclass
class _Type:
    """A parsed schema: `text(indent)` prints it, the rest goes into the comment above it."""

    text: Callable[[str], Any]
    description: Any = ""
    limits: dict[str, Any] = field(default_factory=dict)

    def comment(self, indent: str) -> str:
        text = ""
        if self.description:
            text += _comment_lines(self.description, indent) + "\n"
        if self.limits:
            text += f"{indent}// " + ", ".join(f"{key}: {self.limits[key]}" for key in sorted(self.limits)) + "\n"
        return text


def _comment_lines(description: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in description.split("\n"))


def _parse(schema: Any, definitions: _Definitions) -> _Type:
    """Read one schema. The order of the tests matters: `$ref` hides `anyOf`, which hides `enum`, which hides `type`."""
    if isinstance(schema, bool):
        return _Type(lambda indent: "any" if schema else "null")
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be a dict or a bool, not {schema!r}")
    description = schema.get("description", "")
    if "$ref" in schema:
        name = definitions.name_of(schema["$ref"])
        return _Type(lambda indent: name, description)
    if "anyOf" in schema:
        members = [_parse(member, definitions) for member in schema["anyOf"]]
        return _Type(lambda indent: " | ".join([member.text(indent) for member in members]), description)
    if "enum" in schema:
        return _parse_enum(schema, description)
    if "type" not in schema:
        if schema:
            raise ValueError(f"a schema needs one of $ref, anyOf, enum, type; it has {sorted(schema)}")
        return _Type(lambda indent: "any")

    kind = schema["type"]
    if isinstance(kind, list):
        names = [_UNION_NAMES[name] for name in kind]
        return _Type(lambda indent: " | ".join(names), description)
    if kind == "object":
        shape = _Object(schema, definitions)
        return _Type(shape.text, description)
    limit_keys = _LIMIT_KEYS.get(kind, ()) if isinstance(kind, str) else ()
    limits = {key: schema[key] for key in limit_keys if key in schema}
    if kind == "array":
        items = schema.get("items")
        item = _parse(items, definitions) if items else _Type(lambda indent: "any")
        return _Type(lambda indent: _array_text(item, indent), description, limits)
    return _Type(lambda indent: "number" if kind == "integer" else kind, description, limits)


def _parse_enum(schema: dict, description: Any) -> _Type:
    values = schema["enum"]
    if "type" in schema:
        kind = schema["type"]
        if isinstance(kind, list):
            if len(kind) == 2 and "null" in kind:
                kind = kind[1] if kind[0] == "null" else kind[0]
            elif len(kind) == 1:
                kind = kind[0]
            else:
                raise ValueError(f"an enum's type may be one name, or one name and 'null', not {kind}")
        allowed = _ENUM_TYPES.get(kind, object) if isinstance(kind, str) else object
        for value in values:
            if value is not None and not isinstance(value, allowed):
                raise ValueError(f"enum value {value!r} is not of the declared type {kind!r}")
    return _Type(lambda indent: " | ".join([f'"{v}"' if isinstance(v, str) else str(v) for v in values]), description)


def _array_text(item: _Type, indent: str) -> str:
    inner = indent + _STEP
    comment = item.comment(inner)
    if not comment:
        return f"Array<{item.text(indent)}>"
    return "Array<\n" + comment + inner + item.text(inner) + "\n" + indent + ">"


class _Object:
    """The fields of an object schema, parsed in key order and printed with the required ones first."""

    def __init__(self, schema: dict, definitions: _Definitions):
        definitions.add(schema.get("$defs"))
        self.rest = schema.get("additionalProperties")
        if isinstance(self.rest, dict):
            self.rest = _parse(self.rest, definitions)
        self.fields: dict[str, tuple[_Type, Any]] = {}
        self.required: set[str] = set()
        if "properties" in schema:
            self.required = set(schema.get("required", []))
            for name, prop in schema["properties"].items():
                default = prop.get("default") if isinstance(prop, dict) else None
                self.fields[name] = (_parse(prop, definitions), default)

    def field_text(self, name: str, indent: str) -> str:
        kind, default = self.fields[name]
        text = kind.comment(indent)
        if default is not None:
            if not isinstance(default, (int, float)):  # numbers and bools as Python writes them: `True`, not `true`
                default = json.dumps(default, ensure_ascii=False)
            text += f"{indent}// Default: {default}\n"
        optional = "" if name in self.required else "?"
        return text + f"{indent}{name}{optional}: {kind.text(indent)}"

    def text(self, indent: str) -> str:
        inner = indent + _STEP
        names = sorted(self.fields, key=lambda name: (name not in self.required, name))
        lines = [self.field_text(name, inner) for name in names]
        if self.rest is not None:
            if isinstance(self.rest, bool):
                rest = "any" if self.rest else "never"
            elif isinstance(self.rest, _Type):
                rest = self.rest.text(inner)
            else:
                raise ValueError(f"additionalProperties must be a bool or a schema, not {self.rest!r}")
            lines.append(f"{inner}[k: string]: {rest}")
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}" if lines else "{}"


def _declare_function(function: dict) -> str:
    definitions = _Definitions()
    # The parameters are always read as an object, whatever type they state.
    parameters = _Object(function.get("parameters") or {}, definitions)
    parts = []
    root_is_named = definitions.root_is_named
    if root_is_named:
        fields = ",\n".join(parameters.field_text(name, _STEP) for name in parameters.fields)
        parts.append("interface parameters {" + (f"\n{fields}\n" if fields else "") + "}")
    # A definition may define more while it is parsed; those can be named by later ones but get no interface.
    for name, schema in list(definitions.known.items()):
        text = _parse(schema, definitions).text("")
        description = schema.get("description", "")
        comment = _comment_lines(description, "") + "\n" if description else ""
        parts.append(f"{comment}interface {name} {text}")
    if function.get("description"):
        parts.append(_comment_lines(function["description"], ""))
    argument = "parameters" if root_is_named else parameters.text("")
    parts.append(f"type {function.get('name', 'function')} = (_: {argument}) => any;")
    return "\n".join(parts)
