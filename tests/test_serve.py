"""The server over HTTP: what clients ask and are told. A stand-in for the model says what a test wants to hear."""

import json
import re
import time

import pytest

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26.cli.serve.schema import ChatRequest
from kimi_k26.cli.serve.service import Limits
from kimi_k26.tests.serving import REPLY, Running, body_of, joined, picture, script, tool

CALLS = (
    "I look.</think>Wait.<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>{"q": "a\\nb"}<|tool_call_end|>'
    '<|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{"x": [1, {"y": 2}]}<|tool_call_end|>'
    "<|tool_calls_section_end|>"
)
NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    with Running(tiny_checkpoint, Limits(max_body=200_000, max_length=4000)) as running:
        yield running


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_whole_answer(server):
    status, reply = server.chat(script(REPLY), model="kimi")
    assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "kimi"
    assert reply["id"].startswith("chatcmpl-") and abs(reply["created"] - time.time()) < 60
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["index"] == 0 and choice["logprobs"] is None
    message = choice["message"]
    assert message["role"] == "assistant" and "tool_calls" not in message
    assert message["reasoning"] == message["reasoning_content"] == "They ask for 2 + 2."
    assert message["content"] == "It is four: 四! 🙂"


def test_a_streamed_answer_is_the_same(server):
    chunks = server.stream(script(REPLY))
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk" and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    whole = joined(chunks)
    assert (whole["reasoning"], whole["content"]) == ("They ask for 2 + 2.", "It is four: 四! 🙂")
    assert whole["finish_reason"] == "stop" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in chunks) > 3  # as it is said
    assert all("usage" not in chunk for chunk in chunks)


def test_tokens_are_counted(server):
    tokenizer = server.processor.tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": script(REPLY)}]
    prompt = len(server.processor.apply_chat_template(messages, tokenize=True)[0])
    said = len(tokenizer.encode(REPLY)) + 1  # and the end
    thought = len(tokenizer.encode(REPLY.partition("</think>")[0] + "</think>"))
    usage = server.chat(messages)[1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, said, prompt + said)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    *chunks, last = server.stream(messages, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": prompt - 1}}
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("off", [{"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"thinking": False}}])
def test_without_thinking(server, off):
    message = server.chat("(instant) " + script("Four."), **off)[1]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Four.", "reasoning": None, "reasoning_content": None}


@pytest.mark.parametrize(
    "fields, shown",
    [
        ({}, False),
        ({"thinking": {"type": "enabled"}}, False),
        ({"thinking": {"type": "enabled", "keep": "all"}}, True),
        ({"chat_template_kwargs": {"thinking": True, "preserve_thinking": True}}, True),
    ],
)
@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_earlier_thinking(server, fields, shown, key):
    talk = [
        {"role": "user", "content": "Three numbers?"},
        {"role": "assistant", "content": "1, 2, 3", key: "And 215 and 222."},
        {"role": "user", "content": script("Yes.</think>Yes.")},
    ]
    prompt = server.chat(talk, **fields)[1]["usage"]["prompt_tokens"]
    kept = server.processor.apply_chat_template(talk, tokenize=True, preserve_thinking=shown)[0]
    other = server.processor.apply_chat_template(talk, tokenize=True, preserve_thinking=not shown)[0]
    assert prompt == len(kept) != len(other)


def test_calls(server):
    tools = [tool("find"), tool("add")]
    status, reply = server.chat(script(CALLS), tools=tools)
    message = reply["choices"][0]["message"]
    assert reply["choices"][0]["finish_reason"] == "tool_calls" and message["content"] == "Wait."
    assert [call["id"] for call in message["tool_calls"]] == ["functions.find:0", "functions.add:1"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["find", "add"]
    assert json.loads(message["tool_calls"][1]["function"]["arguments"]) == {"x": [1, {"y": 2}]}
    whole = joined(server.stream(script(CALLS), tools=tools))
    assert whole["finish_reason"] == "tool_calls" and whole["content"] == "Wait."
    assert [call["arguments"] for call in whole["tool_calls"]] == ['{"q": "a\\nb"}', '{"x": [1, {"y": 2}]}']


def test_a_dialogue_with_tools_goes_on(server):
    tools = [tool("find"), tool("add")]
    first = server.chat(script(CALLS), tools=tools)[1]["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in first["tool_calls"]]
    talk = [{"role": "user", "content": script(CALLS)}, first, *results]
    talk[0]["content"] = talk[0]["content"].replace("Please say", "Please  say") + script("Seven.</think>7.")
    status, reply = server.chat(talk, tools=tools)
    assert status == 200 and reply["choices"][0]["message"]["content"] == "7."
    assert reply["usage"]["prompt_tokens"] == len(
        server.processor.apply_chat_template(talk, tools=tools, tokenize=True)[0]
    )


def test_one_call_alone(server):
    message = server.chat(script(CALLS), tools=[tool("find")], parallel_tool_calls=False)[1]["choices"][0]["message"]
    assert [call["id"] for call in message["tool_calls"]] == ["functions.find:0"]


def test_no_calls(server):
    for fields in ({"tools": [tool("find")], "tool_choice": "none"}, {}):
        choice = server.chat(script(CALLS), max_tokens=60, **fields)[1]["choices"][0]
        assert "tool_calls" not in choice["message"] and choice["message"]["content"].startswith("Wait.")


COUNT = {"type": "function", "function": {"name": "count"}}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("choice", ["required", COUNT, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [COUNT]}}], ids=str)
def test_forced_calls(server, choice, thinking, streamed):
    """The model wants to answer in words, and may only call."""
    asked = script("Hm.</think>No.") if thinking else "(instant) " + script("No.")
    fields = {
        "tools": [tool("other", NUMBER), tool("count", NUMBER)],
        "tool_choice": choice,
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "max_tokens": 1500,
    }
    if streamed:
        got = joined(server.stream(asked, **fields))
        calls, reason = got["tool_calls"], got["finish_reason"]
    else:
        (one,) = server.chat(asked, **fields)[1]["choices"]
        got, reason = one["message"], one["finish_reason"]
        calls = [{"id": call["id"], **call["function"]} for call in got["tool_calls"]]
    assert reason == "tool_calls" and calls and not got["content"]
    assert (got["reasoning"] or "") == ("Hm." if thinking else "")
    for number, call in enumerate(calls):
        assert call["id"] == f"functions.{call['name']}:{number}" and call["name"] in ("other", "count")
        arguments = json.loads(call["arguments"])
        assert set(arguments) == {"n"} and 1 <= arguments["n"] <= 9
    if choice != "required":
        assert {call["name"] for call in calls} == {"count"} and (len(calls) == 1 or choice["type"] == "allowed_tools")


def test_allowed_tools(server):
    """Without force the model calls whom it likes, and is held to what is allowed."""
    tools, allowed = [tool("find"), tool("count", NUMBER)], lambda *names: {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": name}} for name in names]},
    }
    calls = server.chat(script(CALLS), tools=tools, tool_choice=allowed("find"))[1]["choices"][0]["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} == {"find"}
    (choice,) = server.chat(script(CALLS), tools=tools, tool_choice=allowed("count"), max_tokens=300)[1]["choices"]
    assert all(call["function"]["name"] == "count" for call in choice["message"].get("tool_calls", ()))


def test_thinking_cannot_end_a_forced_reply(server):
    """Neither the end nor a call may come inside thinking that has not been closed."""
    fields = {"tools": [tool("f", NUMBER)], "tool_choice": "required", "max_tokens": 40, "temperature": 0}
    (cut,) = server.chat(script("Hm."), **fields)[1]["choices"]
    assert cut["finish_reason"] == "length" and cut["message"]["reasoning"].startswith("Hm.")


@pytest.mark.parametrize(
    "form",
    [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}],
)
def test_json_replies(server, form):
    asked = script('Hm.</think>Here it is: {"n": 3}')
    (choice,) = server.chat(asked, response_format=form, max_tokens=2000, temperature=0)[1]["choices"]
    assert choice["message"]["reasoning"] == "Hm."
    if choice["finish_reason"] == "stop" or form["type"] == "json_schema":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    if form["type"] == "json_schema":
        assert 1 <= json.loads(choice["message"]["content"])["n"] <= 9


def test_strict_arguments(server):
    wanted = CALLS.replace('{"q": "a\\nb"}', '{"n": 77}').replace("functions.find", "functions.count")
    (choice,) = server.chat(script(wanted), tools=[tool("count", NUMBER, strict=True)], max_tokens=900)[1]["choices"]
    assert choice["message"]["content"] == "Wait."
    assert 1 <= json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["n"] <= 9


def test_stop_texts(server):
    asked = script("four four</think>one two three four five")
    for stop in ("four", ["x", "four", "five"]):
        (choice,) = server.chat(asked, stop=stop)[1]["choices"]
        assert choice["message"]["content"] == "one two three " and choice["finish_reason"] == "stop"
        assert choice["message"]["reasoning"] == "four four"
        whole = joined(server.stream(asked, stop=stop))
        assert whole["content"] == "one two three " and whole["finish_reason"] == "stop"
    assert server.chat(asked, stop="five!")[1]["choices"][0]["message"]["content"] == "one two three four five"


def test_length(server):
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = (reply := server.chat(script(REPLY), **{name: 5})[1])["choices"]
        assert choice["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 5
    cut = len(server.processor.tokenizer.encode(CALLS.partition("b")[0]))
    choice = server.chat(script(CALLS), max_tokens=cut, tools=[tool("find")])[1]["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["malformed"]
    cut = len(server.processor.tokenizer.encode(CALLS.partition("find:0")[0])) + 1  # within its name, which no client could know
    choice = server.chat(script(CALLS), max_tokens=cut, tools=[tool("find")])[1]["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]


def test_several_choices(server):
    status, reply = server.chat(script(REPLY), n=3, seed=4)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply["choices"]} == {"It is four: 四! 🙂"}
    one = server.chat(script(REPLY))[1]["usage"]
    assert reply["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    assert reply["usage"]["prompt_tokens"] == one["prompt_tokens"]
    chunks = server.stream(script(REPLY), n=2, temperature=0)
    assert joined(chunks, 0) == joined(chunks, 1) and joined(chunks, 0)["content"] == "It is four: 四! 🙂"


def test_seeds(server):
    """With nothing to say but the end, forced words are noise, which a seed fixes."""
    fields = {"tools": [tool("f", {"type": "object"})], "tool_choice": "required", "max_tokens": 30, "temperature": 2}
    fields |= {"thinking": {"type": "disabled"}, "top_p": 1}
    said = [json.dumps(server.chat("Hi", seed=seed, **fields)[1]["choices"][0]["message"]) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_log_probabilities(server):
    (choice,) = server.chat(script(REPLY), logprobs=True, top_logprobs=2)[1]["choices"]
    told = choice["logprobs"]
    for key, text in (("reasoning", "They ask for 2 + 2."), ("content", "It is four: 四! 🙂")):
        assert b"".join(bytes(entry["bytes"]) for entry in told[key]).decode() == text
        for entry in told[key]:
            assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
            assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    chunks = server.stream(script(REPLY), logprobs=True)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    entries = [entry for one in streamed if one for entry in one["content"]]
    assert [entry["token"] for entry in entries] == [entry["token"] for entry in told["content"]]


def test_pictures(server):
    before = server.model.seen_pictures
    content = [
        {"type": "text", "text": "What? " + script("A square.</think>A square.")},
        {"type": "image_url", "image_url": {"url": picture()}},
    ]
    messages = [{"role": "user", "content": content}]
    reply = server.chat(messages)[1]
    assert reply["choices"][0]["message"]["content"] == "A square."
    assert reply["usage"]["prompt_tokens"] == len(server.processor.apply_chat_template(messages, tokenize=True)[0])
    assert server.model.seen_pictures == before + 1
    again = server.chat(messages)[1]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["usage"]["prompt_tokens"] - 1
    assert server.model.seen_pictures == before + 1
    content[1]["image_url"]["url"] = picture("red")  # as large, and another
    server.chat(messages)
    assert server.model.seen_pictures == before + 2


# -- other routes -----------------------------------------------------------------------------------------------------


def test_models_health_metrics(server):
    status, models, _ = server.ask("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == ["kimi"] and models["object"] == "list"
    assert server.ask("GET", "/v1/models/kimi")[1]["object"] == "model"
    assert server.ask("GET", "/v1/models/gpt")[0] == 404
    deadline = time.monotonic() + 30  # what another test left is still ending
    while server.ask("GET", "/health")[1].get("running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok", "running": 0, "waiting": 0})

    def value(name: str) -> float:
        text = server.ask("GET", "/metrics")[1]
        assert all(re.fullmatch(r'#.*|\w+(\{\w+="[^"]*"\})? [\d.e+-]+', line) for line in text.splitlines())
        return float(re.search(rf"^{re.escape(name)} (.*)$", text, re.MULTILINE)[1])

    server.chat(script(REPLY))  # what never happened has no line
    before = [value('kimi_requests_total{status="200"}'), value("kimi_completion_tokens_total")]
    said = server.chat(script(REPLY))[1]["usage"]["completion_tokens"]
    assert value('kimi_requests_total{status="200"}') == before[0] + 1
    assert value("kimi_completion_tokens_total") == before[1] + said


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_what_is_not_there(server, method, path, status):
    got, reply, _ = server.ask(method, path, b"{}")
    assert got == status and set(reply["error"]) == {"message", "type", "param", "code"}


# -- what is refused --------------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hi"}]


def image(url) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": image(5)}, "messages[0].content[0].image_url.url"),
        ({"messages": image("/etc/passwd")}, "messages[0].content[0].image_url"),
        ({"messages": image("file:///etc/passwd")}, "messages[0].content[0].image_url"),
        ({"messages": image("http://127.0.0.1/cat.png")}, "messages[0].content[0].image_url"),
        ({"messages": image("data:image/png;base64,AAAA")}, "messages[0].content[0]"),
        ({"messages": image("data:image/png;base64,$$$")}, "messages[0].content[0]"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 100}, "n"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [COUNT]}}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice.allowed_tools.tools"),
        ({"tools": [tool("f b")]}, "tools[0].function.name"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", {"properties": {"a": {"type": "strin"}}})], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True}}, "thinking"),
        ({"chat_template_kwargs": {"tools_ts_str": "x"}}, "chat_template_kwargs.tools_ts_str"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_requests(server, fields, param):
    status, reply, _ = server.ask("POST", "/v1/chat/completions", json.dumps({"messages": HI, **fields}).encode())
    assert status == 400 and reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["param"] == param, reply["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": ' + b"[" * 5000])
def test_bad_json(server, body):
    status, reply, _ = server.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and reply["error"]["message"]


def test_an_unknown_model(server):
    status, reply = server.chat("Hi", model="gpt")
    assert status == 404 and reply["error"]["code"] == "model_not_found" and "kimi" in reply["error"]["message"]


def test_bodies_that_are_too_large(server):
    large = body_of("x" * 300_000)
    status, reply, _ = server.ask("POST", "/v1/chat/completions", large)
    assert status == 413 and reply["error"]["code"] == "body_too_large"
    connection = server.connect()  # without saying how large it is
    connection.request("POST", "/v1/chat/completions", iter([large[:100_000], large[100_000:]]), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.chat(script(REPLY))[0] == 200


def test_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    message = client.chat.completions.create(
        model="kimi", messages=[{"role": "user", "content": script(REPLY)}], max_tokens=100
    ).choices[0].message
    assert message.reasoning == "They ask for 2 + 2." and message.content == "It is four: 四! 🙂"
    stream = client.chat.completions.create(
        model="kimi",
        messages=[{"role": "user", "content": "(instant) " + script("Four.")}],
        stream=True,
        extra_body={"thinking": {"type": "disabled"}},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Four."
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="kimi", messages=HI, temperature=1.9, extra_body={"temperature": 5})


def test_defaults(server):
    for fields, temperature in (({}, 1.0), ({"thinking": {"type": "disabled"}}, 0.6)):
        settings = server.service._settings(ChatRequest.model_validate({"messages": HI, **fields}))
        assert (settings.temperature, settings.top_p, settings.top_logprobs) == (temperature, 0.95, None)
