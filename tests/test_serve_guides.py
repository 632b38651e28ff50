"""Replies that are kept to a grammar: whatever the model would like to say, what it says is valid."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

jsonschema = pytest.importorskip("jsonschema", reason="the tests judge JSON by the package jsonschema")
pytest.importorskip("llguidance", reason="the server takes the extra `serve`")

from kimi_k26 import TikTokenTokenizer
from kimi_k26.cli.serve.guides import Guides, SchemaError
from kimi_k26.response_kimi import parse_response

pytestmark = pytest.mark.once

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 10},
            "unit": {"enum": ["c", "f", None]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "nothing": None,
    "nested.list-1": {
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "minItems": 1, "maxItems": 3},
            "way": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["tags", "way"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "number", "minimum": 0, "maximum": 9}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
}
FUNCTIONS = [SimpleNamespace(name=name, parameters=schema, strict=None) for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module", params=["tiny", "published"])
def vocabulary(request, tiny_checkpoint):
    """Tokenizer, guides and the id of the end."""
    folder = tiny_checkpoint if request.param == "tiny" else request.getfixturevalue("golden") / "vocab"
    tokenizer = TikTokenTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return tokenizer, Guides(tokenizer, [end]), end


def say(vocabulary, guide, thinking: bool, seed: int, most: int = 800, wish: str = "") -> dict:
    """What a model of noise says under a guide, which likes to say `wish` first and then, now and then, to end."""
    tokenizer, _, end = vocabulary
    noise, said, wished = torch.Generator().manual_seed(seed), [], tokenizer.encode(wish)
    think_end = tokenizer.convert_tokens_to_ids("</think>")
    closing = {tokenizer.encode(char)[0] for char in '"}]'}
    for place in range(most):
        logits = torch.rand(len(tokenizer), generator=noise)
        logits[list(closing)] += 0.5  # or strings and lists go on for long
        if thinking and place == 3:
            logits[think_end] += 50
        if place < len(wished):
            logits[wished[place]] += 40
        guide.restrict(logits)
        assert not guide.failed
        token = int(logits.argmax())
        said.append(token)
        if token == end:
            break
        guide.accept(token)
        assert not guide.failed
    assert said[-1] == end
    return parse_response(said, thinking, tokenizer)


def check_calls(reply: dict, first: int | None, names=SCHEMAS):
    """`first`: number of the first call; None where the model numbers them."""
    assert reply["tool_calls"] and "stray" not in reply
    for place, call in enumerate(reply["tool_calls"]):
        name = call["function"]["name"]
        number = r"\d+" if first is None else str(first + place)
        assert re.fullmatch(rf"functions\.{re.escape(name)}:{number}", call["id"]), call["id"]
        assert name in names and "malformed" not in call
        schema = SCHEMAS[name] or {"type": "object", "additionalProperties": False}
        jsonschema.validate(json.loads(call["function"]["arguments"]), {"type": "object", **schema})


@pytest.mark.parametrize("thinking", [True, False])
def test_forced_calls(vocabulary, thinking):
    _, guides, _ = vocabulary
    for seed in range(4):
        reply = say(vocabulary, guides.calls(FUNCTIONS, 7, thinking, parallel=True), thinking, seed, 3000)
        check_calls(reply, 7)
        assert reply["content"] == "" and bool(reply["reasoning"]) == thinking
    reply = say(vocabulary, guides.calls(FUNCTIONS[2:], 0, thinking, parallel=False), thinking, 5)
    check_calls(reply, 0, ["nested.list-1"])
    assert len(reply["tool_calls"]) == 1


def test_thinking_stays_open_until_it_is_closed(vocabulary):
    tokenizer, guides, end = vocabulary
    guide = guides.calls(FUNCTIONS, 0, True, True)
    for marker in ("<|im_end|>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<think>"):
        logits = torch.zeros(len(tokenizer))
        logits[tokenizer.convert_tokens_to_ids(marker)] = 9
        guide.restrict(logits)
        assert int(logits.argmax()) != tokenizer.convert_tokens_to_ids(marker)
        guide.accept(tokenizer.encode("a")[0])


@pytest.mark.parametrize("thinking", [True, False])
def test_json(vocabulary, thinking):
    _, guides, _ = vocabulary
    for seed in range(3):
        reply = say(vocabulary, guides.json(SCHEMAS["weather"], True, thinking), thinking, seed)
        jsonschema.validate(json.loads(reply["content"]), SCHEMAS["weather"])
        assert not reply["tool_calls"]
    section = "<|tool_calls_section_begin|>"
    guide = guides.json(SCHEMAS["weather"], True, False, FUNCTIONS, 2)
    reply = say(vocabulary, guide, False, 1, 3000, wish=section)
    check_calls(reply, 2)
    assert reply["content"] == ""


def test_words_and_then_calls(vocabulary):
    _, guides, _ = vocabulary
    words = "Let me see.\n<|tool_calls_section_begin|>"
    reply = say(vocabulary, guides.optional_calls(FUNCTIONS, False, True), False, 1, 3000, wish=words)
    assert reply["content"] == "Let me see.\n"
    check_calls(reply, None)
    inside = "Hm.<|tool_calls_section_begin|>"  # thinking that is never closed
    reply = say(vocabulary, guides.optional_calls(FUNCTIONS, True, True), False, 2, 3000, wish=inside)
    check_calls(reply, None)
    reply = say(vocabulary, guides.optional_calls(FUNCTIONS[:1], False, False), False, 4, 3000, wish=words)
    check_calls(reply, None, ["weather"])
    assert len(reply["tool_calls"]) == 1
    reply = say(vocabulary, guides.optional_calls(FUNCTIONS, False, True), False, 3, wish="No.<|im_end|>")
    assert reply["content"] == "No." and not reply["tool_calls"]


def test_a_schema_that_cannot_be_enforced_is_left_to_the_model(vocabulary):
    _, guides, _ = vocabulary
    odd = {"type": "object", "properties": {"a": {"type": "strin"}}}
    functions = [SimpleNamespace(name="odd", parameters=odd, strict=None), FUNCTIONS[0]]
    section = "<|tool_calls_section_begin|>"
    reply = say(vocabulary, guides.optional_calls(functions, False, True), False, 1, 3000, wish=section)
    for call in reply["tool_calls"]:
        assert isinstance(json.loads(call["function"]["arguments"]), dict) and "malformed" not in call
    functions[0].strict = True
    with pytest.raises(SchemaError, match="function odd"):
        guides.optional_calls(functions, False, True)


def test_a_schema_that_is_too_large_lets_the_model_go(vocabulary):
    """Only where nothing was forced."""
    tokenizer, guides, _ = vocabulary
    large = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}
    functions = [SimpleNamespace(name="large", parameters=large, strict=None)]
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.large:0<|tool_call_argument_begin|>{"
    made = (guides.optional_calls(functions, False, True), False), (guides.calls(functions, 0, False, True), True)
    for guide, forced in made:
        for token in tokenizer.encode(call):
            logits = torch.zeros(len(tokenizer))
            guide.restrict(logits)
            guide.accept(token)
        assert bool(guide.failed) == forced
    assert guides.optional_calls(FUNCTIONS, True, True).copy().copy().failed is None


def test_arguments_are_always_an_object(vocabulary):
    _, guides, _ = vocabulary
    schema = {"type": ["null", "object"], "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
    function = SimpleNamespace(name="f", parameters=schema, strict=None)
    for seed in range(3):
        reply = say(vocabulary, guides.calls([function], 0, False, False), False, seed)
        assert isinstance(json.loads(reply["tool_calls"][0]["function"]["arguments"]), dict)


def test_calls_that_are_not_wanted(vocabulary):
    tokenizer, guides, _ = vocabulary
    logits = torch.zeros(len(tokenizer))
    logits[tokenizer.convert_tokens_to_ids("<|tool_calls_section_begin|>")] = 9
    guides.no_calls().restrict(logits)
    assert int(logits.argmax()) != tokenizer.convert_tokens_to_ids("<|tool_calls_section_begin|>")


@pytest.mark.parametrize(
    "schema, says",
    [
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "shoe-size"}, "shoe-size"),
    ],
)
def test_what_cannot_be_enforced(vocabulary, schema, says):
    """A strict schema is refused; of others the rest is enforced, where there is any."""
    _, guides, _ = vocabulary
    schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    with pytest.raises(SchemaError, match="response_format"):
        guides.json(schema, True, False)
    if says in ("strin", "look-ahead"):
        with pytest.raises(SchemaError):
            guides.json(schema, False, False)
    else:
        reply = say(vocabulary, guides.json(schema, False, False), False, 1, 3000)
        assert set(json.loads(reply["content"])) == {"a"}


def test_all_of_what_is_wrong_with_a_pattern_is_said(vocabulary):
    with pytest.raises(SchemaError, match="response_format cannot be enforced: .*unclosed group"):
        vocabulary[1].json({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}, True, False)
