"""Serving: `kimi-k26 serve` under many clients at once, some of them rude.

    python benchmarks/serving.py                                    # 16 clients for 5 minutes, the small checkpoint
    python benchmarks/serving.py --checkpoint FOLDER --clients 4 --seconds 60 --json results.json

It starts the server. Every question is asked alone first, greedily; then one client asks them in turn, which gives the
tokens a second of one; then all clients ask in random order, whole or streamed, and every answer must be the one that was
given alone, to the last token. (Where two tokens were nearly as likely somewhere in that answer, the last bits of bfloat16
decide between them; such questions are asked as well, and must be answered.) Among them are clients that leave in the
middle, bodies that are too large, pictures and videos that are none, addresses that may not be asked, and bodies that are
no JSON: these must be told so. The server's memory is watched all along, and in the end it must be idle, alive, and stop
when it is told to.

The time to the first streamed token is that from a request to the first word that comes, less the time that its prompt
took in the model, which the server counts (`kimi_prompt_seconds_total`): all that is added by HTTP, checks, templates,
tokenizer, queue and parser. It is taken with one client, for prompts that are new to the server.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
from PIL import Image, ImageDraw

from report import machine
from running import ended, publish, started

HERE = Path(__file__).resolve().parent
SMALL = HERE.parent / "examples" / "kimi-k26-tiny"
MAX_BODY = 2**20  # bytes of a request to the server that is started here
WARM_UP = 0.2  # of the time under load; memory is judged after it
NEAR = 0.2  # difference of log probabilities within which another order of sums may choose another token
TYPED = ("clients", "seconds", "alone", "first_tokens", "max_tokens", "threads", "seed")


# -- the server -------------------------------------------------------------------------------------------------------


class Server:
    """`kimi-k26 serve` in a process of its own."""

    def __init__(self, folder: Path, threads: int):
        self.log = tempfile.TemporaryFile("a+")  # so that what is read does not move where it writes
        command = [sys.executable, "-m", "kimi_k26.cli", "serve", folder, "--port", 0, "--max-body", f"{MAX_BODY >> 20}MiB"]
        command += ["--model-name", "kimi", "--threads", threads, "--grace", 5]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.DEVNULL,  # a line for each request
            stderr=self.log,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        found = None
        while found is None:
            if self.process.poll() is not None:
                sys.exit(f"the server ended with status {self.process.returncode}:\n{self.said()[-2000:]}")
            time.sleep(0.1)
            found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said())
        self.port, self.memory = int(found[1]), psutil.Process(self.process.pid)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def connect(self, seconds: float = 300.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def get(self, path: str) -> str:
        connection = self.connect()
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def value(self, name: str) -> float:
        """One of its metrics."""
        return float(re.search(rf"^kimi_{name} (.*)$", self.get("/metrics"), re.MULTILINE)[1])

    def stop(self) -> dict:
        """Whether it was idle, with what status it ended, and the faults that its log tells of."""
        health = json.loads(self.get("/health")) if self.process.poll() is None else {"status": "gone"}
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        faults = self.said().count("Traceback")
        return {"health": health, "status": status, "faults": faults, "log": self.said()[-2000:] if faults else ""}


# -- questions --------------------------------------------------------------------------------------------------------


def picture(seed: int, size=(112, 84)) -> bytes:
    draw, file = random.Random(seed), io.BytesIO()
    image = Image.new("RGB", size, "white")
    colours = draw.sample(["red", "green", "blue", "purple", "orange"], 2)
    ImageDraw.Draw(image).ellipse((10, 20, 50, 60), fill=colours[0])
    ImageDraw.Draw(image).rectangle((64, 24, 100, 60), fill=colours[1])
    image.save(file, "PNG")
    return file.getvalue()


def video(seed: int) -> bytes:
    import av

    colour, file = random.Random(seed).choice(["red", "green", "blue"]), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for number in range(24):
            frame = Image.new("RGB", (84, 56), "white")
            ImageDraw.Draw(frame).ellipse((6 + 2 * number, 16, 30 + 2 * number, 40), fill=colour)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def media(kind: str, data: bytes) -> dict:
    form = {"image_url": "image/png", "video_url": "video/mp4"}[kind]
    return {"type": kind, kind: {"url": f"data:{form};base64,{base64.b64encode(data).decode()}"}}


def user(*parts) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def questions() -> list[dict]:
    """Bodies of requests, greedy: with and without thinking, pictures, videos, tools, long prompts, kept thinking."""
    draw, asked = random.Random(1), []
    for _ in range(6):
        one, other = (f"{draw.randint(1, 99)}.{draw.randint(1, 999)}" for _ in range(2))
        asked.append({"messages": user(f"which one is bigger, {one} or {other}? think carefully.")})
    asked.append({"messages": user("which one is bigger, 3.11 or 3.9?"), "thinking": {"type": "disabled"}})
    for seed in range(4):
        asked.append({"messages": user(media("image_url", picture(seed)), "What is in this picture?")})
    two = [media("image_url", picture(seed, (84, 84))) for seed in (7, 8)]
    asked.append({"messages": user(*two, "Which picture has the circle?"), "thinking": {"type": "disabled"}})
    for seed in range(2):
        asked.append({"messages": user(media("video_url", video(seed)), "Which way does the circle move?")})
    weather = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather", "parameters": weather}}
    asked.append({"messages": user("What is the weather in Paris?"), "tools": [tool]})
    forced = {"tools": [tool], "tool_choice": "required", "thinking": {"type": "disabled"}}
    asked.append({"messages": user("Hello."), **forced})
    numbers = draw.sample(range(100, 999), 5)
    kept = [
        {"role": "user", "content": "Tell me three random numbers."},
        {
            "role": "assistant",
            "reasoning": f"I'll start by listing five numbers: {', '.join(map(str, numbers))}.",
            "content": ", ".join(map(str, numbers[:3])),
        },
        {"role": "user", "content": "What are the other two numbers you have in mind?"},
    ]
    asked.append({"messages": kept, "thinking": {"type": "enabled", "keep": "all"}})
    for length in (300, 1500):
        words = " ".join(str(draw.randint(0, 99)) for _ in range(length))
        asked.append({"messages": user(f"{words}\nWhich number came first?")})
    return [{**body, "temperature": 0} for body in asked]


# -- clients ----------------------------------------------------------------------------------------------------------


class Answer:
    """What was said: texts and calls, and tokens; of a stream also when its first word came.

    `margin`: by how much the log probability of the chosen token was larger than any other's, where that was least; for
    answers with log probabilities.
    """

    def __init__(self):
        self.status, self.texts, self.calls, self.tokens = 0, {"reasoning": "", "content": ""}, [], 0
        self.reason, self.first, self.margin = None, None, float("inf")

    @property
    def said(self) -> list:
        """All that must be the same again."""
        return [self.status, *self.texts.values(), self.calls, self.reason, self.tokens]


def ask(server: Server, body: dict, stream: bool) -> Answer:
    """One question, with its answer whole or streamed."""
    answer, connection = Answer(), server.connect()
    began = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, **options}).encode())
    reply = connection.getresponse()
    answer.status = reply.status
    if not stream or reply.status != 200:
        whole = json.loads(reply.read())
        if reply.status == 200:
            (choice,) = whole["choices"]
            for key in answer.texts:
                answer.texts[key] = choice["message"][key] or ""
            answer.calls = [[c["id"], c["function"]["arguments"]] for c in choice["message"].get("tool_calls", ())]
            answer.reason, answer.tokens = choice["finish_reason"], whole["usage"]["completion_tokens"]
            told = choice["logprobs"] or {}
            for one, other in (entry["top_logprobs"] for key in told for entry in told[key] or ()):
                answer.margin = min(answer.margin, one["logprob"] - other["logprob"])
        connection.close()
        return answer
    for raw in reply:
        text = raw.decode().strip().removeprefix("data: ")
        if not text or text == "[DONE]":
            continue
        chunk = json.loads(text)
        if chunk.get("usage"):
            answer.tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", ()):
            delta = choice["delta"]
            if answer.first is None and (delta.get("reasoning") or delta.get("content") or delta.get("tool_calls")):
                answer.first = time.perf_counter() - began
            for key in answer.texts:
                answer.texts[key] += delta.get(key) or ""
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    answer.calls.append([part["id"], ""])
                answer.calls[part["index"]][1] += part["function"]["arguments"]
            answer.reason = choice["finish_reason"] or answer.reason
    connection.close()
    return answer


def leave(server: Server, body: dict, draw: random.Random) -> None:
    """Asks, hears a little or nothing, and goes."""
    connection = server.connect()
    stream = draw.random() < 0.7
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}).encode())
    if stream:
        reply = connection.getresponse()
        for _ in range(draw.randrange(8)):
            reply.readline()
    else:
        time.sleep(draw.random() * 0.2)
    connection.close()


def wrong_bodies(draw: random.Random) -> tuple[str, bytes, int]:
    """A kind of body that must be refused, one, and the status that says so."""
    half = picture(1)[: draw.randint(10, 200)]
    choices = {
        "oversized body": (json.dumps({"messages": user("x" * (MAX_BODY + 1))}).encode(), 413),
        "half a picture": (json.dumps({"messages": user(media("image_url", half), "What?")}).encode(), 400),
        "half a video": (json.dumps({"messages": user(media("video_url", video(1)[:900]), "What?")}).encode(), 400),
        "private address": (
            json.dumps({"messages": user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}})}).encode(),
            400,
        ),
        "no JSON": (b'{"messages": [' + bytes(draw.choices(range(256), k=50)), 400),
        "wrong setting": (json.dumps({"messages": user("Hi"), "temperature": "hot"}).encode(), 400),
    }
    kind = draw.choice(list(choices))
    return kind, *choices[kind]


def refused(server: Server, data: bytes, status: int) -> str:
    """Sends a wrong body; what is wrong with the answer, if anything is."""
    connection = server.connect()
    try:
        try:
            connection.request("POST", "/v1/chat/completions", data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent: the answer may have come all the same
        reply = connection.getresponse()
        text = reply.read().decode()
        if reply.status != status or "error" not in json.loads(text):
            return f"status {reply.status} in place of {status}: {text[:200]}"
    except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
        return "" if status == 413 else "the connection was cut"
    finally:
        connection.close()
    return ""


class Clients:
    """All clients of the time under load, and what they found."""

    def __init__(self, server: Server, asked: list[dict], alone: list[Answer], seed: int):
        self.server, self.asked, self.alone, self.seed = server, asked, alone, seed
        self.wanted = [[answer.status] if answer.margin < NEAR else answer.said for answer in alone]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.firsts: list[float] = []
        self._lock = threading.Lock()

    def run(self, clients: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, deadline)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, deadline: float) -> None:
        draw = random.Random(f"{self.seed} {number}")
        while time.monotonic() < deadline:
            kind, at = draw.choices(["asks", "leaves", "is wrong"], (7, 2, 1))[0], draw.randrange(len(self.asked))
            complaint, first = "", None
            try:
                if kind == "asks":
                    stream = draw.random() < 0.5
                    answer = ask(self.server, self.asked[at], stream)
                    kind, first = "streamed" if stream else "whole", answer.first
                    if answer.said[: len(self.wanted[at])] != self.wanted[at]:
                        complaint = f"question {at}: {answer.said} in place of {self.alone[at].said}"
                elif kind == "leaves":
                    leave(self.server, self.asked[at], draw)
                else:
                    kind, data, status = wrong_bodies(draw)
                    complaint = refused(self.server, data, status)
            except Exception as error:  # whatever a client meets is counted, and the others go on
                complaint = f"{type(error).__name__}: {error}"
            with self._lock:
                self.counts[kind] += 1
                if complaint:
                    self.wrong.append(f"{kind}: {complaint}"[:600])
                if first is not None:
                    self.firsts.append(first)


# -- measuring --------------------------------------------------------------------------------------------------------


def beyond_prefill(server: Server, count: int) -> list[float]:
    """Seconds to the first streamed word of new prompts, less those that each took in the model."""
    found, draw = [], random.Random(2)
    for number in range(count):
        body = {"messages": user(f"{number} {draw.random()} which one is bigger?"), "temperature": 0, "max_tokens": 8}
        before = server.value("prompt_seconds_total")
        answer = ask(server, body, stream=True)
        if answer.first is not None:  # a reply may begin with its end
            found.append(answer.first - (server.value("prompt_seconds_total") - before))
    return found


class Watch(threading.Thread):
    """Takes down the resident memory of the server twice a second, until it is stopped."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.server, self.bytes, self._over = server, [], threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            if self.server.process.poll() is None:
                self.bytes.append(self.server.memory.memory_info().rss)

    def stop(self) -> list[int]:
        self._over.set()
        self.join()
        return self.bytes


def growth(taken: list[int]) -> dict:
    """Memory after the warm-up: of its first and last fifth the medians, and the largest, in bytes."""
    warm = taken[int(len(taken) * WARM_UP) :]
    fifth = max(1, len(warm) // 5)
    return {"first": statistics.median(warm[:fifth]), "last": statistics.median(warm[-fifth:]), "largest": max(warm)}


def run(args) -> dict:
    """Measure; the result is what goes into the JSON file."""
    import fastapi
    import torch
    import uvicorn

    results = started("cuda" if torch.cuda.is_available() else "cpu")
    results |= {name: getattr(args, name) for name in TYPED} | {"checkpoint": args.checkpoint.name}
    results["versions"] = {"torch": torch.__version__, "fastapi": fastapi.__version__, "uvicorn": uvicorn.__version__}
    asked = [{"max_tokens": args.max_tokens, **body} for body in questions()]
    server = Server(args.checkpoint, args.threads)
    try:
        alone = [ask(server, {**body, "logprobs": True, "top_logprobs": 2}, stream=False) for body in asked]
        results["alone"] = [[answer.status, answer.tokens, answer.reason, min(answer.margin, 99.0)] for answer in alone]
        results["beyond_prefill"] = beyond_prefill(server, args.first_tokens)

        def rate(work) -> float:
            began, tokens = time.perf_counter(), server.value("completion_tokens_total")
            work()
            return (server.value("completion_tokens_total") - tokens) / (time.perf_counter() - began)

        def one_client() -> None:
            end, number = time.monotonic() + args.alone, 0
            while time.monotonic() < end:
                ask(server, asked[number % len(asked)], stream=True)
                number += 1

        results["one_client"] = rate(one_client)
        clients, watch = Clients(server, asked, alone, args.seed), Watch(server)
        steps = server.value("steps_total")
        tokens = server.value("completion_tokens_total")
        watch.start()
        results["all_clients"] = rate(lambda: clients.run(args.clients, args.seconds))
        results["memory"] = watch.stop()
        together = (server.value("completion_tokens_total") - tokens) / max(1, server.value("steps_total") - steps)
        results |= {"together": together, "counts": dict(clients.counts), "wrong": clients.wrong}
        results["first_under_load"] = clients.firsts
        end = time.monotonic() + 30
        while json.loads(server.get("/health")).get("running") and time.monotonic() < end:
            time.sleep(0.1)
        results["metrics"] = server.get("/metrics")
    finally:
        results["end"] = server.stop()
    return ended(results)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SMALL, help="a folder in the published layout (%(default)s)")
    add("--clients", type=int, default=16, help="at once (%(default)s)")
    add("--seconds", type=float, default=300.0, help="of load (%(default)s)")
    add("--alone", type=float, default=30.0, help="seconds with one client (%(default)s)")
    add("--first-tokens", type=int, default=30, help="prompts whose first word is timed (%(default)s)")
    add("--max-tokens", type=int, default=200, help="of an answer (%(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of the server (%(default)s)")
    add("--seed", type=int, default=0, help="of what the clients do (%(default)s)")
    add("--json", type=Path, help="write the results to this file")
    return parser.parse_args(arguments)


# -- what it says -----------------------------------------------------------------------------------------------------


def sound(results: dict) -> bool:
    """Whether nothing crashed, all answers were right, and the server was idle and stopped when told to."""
    end = results["end"]
    idle = end["health"] == {"status": "ok", "running": 0, "waiting": 0}
    return not results["wrong"] and idle and end["status"] == 0 and not end["faults"]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(results: dict) -> str:
    counts, end, memory = results["counts"], results["end"], growth(results["memory"])
    beyond, firsts = results["beyond_prefill"], results["first_under_load"]
    right = counts.get("whole", 0) + counts.get("streamed", 0)
    right -= sum(line.startswith(("whole:", "streamed:")) for line in results["wrong"])
    refusals = {kind: n for kind, n in counts.items() if kind not in ("whole", "streamed", "leaves")}
    megabytes = {name: value / 2**20 for name, value in memory.items()}
    rows = {
        "good requests, all right": f"{right} of {counts.get('whole', 0) + counts.get('streamed', 0)}",
        "clients that left": f"{counts.get('leaves', 0)}",
        "wrong requests refused": ", ".join(f"{n} × {kind}" for kind, n in sorted(refusals.items())),
        "faults in the log; status at the end": f"{end['faults']}; {end['status']}, {json.dumps(end['health'])}",
        "resident memory after the warm-up": f"{megabytes['first']:.0f} MiB, at the end {megabytes['last']:.0f} MiB "
        f"({memory['last'] / memory['first'] - 1:+.1%}), at most {megabytes['largest']:.0f} MiB",
        f"tokens a second, {results['clients']} clients": f"{results['all_clients']:.0f} "
        f"({results['all_clients'] / results['one_client']:.2f} × those of one, {results['one_client']:.0f}); "
        f"{results['together']:.1f} a step",
    }
    if beyond:
        rows["first streamed token beyond prefill"] = (
            f"{statistics.median(beyond) * 1e3:.1f} ms, at most {max(beyond) * 1e3:.1f} ms, of {len(beyond)}"
        )
    if firsts:
        rows["first streamed token under load"] = (
            f"{statistics.median(firsts) * 1e3:.0f} ms, 95 % within {percentile(firsts, 0.95) * 1e3:.0f} ms"
        )
    head = f"{results['checkpoint']}: {results['clients']} clients, {results['seconds']:g} s; "
    certain = sum(margin >= NEAR for *_, margin in results["alone"])
    head += f"{certain} of {len(results['alone'])} questions have answers without near ties"
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*machine(results), head, *table, *(f"WRONG {line}" for line in results["wrong"][:20]), end["log"]])


def main(arguments=None) -> int:
    args = parse(arguments)
    results = run(args)
    publish(args, results, report(results))
    return 0 if sound(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
