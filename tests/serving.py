"""A server for tests, and a stand-in for the model that says what it is told to."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import uvicorn
from PIL import Image

import kimi_k26
from kimi_k26 import KimiK26Config, KimiK26Processor
from kimi_k26.cli.serve import make_server
from kimi_k26.cli.serve.app import create_app
from kimi_k26.cli.serve.engine import Engine
from kimi_k26.cli.serve.media import MediaPolicy
from kimi_k26.cli.serve.service import Limits, Service
from kimi_k26.cli.tiny import tiny_config

SCRIPT = "Please say "
REPLY = "They ask for 2 + 2.</think>It is four: 四! 🙂"


def script(reply: str) -> str:
    """A user's message to which `Parrot` answers with this text; markers in it become their tokens."""
    return SCRIPT + reply.encode().hex() + "."


def tool(name: str, parameters: dict | None = None, **more) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}, **more}}


def picture(colour: str = "teal", size=(60, 40)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return "data:image/png;base64, " + base64.b64encode(data.getvalue()).decode()


class Parrot:
    """A model without weights. Its cache holds the ids themselves, from which it reads what it is asked to say.

    The last message asks for a text, as `script` writes it; after the last id of that text it ends the reply. Where a
    guide does not let it say so, noise decides.

    Args:
        processor: of a small checkpoint.
        pause: seconds a step takes.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, processor, pause: float = 0.0):
        self.tokenizer, self.pause = processor.tokenizer, pause
        first_special = self.tokenizer.vocab_size - 256
        self.config = KimiK26Config(**tiny_config(first_special, quantized=False))
        self.config.text_config.num_hidden_layers = 1
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.header = self.tokenizer.encode("<|im_assistant|>assistant<|im_middle|><think>")
        self.think_end = self.tokenizer.convert_tokens_to_ids("</think>")
        self.seen_pictures = 0
        self.steps: list[int] = []  # rows of each step
        self.fails = False

    def get_image_features(self, pixel_values, grid_thws):
        self.seen_pictures += 1
        return torch.zeros(int(grid_thws.prod()) // 4, 1)

    def __call__(self, input_ids, past_key_values, position_ids=None, logits_to_keep=None, **kwargs):
        time.sleep(self.pause)
        if self.fails:
            raise RuntimeError("the parrot is asleep")
        self.steps.append(len(input_ids))
        states = input_ids[:, None, :, None].double()
        known, _ = past_key_values.update(states, states, 0)
        if position_ids is None:  # a piece of a prompt, perhaps filled up
            rows = [known[0, 0, : known.shape[2] - input_ids.shape[1] + int(logits_to_keep) + 1, 0].long().tolist()]
        else:
            rows = [known[row, 0, -1 - int(place) :, 0].long().tolist() for row, place in enumerate(position_ids)]
        return SimpleNamespace(logits=torch.stack([self.logits(ids) for ids in rows]).unsqueeze(1))

    def logits(self, ids: list[int]) -> torch.Tensor:
        noise = torch.Generator().manual_seed(hash(tuple(ids)) % 2**63)
        logits = torch.rand(self.config.text_config.vocab_size, generator=noise)
        logits[self.next_token(ids)] += 30
        return logits

    def next_token(self, ids: list[int]) -> int:
        width = len(self.header)
        starts = [at + width for at in range(len(ids) - width + 1) if ids[at : at + width] == self.header]
        if not starts:
            return self.end
        asked, said = self.tokenizer.decode(ids[: starts[-1]]), ids[starts[-1] :]
        if self.instant(asked, said):
            said = said[1:]
        code = asked.rpartition(SCRIPT)[2].partition(".")[0]
        wanted = self.tokenizer.encode(bytes.fromhex(code).decode()) if SCRIPT in asked else []
        return wanted[len(said)] if said == wanted[: len(said)] and len(said) < len(wanted) else self.end

    def instant(self, asked: str, said: list[int]) -> bool:
        """Whether the prompt closes the thinking, so that this is no token of the reply."""
        return "(instant)" in asked and said[:1] == [self.think_end]


class Client:
    """What a client does, at `port`."""

    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict | str, dict]:
        """Status, body and headers of an answer."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text, dict(answer.headers)
        finally:
            connection.close()

    def chat(self, content, **fields) -> tuple[int, dict]:
        """Status and JSON of a whole answer to a user's message (or to several messages)."""
        status, reply, _ = self.ask("POST", "/v1/chat/completions", body_of(content, **fields))
        return status, reply

    def open_stream(self, content, **fields) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", body_of(content, stream=True, **fields))
        return connection, connection.getresponse()

    def stream(self, content, **fields) -> list[dict]:
        """The chunks of a streamed answer."""
        connection, answer = self.open_stream(content, **fields)
        with contextlib.closing(connection):
            assert answer.status == 200, answer.read()
            assert answer.headers.get_content_type() == "text/event-stream"
            return list(chunks_of(answer))


class Running(Client):
    """A server in a thread of this process. Its model is a `Parrot`, unless one is given."""

    def __init__(self, checkpoint, limits: Limits = Limits(), keys=(), pause=0.0, model=None, grace=1.0, **engine):
        self.processor = KimiK26Processor.from_pretrained(checkpoint)
        self.model = model or Parrot(self.processor, pause)
        end = self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.engine = Engine(self.model, [end], **engine)
        self.service = Service(self.model, self.processor, self.engine, ["kimi"], MediaPolicy(), limits)
        config = uvicorn.Config(create_app(self.service, keys), host="127.0.0.1", port=0, log_level="warning")
        self.server = make_server(config, self.engine, grace)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.engine.alive


class Served(Client):
    """`kimi-k26 serve FOLDER` in a process of its own, with more `words` on its command line; it calls the model `kimi`."""

    def __init__(self, folder, *words: str):
        command = [sys.executable, "-m", "kimi_k26.cli", "serve", str(folder), "--port", "0", "--model-name", "kimi", *words]
        search = [str(Path(kimi_k26.__file__).resolve().parents[1]), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
        self.log = tempfile.TemporaryFile("a+")  # so that what is read does not move where it writes
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log, env=environment)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def __enter__(self):
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.said())):
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        self.port = int(found[1])
        return self

    def __exit__(self, *error):
        self.process.terminate()
        status, said = self.process.wait(60), self.said()
        self.log.close()
        assert status == 0 and "Traceback" not in said, said


def body_of(content, **fields) -> bytes:
    messages = content if isinstance(content, list) and "role" in content[0] else [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, **fields}).encode()


def chunks_of(answer):
    """The chunks of an open stream; the last line must be the one that ends it."""
    lines = [None]
    for raw in answer:
        text = raw.decode().strip()
        if text:
            assert text.startswith("data: ")
            lines.append(text.removeprefix("data: "))
            if lines[-1] != "[DONE]":
                yield json.loads(lines[-1])
    assert lines[-1] == "[DONE]" and lines.count("[DONE]") == 1


def joined(chunks: list[dict], index: int = 0) -> dict:
    """One choice of a stream put together: its texts, its calls, why it ended."""
    whole = {"reasoning": "", "content": "", "tool_calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for key in ("reasoning", "content"):
                whole[key] += delta.get(key, "")
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    whole["tool_calls"].append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                whole["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    return whole
