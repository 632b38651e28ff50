"""tool_declaration_kimi.py: JSON schemas → TypeScript, and what is refused."""

import json

import pytest

from kimi_k26.tool_declaration_kimi import encode_tools_to_typescript, sort_deeply, tool_schemas


def tool(parameters=None, **function):
    function = {"name": "f", **function}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def declare(parameters, **function):
    """The lines between `namespace functions {` and `}`."""
    text = encode_tools_to_typescript([tool(parameters, **function)])
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def fields(properties, **more):
    """The lines of the fields of an object with these properties."""
    return declare({"type": "object", "properties": properties, **more}).split("\n")[1:-1]


def test_golden(golden):
    for case in json.loads((golden / "tools.json").read_text(encoding="utf-8")):
        if case.get("falls_back_to_json"):
            with pytest.raises(ValueError, match="tool 0"):
                encode_tools_to_typescript(case["tools"])
        else:
            assert encode_tools_to_typescript(case["tools"]) == case["typescript"], case["name"]


def test_nothing_to_declare():
    for tools in (None, [], (), [{"type": "_plugin"}], [{"type": "function", "function": {}}], [{"type": "function"}]):
        assert encode_tools_to_typescript(tools) == ""


def test_empty_parameters_and_names():
    for parameters in (None, {}, [], {"type": "object"}, {"properties": {}}, {"type": "object", "required": 5}):
        assert declare(parameters) == "type f = (_: {}) => any;"
    unnamed = encode_tools_to_typescript([{"type": "function", "function": {"description": "d"}}])
    assert "// d\ntype function = (_: {}) => any;" in unnamed


def test_fields_are_sorted_with_required_first():
    shown = fields({n: {"type": "null"} for n in "dbcae"}, required=["e", "c", "z"], additionalProperties={})
    assert [line.split(":")[0].strip() for line in shown] == ["c", "e", "a?", "b?", "d?", "[k"]
    assert shown[-1] == "  [k: string]: any" and shown[0].endswith(",")


def test_comments():
    limits = {"maxLength": 9, "pattern": "a, b", "minLength": 0, "maximum": 1}
    assert fields({"s": {"type": "string", "description": "one\n\ntwo\n", **limits}}) == [
        "  // one",
        "",
        "  // two",
        "",
        "  // maxLength: 9, minLength: 0, pattern: a, b",
        "  s?: string",
    ]
    # Limits are those of the type; objects, enums and unions have none.
    for schema in ({"type": "object"}, {"enum": [1]}, {"type": ["string", "null"]}, {"anyOf": [{"type": "string"}]}):
        assert len(fields({"x": {**schema, **limits, "minItems": 1}})) == 1


@pytest.mark.parametrize(
    ("default", "shown"),
    [
        (True, "True"),
        (0, "0"),
        (1.0, "1.0"),
        (1e30, "1e+30"),
        ("a\"b\né", '"a\\"b\\né"'),
        ([], "[]"),
        ({"b": 1, "a": None}, '{"a": null, "b": 1}'),
        (None, None),
    ],
)
def test_defaults(default, shown):
    expected = ["  x?: any"] if shown is None else [f"  // Default: {shown}", "  x?: any"]
    assert fields({"x": {"type": "any", "default": default}}) == expected


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (True, "any"),
        (False, "null"),
        ({}, "any"),
        ({"type": "file"}, "file"),
        ({"type": "integer"}, "number"),
        ({"type": None}, "None"),
        ({"type": ["integer", "object", "array"]}, "number | {} | Array<any>"),
        ({"type": "array", "items": {}}, "Array<any>"),
        ({"type": "array", "items": False}, "Array<any>"),
        ({"type": "array", "items": {"type": "array", "items": {"enum": ["a"]}}}, 'Array<Array<"a">>'),
        ({"anyOf": [{"type": "string", "description": "hidden"}, {"enum": [None, 'q"']}]}, 'string | None | "q""'),
        ({"anyOf": [], "enum": [1], "type": "string"}, ""),
        ({"enum": [True, 1, 2.5], "type": "number"}, "True | 1 | 2.5"),
        ({"enum": [None, 1], "type": ["null", "integer"]}, "None | 1"),
        ({"enum": ["a"], "type": ["string"]}, '"a"'),
        ({"enum": [[1, "a"]], "type": "list"}, "[1, 'a']"),
        ({"type": "object", "additionalProperties": None}, "{}"),
    ],
)
def test_types(schema, text):
    assert fields({"x": schema}) == [f"  x?: {text}"]


def test_nested_arrays_with_comments():
    inner = {"type": "array", "items": {"type": "object", "description": "o"}, "maxItems": 2}
    assert fields({"x": {"type": "array", "items": inner}}) == [
        "  x?: Array<",
        "    // maxItems: 2",
        "    Array<",
        "      // o",
        "      {}",
        "    >",
        "  >",
    ]


def test_definitions():
    leaf = {"enum": [1], "description": "leaf\nof a tree"}
    text = declare(
        {
            "$defs": {"Node": {"type": "object", "properties": {"up": {"$ref": "#"}}}, "Leaf": leaf},
            "properties": {
                "a": {"type": "object", "$defs": {"Inner": {"type": "string"}}},
                "b": {"$ref": "#/$defs/Inner"},
            },
        },
        description="d",
    )
    # `#` inside a definition does not name the parameters; definitions stand in the order they were met in.
    assert text.split("\n") == [
        "// leaf",
        "// of a tree",
        "interface Leaf 1",
        "interface Node {",
        "  up?: parameters",
        "}",
        "interface Inner string",
        "// d",
        "type f = (_: {",
        "  a?: {},",
        "  b?: Inner",
        "}) => any;",
    ]


def test_self_reference_keeps_key_order():
    parameters = {"properties": {"z": {"$ref": "#"}, "a": {"type": "null"}}, "required": ["z"], "additionalProperties": True}
    assert declare(parameters) == "interface parameters {\n  a?: null,\n  z: parameters\n}\ntype f = (_: parameters) => any;"
    assert declare({"additionalProperties": {"$ref": "#"}}).startswith("interface parameters {}\n")


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        None,
        "string",
        ["string"],
        {"description": "only"},
        {"oneOf": [{"type": "string"}]},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "other.json"},
        {"$ref": None},
        {"anyOf": None},
        {"anyOf": [{"type": None}]},
        {"enum": 5},
        {"enum": [1.0], "type": "integer"},
        {"enum": ["a"], "type": ["string", "number"]},
        {"enum": [], "type": ["string", "number", "null"]},
        {"enum": [1], "type": "boolean"},
        {"type": ["string", "file"]},
        {"type": "string", "description": 5},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {}, "required": None},
        {"type": "object", "properties": {}, "required": [["a"]]},
        {"type": "object", "additionalProperties": 1},
        {"type": "object", "$defs": {"A": True}},
        {"type": "any", "default": {1, 2}},
        {"type": "any", "default": {1: 2, "a": 3}},
        deep(5000),
    ],
)
def test_what_cannot_be_expressed_is_a_value_error(schema):
    good = tool({"type": "object"})
    with pytest.raises(ValueError, match="tool 1"):
        encode_tools_to_typescript([good, tool({"type": "object", "properties": {"x": schema}})])


@pytest.mark.parametrize("tools", [["f"], [None], [{"type": "function", "function": "f"}], {"type": "function"}, "tools"])
def test_malformed_tools_are_a_value_error(tools):
    with pytest.raises(ValueError, match="tool"):
        encode_tools_to_typescript(tools)


def test_key_order_of_the_caller_does_not_matter():
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"default": {"y": 1, "x": 2}, "type": "null"}}}
    turned = json.loads(json.dumps(schema), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert declare(schema) == declare(turned)
    assert json.dumps(sort_deeply({"b": ({"d": 1, "c": 2},), "a": 0})) == '{"a": 0, "b": [{"c": 2, "d": 1}]}'


def test_python_functions_become_schemas():
    def add(a: int, b: int = 2):
        """
        Adds.

        Args:
            a: the first
            b: the second
        """

    assert "// Adds.\ntype add = (_: {\n  // the first\n  a: number," in encode_tools_to_typescript(tool_schemas([add]))
    with pytest.raises(TypeError, match=r"tools\[1\].*42"):
        tool_schemas([add, 42])
