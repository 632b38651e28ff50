"""What checks of vendors ask of a server, on the small trained checkpoint.

Settings are taken and do what they say, or are refused; prompts have as many tokens as the template gives them; calls
keep to their schemas; replies end for the reason that they name; streams say the same. Only what takes the knowledge of
the big model is not asked here.
"""

import base64
import io
import json
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

jsonschema = pytest.importorskip("jsonschema", reason="the tests judge JSON by the package jsonschema")
pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.cli.serve.service import Limits
from kimi_k26.tests.media_samples import make_video
from kimi_k26.tests.serving import Running, joined

pytestmark = pytest.mark.once  # `test_serve` asks every version

TRAINED = Path(__file__).resolve().parents[1] / "examples" / "kimi-k26-tiny"
INSTANT = {"thinking": {"type": "disabled"}}
GREEDY = {"temperature": 0}
BIGGER = "which one is bigger, 9.11 or 9.9? think carefully."


@pytest.fixture(scope="module")
def model():
    if not TRAINED.is_dir():
        pytest.skip(f"there is no {TRAINED.name} among the examples: train_tiny.py makes it")
    return KimiK26ForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32)  # whose sums have no near ties


@pytest.fixture(scope="module")
def server(model):
    with Running(TRAINED, model=model) as running:
        yield running


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def drawn(width: int, height: int) -> dict:
    """A picture of this size, with a red circle."""
    picture, file = Image.new("RGB", (width, height), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((10, 10, 40, 40), fill="red")
    picture.save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": data_uri("image/png", file.getvalue())}}


def recorded() -> dict:
    film = make_video("mp4", "mpeg4", frames=24, rate=8)
    return {"type": "video_url", "video_url": {"url": data_uri("video/mp4", film)}}


def user(*parts) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def tool(name: str, parameters: dict, description: str = "") -> dict:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
FORM = {"name": "place", "schema": CITY, "strict": True}
WEATHER = tool("get_weather", CITY, "Get the weather for a city")
KEPT = [
    {"role": "user", "content": "Tell me three random numbers."},
    {
        "role": "assistant",
        "reasoning_content": "I'll start by listing five numbers: 473, 921, 235, 215, 222, "
        "and I'll tell you the first three.",
        "content": "473, 921, 235",
    },
    {"role": "user", "content": "What are the other two numbers you have in mind?"},
]
KEEP = {"thinking": {"type": "enabled", "keep": "all"}}


def asked(server, messages, **fields) -> dict:
    """The answer with its usage, from the server as a whole."""
    status, reply = server.chat(messages, **fields)
    assert status == 200, reply
    return reply


def choice_of(server, messages, **fields) -> dict:
    """A whole answer in the form in which `joined` puts a stream together."""
    (choice,) = asked(server, messages, **fields)["choices"]
    message = choice["message"]
    calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls", ())]
    texts = {key: message[key] or "" for key in ("reasoning", "content")}
    return {**texts, "tool_calls": calls, "finish_reason": choice["finish_reason"]}


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"top_p": 1e-6},
        {"max_tokens": 1},
        {"max_completion_tokens": 1},
        {"stop": "x"},
        {"stop": ["x"] * 16},
        {"stop": []},
        {"n": 8},
        {"seed": 0},
        {"seed": -(2**63)},
        {"logprobs": True, "top_logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {"5": -100}},
        {"response_format": {"type": "text"}},
        {"parallel_tool_calls": True},
        {"stream": False, "user": "me", "store": False, "metadata": {}},
        {name: None for name in ("temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice", "logprobs")},
    ],
    ids=str,
)
def test_settings_that_are_allowed(server, fields):
    limit = {} if "max_completion_tokens" in fields else {"max_tokens": 3}
    reply = asked(server, user("Hi"), **{**limit, **fields})
    assert len(reply["choices"]) == (fields.get("n") or 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": -1},
        {"max_completion_tokens": 0},
        {"stop": ["x"] * 17},
        {"stop": 5},
        {"n": 0},
        {"n": 9},
        {"n": 1.5},
        {"seed": "a"},
        {"seed": 2**63},
        {"logprobs": 1},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"tool_choice": "sometimes"},
        {"tool_choice": "required"},
        {"response_format": {"type": "xml"}},
    ],
    ids=str,
)
def test_settings_that_are_refused(server, fields):
    status, reply = server.chat(user("Hi"), **fields)
    assert status == 400 and reply["error"]["type"] == "invalid_request_error"
    assert re.match(r"\w+", reply["error"]["param"])[0] == next(iter(fields)), reply


def test_only_the_models_own_sampling(model):
    """As Moonshot's API and its checks have it: other values are refused, and not replaced."""
    own = {"top_p": 0.95, "n": 1, "presence_penalty": 0, "frequency_penalty": 0}
    with Running(TRAINED, Limits(fixed_sampling=True), model=model) as server:
        for mode, temperature, other in (({}, 1.0, 0.6), (KEEP, 1.0, 0.6), (INSTANT, 0.6, 1.0)):
            fields = {**mode, "max_tokens": 1}
            asked(server, user("Hi"), **fields)
            asked(server, user("Hi"), **fields, **own, temperature=temperature)
            for name, values in {
                "temperature": (other, 0, 0.99, 1.01, 2),
                "top_p": (0.9, 1),
                "n": (2,),
                "presence_penalty": (0.1,),
                "frequency_penalty": (-0.1,),
            }.items():
                for value in values:
                    status, reply = server.chat(user("Hi"), **fields, **{name: value})
                    assert status == 400 and reply["error"]["param"] == name, (name, value, reply)


def test_temperature_zero_says_the_likeliest(server, model):
    inputs = server.processor.apply_chat_template(user(BIGGER), tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=300, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    wanted = server.processor.parse_response(ids)
    for fields in (GREEDY, {"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        said = choice_of(server, user(BIGGER), max_tokens=300, **fields)
        assert (said["reasoning"], said["content"]) == (wanted["reasoning"], wanted["content"]), fields


def test_seeds(server):
    fields = {"temperature": 2, "top_p": 1, "max_tokens": 30}
    several = [choice["message"] for choice in asked(server, user("Hi"), n=3, seed=7, **fields)["choices"]]
    assert asked(server, user("Hi"), seed=8, **fields)["choices"][0]["message"] == several[1]
    assert len({json.dumps(message) for message in several}) == 3
    # One reply in two is the likeliest even so: eight to a request, four times, are never all alike.
    unseeded = [json.dumps(asked(server, user("Hi"), n=8, **fields)["choices"]) for _ in range(4)]
    assert len(set(unseeded)) > 1


def test_max_tokens(server):
    whole = asked(server, user(BIGGER), **GREEDY)
    length = whole["usage"]["completion_tokens"]
    text = whole["choices"][0]["message"]["reasoning"]
    for name in ("max_tokens", "max_completion_tokens"):
        for most, reason in ((1, "length"), (length - 1, "length"), (length, "stop"), (length + 1, "stop")):
            reply = asked(server, user(BIGGER), **GREEDY, **{name: most})
            assert reply["usage"]["completion_tokens"] == min(most, length)
            assert reply["choices"][0]["finish_reason"] == reason
            assert text.startswith(reply["choices"][0]["message"]["reasoning"] or "")


def test_stop(server):
    content = choice_of(server, user(BIGGER), **GREEDY)["content"]
    stop = content[len(content) // 2 :][:3]
    for given in (stop, ["nowhere", stop]):
        whole = choice_of(server, user(BIGGER), **GREEDY, stop=given)
        assert whole["content"] == content.partition(stop)[0] and whole["finish_reason"] == "stop"
        assert joined(server.stream(user(BIGGER), **GREEDY, stop=given)) == whole


def test_log_probabilities(server):
    fields = {**GREEDY, "logprobs": True, "top_logprobs": 5}
    (choice,) = asked(server, user(BIGGER), **fields)["choices"]
    for key in ("reasoning", "content"):
        told = choice["logprobs"][key]
        assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == choice["message"][key]
        for entry in told:
            likeliest = [other["logprob"] for other in entry["top_logprobs"]]
            assert len(likeliest) == 5 and sorted(likeliest, reverse=True) == likeliest
            assert entry["logprob"] == likeliest[0] <= 0 and sum(map(math.exp, likeliest)) <= 1 + 1e-5
    chunks = server.stream(user(BIGGER), **fields)
    streamed = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    tokens = [entry["token"] for entries in streamed for entry in entries or ()]
    assert tokens == [entry["token"] for entry in choice["logprobs"]["content"]]


# -- tokens of prompts ------------------------------------------------------------------------------------------------

CHATS = {
    "one word": (user("Hi"), {}),
    "text of many kinds": (user("  a\n\n\tb <|im_end|> 你好，世界 🙂 1234567 it's"), {}),
    "a system prompt": ([{"role": "system", "content": "You are Kimi."}, *user(BIGGER)], {}),
    "instant": (user(BIGGER), INSTANT),
    "thinking of earlier turns left out": (KEPT, {}),
    "and kept": (KEPT, KEEP),
    "tools": (user("What is the weather in Paris?"), {"tools": [WEATHER]}),
    "tools that may not be called": (user("What?"), {"tools": [WEATHER], "tool_choice": "none"}),
    "a call and its result": (
        [
            *user("What is the weather in Paris?"),
            {
                "role": "assistant",
                "content": "",
                "reasoning": "I ask.",
                "tool_calls": [
                    {"id": "functions.get_weather:0", "type": "function",
                     "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": '{"weather": "sunny"}'},
        ],
        {"tools": [WEATHER]},
    ),
    "a picture": (user(drawn(112, 84), "What is it?"), {}),
    "two pictures, at once": (user(drawn(112, 84), "and", drawn(60, 200), "Which?"), INSTANT),
    "a video": (user(recorded(), "Which way?"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_prompt_tokens_are_the_templates_own(server, name):
    messages, fields = CHATS[name]
    flags = {"thinking": fields is not INSTANT, "preserve_thinking": fields is KEEP, "tools": fields.get("tools")}
    wanted = len(server.processor.apply_chat_template(messages, tokenize=True, **flags)[0])
    usage = asked(server, messages, max_tokens=2, **fields)["usage"]
    assert usage["prompt_tokens"] == wanted and usage["total_tokens"] == wanted + usage["completion_tokens"]
    *_, last = server.stream(messages, max_tokens=2, stream_options={"include_usage": True}, **fields)
    assert last["usage"]["prompt_tokens"] == wanted


@pytest.mark.parametrize("width, height", [(28, 28), (29, 28), (56, 56), (112, 84), (100, 60), (84, 300)])
def test_tokens_of_a_picture(server, width, height):
    """One for each 28 by 28 pixels, of small pictures; measured against the same chat with a smaller one."""
    one, other = (
        asked(server, user(drawn(*size), "What?"), max_tokens=1)["usage"]["prompt_tokens"]
        for size in ((width, height), (28, 28))
    )
    assert one - other == math.ceil(width / 28) * math.ceil(height / 28) - 1


# -- calls ------------------------------------------------------------------------------------------------------------


def test_a_call_and_what_follows(server):
    messages = user("What is the weather in Beijing?")
    (choice,) = asked(server, messages, tools=[WEATHER], **GREEDY)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["id"] == "functions.get_weather:0" and call["type"] == "function"
    assert call["function"]["name"] == "get_weather" and isinstance(call["function"]["arguments"], str)
    jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "sunny", "temperature": 21}'}
    messages = [*messages, choice["message"], result]
    (answer,) = asked(server, messages, tools=[WEATHER], **GREEDY)["choices"]
    assert answer["finish_reason"] == "stop" and answer["message"]["content"]
    again = choice_of(server, messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **INSTANT)
    assert [call["id"] for call in again["tool_calls"]] == ["functions.get_weather:1"]  # numbers run on
    never = choice_of(server, user("What is the weather in Beijing?"), tools=[WEATHER], tool_choice="none", max_tokens=60)
    assert not never["tool_calls"] and never["finish_reason"] in ("stop", "length")


def random_schema(draw: random.Random, depth: int = 2) -> dict:
    """A schema of bounded size."""
    word = "".join(draw.choices("abcdefgh", k=4))
    kinds = {
        "string": lambda: {"type": "string", "maxLength": draw.randint(1, 8)},
        "pattern": lambda: {"type": "string", "pattern": "^[a-z]{1,5}-[0-9]{2}$"},
        "enum": lambda: {"enum": [word, word[:2] + "é", draw.randint(0, 99), None]},
        "const": lambda: {"const": {"a": [word]}},
        "integer": lambda: {"type": "integer", "minimum": -5, "maximum": draw.randint(0, 2000)},
        "number": lambda: {"type": "number", "enum": [0.5, -3, 2e10]},
        "boolean": lambda: {"type": ["boolean", "null"]},
        "array": lambda: {"type": "array", "items": random_schema(draw, depth - 1), "minItems": 1, "maxItems": 2},
        "object": lambda: random_object(draw, depth - 1),
        "either": lambda: {"anyOf": [{"type": "boolean"}, random_schema(draw, depth - 1)]},
    }
    names = list(kinds)
    return kinds[draw.choice(names if depth else names[:7])]() | ({"description": word} if draw.random() < 0.3 else {})


def random_object(draw: random.Random, depth: int = 2) -> dict:
    names = [draw.choice(["city", "n", "to", "$x", "naïve"]) + str(place) for place in range(draw.randint(1, 3))]
    properties = {name: random_schema(draw, depth) for name in names}
    required = [name for name in properties if draw.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_calls_keep_to_random_schemas(server, choice):
    """Whole and streamed: whatever the model would rather say."""
    draw = random.Random(choice)
    cases = []
    for number in range(8):
        tools = [tool(f"do_{number}_{place}", random_object(draw)) for place in range(2)]
        named = {"type": "function", "function": {"name": tools[1]["function"]["name"]}}
        fields = {"tools": tools, "tool_choice": "required" if choice == "required" else named, "max_tokens": 3000}
        cases.append((user(f"Do it {number} times."), {**fields, **INSTANT}))

    def check(case) -> list[dict]:
        messages, fields = case
        whole = choice_of(server, messages, **fields)
        return [whole, joined(server.stream(messages, **fields))]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(check, cases))
    for (messages, fields), pair in zip(cases, answers):
        schemas = {one["function"]["name"]: one["function"]["parameters"] for one in fields["tools"]}
        allowed = list(schemas) if choice == "required" else [fields["tool_choice"]["function"]["name"]]
        for answer in pair:
            assert answer["finish_reason"] == "tool_calls" and answer["tool_calls"] and not answer["content"]
            for index, call in enumerate(answer["tool_calls"]):
                assert call["name"] in allowed and call["id"] == f"functions.{call['name']}:{index}"
                jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]])


def test_forced_calls_after_thinking(server):
    for given in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = choice_of(server, user("What is the weather in Beijing?"), tools=[WEATHER], tool_choice=given, **GREEDY)
        assert answer["finish_reason"] == "tool_calls" and answer["reasoning"]
        for call in answer["tool_calls"]:
            jsonschema.validate(json.loads(call["arguments"]), CITY)


# -- streams ----------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "thinking": (user(BIGGER), {}),
    "instant": (user(BIGGER), INSTANT),
    "kept thinking": (KEPT, KEEP),
    "a call": (user("What is the weather in Beijing?"), {"tools": [WEATHER]}),
    "a forced call": (user("Hello."), {"tools": [WEATHER], "tool_choice": "required", **INSTANT}),
    "a picture": (user(drawn(112, 84), "What is in this picture?"), {}),
    "Chinese": (user(drawn(112, 84), "图里有什么？"), INSTANT),
    "cut off": (user(BIGGER), {"max_tokens": 7}),
    "JSON": (user("Hello."), {"response_format": {"type": "json_schema", "json_schema": FORM}, **INSTANT}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_stream_says_the_same(server, name):
    messages, fields = QUESTIONS[name]
    fields = {"max_tokens": 400, **GREEDY, **fields}
    reply = asked(server, messages, **fields)
    whole = choice_of(server, messages, **fields)
    *chunks, last = server.stream(messages, stream_options={"include_usage": True}, **fields)
    assert joined(chunks) == whole
    for key in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert last["usage"][key] == reply["usage"][key]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons[-1] == whole["finish_reason"] and not any(reasons[:-1])
    wanted = {"cut off": "length", "a call": "tool_calls", "a forced call": "tool_calls"}.get(name, "stop")
    assert whole["finish_reason"] == wanted
    if name == "JSON":
        jsonschema.validate(json.loads(whole["content"]), CITY)
