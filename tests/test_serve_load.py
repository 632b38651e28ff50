"""The server with many clients, or with ones that leave, wait, do not read or ask for too much; and how it stops."""

import asyncio
import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26.cli.serve import talks
from kimi_k26.cli.serve.service import Limits
from kimi_k26.tests.serving import REPLY, Running, body_of, chunks_of, joined, picture, script, tool

LONG = script("word " * 100)  # some seconds, with a pause in every step


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_many_at_once_are_decoded_together(tiny_checkpoint):
    with Running(tiny_checkpoint, pause=0.005, rows=8) as server:
        replies = {}

        def client(number: int) -> None:
            asked = script(f"I am {number}.</think>{' '.join([str(number)] * (number + 3))}")
            if number % 2:
                replies[number] = joined(server.stream(asked))["content"]
            else:
                replies[number] = server.chat(asked)[1]["choices"][0]["message"]["content"]

        clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(30)
        assert replies == {number: " ".join([str(number)] * (number + 3)) for number in range(12)}
        assert max(server.model.steps) == 8
        assert server.engine.running == server.engine.waiting == 0


def test_a_client_that_leaves_frees_its_place(tiny_checkpoint):
    with Running(tiny_checkpoint, pause=0.01, rows=1) as server:
        for stream in (True, False):
            connection = server.connect()
            connection.request("POST", "/v1/chat/completions", body_of(LONG, stream=stream))
            until(lambda: server.engine.running == 1)
            if stream:
                connection.getresponse().readline()
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            until(lambda: server.engine.running == 0)
        assert server.chat(script(REPLY))[0] == 200
        assert "kimi_clients_left_total 2" in server.ask("GET", "/metrics")[1]


def test_a_full_queue_answers_429(tiny_checkpoint):
    with Running(tiny_checkpoint, pause=0.01, rows=1, queue=1) as server:
        talking, _ = server.open_stream(LONG)
        waiting = server.connect()
        waiting.request("POST", "/v1/chat/completions", body_of(script(REPLY)))
        until(lambda: server.engine.waiting == 1)
        status, reply, headers = server.ask("POST", "/v1/chat/completions", body_of("Hi"))
        assert status == 429 and reply["error"]["type"] == "rate_limit_error" and int(headers["retry-after"]) > 0
        talking.close()
        assert waiting.getresponse().status == 200
        waiting.close()


def test_time_that_is_over(tiny_checkpoint):
    with Running(tiny_checkpoint, Limits(seconds=1.5, body_seconds=0.3), pause=0.01) as server:
        status, reply = server.chat(LONG)
        assert status == 408 and reply["error"]["code"] == "timeout"
        *chunks, last = server.stream(LONG)
        assert last["error"]["code"] == "timeout" and len(chunks) > 3
        connection = server.connect()  # a body that does not come
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"messages"')
        answer = connection.getresponse()
        assert answer.status == 408 and json.loads(answer.read())["error"]["code"] == "timeout"
        connection.close()


def test_a_client_that_does_not_read(tiny_checkpoint, monkeypatch):
    """Its place is free once its time is over, though what was sent is still on its way."""
    monkeypatch.setattr(talks, "LAST_WORDS", 0.2)
    body = [{"type": "http.request", "body": body_of(script(REPLY), stream=True)}]
    sent = []

    async def receive():
        return body.pop() if body else await asyncio.sleep(1000)

    async def send(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.sleep(1000)

    with Running(tiny_checkpoint, Limits(seconds=1.0), rows=1, queue=0) as server:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
        asyncio.run(asyncio.wait_for(server.server.config.app(scope, receive, send), 60))
        assert sent == ["http.response.start", "http.response.body"]
        assert server.chat(script(REPLY))[0] != 429


def test_memory_for_requests(tiny_checkpoint):
    with Running(tiny_checkpoint, Limits(memory=30_000), pause=0.01) as server:
        content = [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": picture()}]
        connection, answer = server.open_stream(content)  # alone it may hold more
        status, reply = server.chat("x" * 20_000)
        assert (status, reply["error"]["code"]) == (429, "memory_full")
        connection.close()
        until(lambda: server.engine.running == 0)
        assert server.chat("x" * 2000)[0] == 200


def test_faults_of_the_model_are_told(tiny_checkpoint, caplog):
    with Running(tiny_checkpoint) as server:
        server.model.fails = True
        status, reply = server.chat("Hi")
        assert status == 500 and "asleep" not in json.dumps(reply) and reply["error"]["type"] == "server_error"
        assert "kimi_clients_left_total 0" in server.ask("GET", "/metrics")[1]
        server.model.fails = False
        assert server.chat(script(REPLY))[0] == 200
    assert "asleep" in caplog.text


def test_a_schema_that_cannot_be_kept_to(tiny_checkpoint):
    large = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}
    with Running(tiny_checkpoint, chunk=2**16) as server:
        instant = {"thinking": {"type": "disabled"}}
        status, reply = server.chat("Hi", tools=[tool("f", large)], tool_choice="required", **instant)
        assert status == 400 and reply["error"]["code"] == "invalid_schema"
        assert server.chat(script(REPLY))[0] == 200


def test_keys(tiny_checkpoint):
    with Running(tiny_checkpoint, keys=("one", "two")) as server:
        body = body_of(script(REPLY))
        for path, data in (("/v1/models", None), ("/v1/chat/completions", body)):
            method = "POST" if data else "GET"
            for wrong in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"Authorization": "one"}):
                status, reply, headers = server.ask(method, path, data, **wrong)
                assert status == 401 and reply["error"]["code"] == "invalid_api_key"
            assert server.ask(method, path, data, Authorization="Bearer two")[0] == 200
        assert server.ask("GET", "/health")[0] == 200


def test_fixed_sampling(tiny_checkpoint):
    """As Moonshot's API: only the model's own settings are taken."""
    with Running(tiny_checkpoint, Limits(fixed_sampling=True)) as server:
        right = {"top_p": 0.95, "n": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert server.chat(script(REPLY), temperature=1.0, **right)[0] == 200
        assert server.chat("Hi", temperature=0.6, thinking={"type": "disabled"}, **right)[0] == 200
        for name, value in {"temperature": 0.6, "top_p": 0.9, "n": 2, "presence_penalty": 1}.items():
            status, reply = server.chat("Hi", **{name: value})
            assert status == 400 and reply["error"]["param"] == name


def test_stopping_ends_streams(tiny_checkpoint):
    """What can be finished within the grace is; the rest is told."""
    with Running(tiny_checkpoint, pause=0.01, grace=3.0) as server:
        short, long = server.open_stream(script("word " * 4)), server.open_stream(script("word " * 1000))
        for _, answer in (short, long):
            answer.readline()
        server.server.should_exit = True
        until(lambda: server.engine.closed)
        assert joined(list(chunks_of(short[1])))["finish_reason"] == "stop"
        *_, last = chunks_of(long[1])
        assert last["error"]["code"] == "stopping"
        for connection, _ in (short, long):
            connection.close()
