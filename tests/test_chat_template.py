"""chat_template.jinja by itself, under the library's renderer: messages → text, tools → TypeScript, generation spans."""

import json
import random
from pathlib import Path

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from kimi_k26.tool_declaration_kimi import encode_tools_to_typescript, sort_deeply


ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
DECLARE = "<|im_system|>tool_declare<|im_middle|>"
USER = [{"role": "user", "content": "x"}]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def render(messages, tools=None, add_generation_prompt=True, **kwargs):
    texts, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        **kwargs,
    )
    return texts[0]


def body(messages, **kwargs):
    return render(messages, add_generation_prompt=False, **kwargs)


def spans(messages, **kwargs):
    texts, found = render_jinja_template(
        conversations=[messages], chat_template=TEMPLATE, return_assistant_tokens_mask=True, **kwargs
    )
    return [texts[0][start:end] for start, end in found[0]]


def test_golden_chats(golden):
    for case in load(golden / "chat.json"):
        text = render(case["messages"], case["tools"], **case["kwargs"])
        assert text == case["text"], (case["name"], case["kwargs"])


def test_golden_chats_through_another_tokenizer_of_the_library(golden):
    tokenizers = pytest.importorskip("tokenizers")
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    for case in load(golden / "chat.json"):
        kwargs = {"add_generation_prompt": True, **case["kwargs"]}
        text = other.apply_chat_template(
            case["messages"], tools=case["tools"], chat_template=TEMPLATE, tokenize=False, **kwargs
        )
        assert text == case["text"], (case["name"], case["kwargs"])


def test_golden_tools(golden):
    for case in load(golden / "tools.json"):
        text = render(USER, case["tools"])
        if not case["tools"]:
            assert text.startswith("<|im_user|>")
        else:
            assert text.startswith(DECLARE + expected_declaration(case["tools"]) + "<|im_end|>"), case["name"]
            assert ("typescript" in case) == (DECLARE + "# Tools" in text), case["name"]


def expected_declaration(tools):
    tools = sort_deeply(tools)
    try:
        declared = encode_tools_to_typescript(tools)
    except ValueError:
        declared = ""
    return declared or json.dumps(tools, ensure_ascii=False, separators=(",", ":"))


NAMES = ["items", "keys", "get", "values", "a", "B", "名", "x y", "type", "enum", "self"]
SCALARS = ["", "text", "it's\n\nmulti", 'q"uote', 0, 1, -3, 2.5, True, False, None, []]
SCALARS += [[1, {"b": 1, "a": "x'"}], {"z": 1, "y": [None]}]
REFERENCES = ["#", "#/$defs/Node", "#/$defs/Leaf", "#/$defs/items", "#/$defs/q/Leaf", "#/definitions/X", 4]
PLAIN_TYPES = ["string", "number", "integer", "boolean", "null", "any", "file"]
ODD_TYPES = [None, 5, {"b": 1, "a": 2}]


def random_schema(rng, depth):
    """Any schema, now and then with a wrong value in a place where it may or may not matter."""
    roll = rng.random()
    schema = {}
    if roll < 0.06:
        return rng.choice([True, False, {}, None, "string", 3, []] if rng.random() < 0.3 else [True, False, {}])
    if roll < 0.16:
        schema["$ref"] = rng.choice(REFERENCES)
    elif roll < 0.26:
        schema["anyOf"] = [random_schema(rng, depth - 1) for _ in range(rng.randrange(3))] if depth > 0 else []
        if rng.random() < 0.05:
            schema["anyOf"] = rng.choice(["", {}, None, 0, {"a": 1}])
    elif roll < 0.4:
        schema["enum"] = rng.sample(SCALARS, rng.randrange(4)) if rng.random() < 0.9 else rng.choice(["ab", {"k": 1}, None])
        if rng.random() < 0.5:
            schema["type"] = rng.choice(
                ["string", "number", "integer", "boolean", "other", ["string"], ["null", "integer"], ["string", "null"],
                 ["string", "number"], ["a", "b", "null"], [], 3]
            )  # fmt: skip
            if rng.random() < 0.7:
                schema["enum"] = rng.choice([["a", "b"], [1, 2, None], [1.5], [True], ["a", 1]])
    elif roll < 0.5:
        schema["type"] = rng.sample(["string", "number", "integer", "boolean", "null", "object", "array"], rng.randrange(4))
        if rng.random() < 0.1:
            schema["type"].append(rng.choice(["file", {"a": 1}]))
    elif roll < 0.62 and depth > 0:
        schema["type"] = "array"
        if rng.random() < 0.8:
            schema["items"] = random_schema(rng, depth - 1)
        schema |= {key: rng.choice(SCALARS) for key in ("minItems", "maxItems") if rng.random() < 0.3}
    elif roll < 0.8 and depth > 0:
        schema["type"] = "object"
        schema |= random_object(rng, depth)
    elif roll < 0.97:
        schema["type"] = rng.choice(PLAIN_TYPES if rng.random() < 0.95 else ODD_TYPES)
        schema |= {
            key: rng.choice(SCALARS)
            for key in ("minLength", "maxLength", "pattern", "minimum", "maximum", "minItems")
            if rng.random() < 0.25
        }
    else:
        schema[rng.choice(["oneOf", "title", "const"])] = "x"
    if rng.random() < 0.3:
        schema["description"] = rng.choice(["one", "two\nlines", "gap\n\nend\n", "", None, "\n", "汉字"])
        if rng.random() < 0.05:
            schema["description"] = rng.choice([5, ["a"]])
    if rng.random() < 0.3:
        schema["default"] = rng.choice(SCALARS)
    return schema


def random_object(rng, depth):
    schema = {}
    if rng.random() < 0.9:
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in rng.sample(NAMES, rng.randrange(4))}
    if rng.random() < 0.02:
        schema["properties"] = rng.choice([None, [], "ab"])
    if rng.random() < 0.6:
        schema["required"] = rng.sample(NAMES, 4)
    if rng.random() < 0.04:
        schema["required"] = rng.choice(["ab", {"a": 1}, None, True, [["a"]], [1, None], 7])
    if rng.random() < 0.3:
        schema["additionalProperties"] = rng.choice([True, False, None, random_schema(rng, depth - 1)])
    if rng.random() < 0.03:
        schema["additionalProperties"] = rng.choice(["no", 1, 0, []])
    if rng.random() < 0.25:
        schema["$defs"] = {
            name: random_schema(rng, depth - 1) for name in ("Node", "Leaf", "items") if rng.random() < 0.7
        }
    if rng.random() < 0.02:
        schema["$defs"] = rng.choice([[], None, "x", {"Leaf": True}])
    return schema


def random_tool(rng):
    function = {"name": rng.choice(NAMES)}
    if rng.random() < 0.7:
        function["description"] = rng.choice(["does", "a\nb", "", None, "\n\nx"])
    if rng.random() < 0.95:
        function["parameters"] = {"type": "object", **random_object(rng, 3)}
        if rng.random() < 0.1:
            function["parameters"]["$defs"] = {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}}
    if rng.random() < 0.02:
        function = rng.choice([{}, None, {"parameters": "x"}, {"parameters": []}, {"description": 3, "name": "n"}])
    return rng.choice([{"type": "function", "function": function}] * 9 + [{"type": "_plugin", "name": "p"}])


def test_template_and_module_declare_random_tools_alike():
    rng = random.Random(20260)
    expressed = 0
    for case in range(600):
        tools = [random_tool(rng) for _ in range(rng.randrange(1, 4))]
        expected = expected_declaration(tools)
        expressed += expected.startswith("# Tools")
        assert render(USER, tools) == DECLARE + expected + "<|im_end|>" + render(USER), (case, json.dumps(tools))
    assert 100 < expressed < 500  # both outcomes are well covered


def test_declaration_of_the_caller_comes_first():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render(USER, tools, tools_ts_str="TS").startswith(DECLARE + "TS<|im_end|>")
    as_json = '[{"function":{"name":"f"},"type":"function"}]'
    for none in ("", None):
        assert render(USER, tools, tools_ts_str=none).startswith(DECLARE + as_json + "<|im_end|>")


def test_content_forms():
    def of(content):
        return body([{"role": "user", "content": content}])

    assert of(None) == of("") == of([]) == body([{"role": "user"}]) == "<|im_user|>user<|im_middle|><|im_end|>"
    assert of("  a\r\n{{ b }} <b>&\n") == "<|im_user|>user<|im_middle|>  a\r\n{{ b }} <b>&\n<|im_end|>"
    assert of(["a", {"type": "text", "text": "b"}, {"type": "text"}, {"type": "input_text", "text": "c"}]) == of("abc")
    picture = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
    video = "<|kimi_k25_video_placeholder|>\n"
    parts = [{"type": "video"}, {"type": "image"}, {"type": "image_url"}, {"type": "video_url"}]
    assert of(parts) == of(video + picture + picture + video)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], ["message 1", "content"]),
        ([{"role": "user", "content": {"type": "text"}}], ["message 0", "content"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, 3]}], ["message 0, part 1"]),
        ([{"role": "user", "content": [{"type": "audio"}]}], ["part 0", "audio", "image_url"]),
        ([{"content": "a"}], ["message 0", "role"]),
    ],
)
def test_what_has_no_text_is_refused_by_name(messages, words):
    with pytest.raises(jinja2.TemplateError) as error:
        render(messages)
    assert all(word in str(error.value) for word in words), error.value


def test_roles_and_names():
    text = body([{"role": role, "content": "c"} for role in ("system", "developer", "tool", "critic")])
    assert text.count("<|im_system|>") == 4 and "<|im_system|>developer<|im_middle|>c<|im_end|>" in text
    assert body([{"role": "user", "name": "", "content": "c"}]) == body([{"role": "user", "content": "c"}])


def turn(reasoning=None, content="a", **more):
    return {"role": "assistant", "content": content, **({"reasoning": reasoning} if reasoning is not None else {}), **more}


CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_reasoning_is_shown_after_the_last_answer():
    chat = [*USER, turn("old"), *USER, turn("new", tool_calls=[CALL]), {"role": "tool", "content": "r"}]
    assert "old" not in body(chat) and "<think>new</think>" in body(chat)
    assert "<think>old</think>" in body(chat, preserve_thinking=True)
    for hidden in (body(chat, thinking=False), body(chat, thinking=False, preserve_thinking=True)):
        assert "old" not in hidden and "new" not in hidden and hidden.count("<think></think>") == 2
    assert body(chat, thinking=None) == body(chat)
    assert "new" not in body([*chat, turn("last")]) and "last" not in body([*chat, turn("last")])


def test_either_reasoning_key_and_none_of_them():
    def shown(**keys):
        return body([*USER, turn(**keys)], preserve_thinking=True).split("<|im_middle|>")[-1]

    assert shown(reasoning="r") == shown(reasoning_content="r") == "<think>r</think>a<|im_end|>"
    assert shown(reasoning="r", reasoning_content="r") == shown(reasoning="", reasoning_content="r")
    assert shown() == shown(reasoning="") == shown(reasoning_content=None) == "<think></think>a<|im_end|>"


def test_tool_calls():
    chat = [
        *USER,
        turn(tool_calls=[CALL, {"function": {"name": "g", "arguments": {"b": "é<", "a": [1]}}}], content=None),
        {"role": "tool", "tool_call_id": "functions.f:0", "content": [{"type": "text", "text": "one"}]},
        {"role": "tool", "name": "g", "content": "two"},
        turn(tool_calls=[{"function": {"name": "f", "arguments": None}}, {"name": "h", "id": "call_9"}]),
        {"role": "tool", "content": "three"},
        {"role": "tool", "content": "four"},
        {"role": "tool", "content": "one too many"},
    ]
    text = body(chat)
    begin, mid, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    assert f"{begin}functions.f:0{mid}{{}}{end}{begin}functions.g:1{mid}" + '{"b": "é<", "a": [1]}' + end in text
    assert f"{begin}functions.f:2{mid}{{}}{end}{begin}call_9{mid}{{}}{end}<|tool_calls_section_end|><|im_end|>" in text
    assert "<|im_system|>tool<|im_middle|>## Return of functions.f:0\none<|im_end|>" in text
    assert "<|im_system|>g<|im_middle|>## Return of functions.g:1\ntwo<|im_end|>" in text
    assert "Return of functions.f:2\nthree" in text and "Return of call_9\nfour" in text
    assert text.endswith("## Return of \none too many<|im_end|>")


def test_generation_prompt():
    opening = "<|im_assistant|>assistant<|im_middle|>"
    assert render(USER) == body(USER) + opening + "<think>"
    assert render(USER, thinking=False) == body(USER) + opening + "<think></think>"
    # A renderer that does not hand the flag in gets the default: a prompt.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    plain = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert environment.from_string(plain).render(messages=USER) == render(USER)


def test_generation_spans_are_the_assistants_own_words():
    chat = [*USER, turn("old", content="é1"), *USER, turn("R", content="2", tool_calls=[CALL]), *USER, turn(content="3")]
    calls = body([turn(content="", tool_calls=[CALL])]).split("<think></think>")[1]
    assert spans(chat) == ["é1<|im_end|>", "2" + calls, "3<|im_end|>"]
    assert spans(chat, preserve_thinking=True) == ["old</think>é1<|im_end|>", "R</think>2" + calls, "3<|im_end|>"]
    assert spans(USER) == []


def test_final_message_can_be_continued():
    chat = [*USER, turn("r", content="I would")]
    texts, _ = render_jinja_template(conversations=[chat], chat_template=TEMPLATE, continue_final_message=True)
    assert texts[0].endswith("<think></think>I would")
