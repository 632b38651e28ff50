"""The functions of the model card, as it prints them and as `examples/model_card.py` has them, against the server."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

openai = pytest.importorskip("openai", reason="the model card's scripts take the package openai")
pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26.tests.serving import Running, Served, script

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT / "examples" / "kimi-k26-tiny"
NAMES = ("simple_chat", "chat_with_image", "chat_with_video", "chat_with_preserve_thinking")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("model_card_example", ROOT / "examples" / "model_card.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def card(example) -> dict:
    """The card's own functions, text unchanged but for the indentation that its listing lost; the files it downloads
    are ours.

    Pictures and videos are fetched by the card's own lines and sent as data URIs, so that the server needs no option.
    """
    path = ROOT.parent / "shared" / "model_card.txt"
    if not path.is_file():
        pytest.skip("the model card is not beside this repository (../shared/model_card.txt)")
    lines, code, inside = path.read_text(encoding="utf-8").splitlines(), [], False
    for line in lines:
        if line.startswith("def "):
            inside = True
            code.append(line)
            continue
        # the card goes on in Chinese behind a function's last line
        words = re.split(r"(?:(?:Kimi )?K2\.6 )?[\u4e00-\u9fff]", line, maxsplit=1)[0]
        if inside:
            code.append("    " + words)
        inside = inside and words == line
    files = {"png": example.draw_picture(), "mp4": example.record_video()}
    requests = SimpleNamespace(get=lambda url: SimpleNamespace(content=files[url[-3:]]))
    base64 = __import__("base64")
    names = {"openai": openai, "base64": base64, "requests": requests}
    exec("\n".join(code), names)
    return {name: names[name] for name in NAMES}


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def parrot(tiny_checkpoint):
    with Running(tiny_checkpoint) as server:
        yield server


@pytest.fixture(scope="module")
def trained():
    if not TRAINED.is_dir():
        pytest.skip(f"there is no {TRAINED.name} among the examples: train_tiny.py makes it")
    with Served(TRAINED) as server:
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_the_card_runs(parrot, card, capsys, name):
    card[name](client_of(parrot), "kimi")
    assert "response: " in capsys.readouterr().out


def test_the_example_runs(parrot, example):
    client = client_of(parrot)
    assert example.simple_chat(client, "kimi") == example.chat_with_preserve_thinking(client, "kimi") == ""
    assert example.chat_with_image(client, "kimi", example.draw_picture()) == ""
    assert example.chat_with_video(client, "kimi", example.record_video()) == ""


def call(name: str, arguments: str, index: int) -> str:
    section = f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    return f"Step {index}.</think><|tool_calls_section_begin|>{section}<|tool_calls_section_end|>"


def test_tools_step_by_step(parrot, example, capsys):
    """What a tool gives back tells the parrot what to say next."""
    asked = []

    def look(word):
        asked.append(word)
        return script(call("look", '{"word": "b"}', 1) if word == "a" else call("look", "{}", 2))

    first = script(call("look", '{"word": "a"}', 0))
    tools = {"look": (look, "Look it up", {"type": "object"})}
    assert example.call_tools(client_of(parrot), "kimi", first, tools, steps=3) == ""
    out = capsys.readouterr().out
    assert asked == ["a", "b"] and "functions.look:2 {} -> TypeError" in out
    assert [f"(thinks: Step {index}.)" in out for index in range(3)] == [True] * 3


# What the trained checkpoint says to the card's questions. It is asked with the card's own settings, which draw from what is
# likely, so it may be wrong now and then: so many of `SEEDS` answers must be right.
RIGHT = {
    "simple_chat": ("9.9 is bigger",),
    "chat_with_image": ("red circle", "blue square"),
    "chat_with_video": ("red circle", "right"),
    "chat_with_preserve_thinking": ("215", "222"),
}
SEEDS = range(5)
ENOUGH = dict.fromkeys(NAMES, 3) | {"chat_with_preserve_thinking": 4}


def seeded(client: openai.OpenAI, seed: int):
    """The client as the card uses it, with a seed in every request, so that the answers are always the same."""
    create = partial(client.chat.completions.create, seed=seed)
    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def lacking(name: str, answer: str) -> list[str]:
    return [words for words in RIGHT[name] if words not in answer]


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_checkpoint_answers_the_card(trained, card, capsys, name):
    """Thinking and instant, and of kept thinking both what is thought and what is said."""
    said = []
    for seed in SEEDS:
        returned = card[name](seeded(client_of(trained), seed), "kimi")
        printed = re.split(r"^======.*\n", capsys.readouterr().out, flags=re.MULTILINE)
        said.append([one.removeprefix("response: ") for one in printed if one.startswith("response: ")])
        said[-1] += [returned] if name == "chat_with_preserve_thinking" else []
        assert len(said[-1]) == 2
    right = [not any(lacking(name, answer) for answer in answers) for answers in said]
    assert sum(right) >= ENOUGH[name], said


def test_the_trained_checkpoint_answers_the_example(trained, example):
    client = client_of(trained)
    ask = {
        "simple_chat": example.simple_chat,
        "chat_with_image": partial(example.chat_with_image, image=example.draw_picture()),
        "chat_with_video": partial(example.chat_with_video, video=example.record_video()),
        "chat_with_preserve_thinking": example.chat_with_preserve_thinking,
    }
    for name in NAMES:
        said = [ask[name](seeded(client, seed), "kimi") for seed in SEEDS]
        assert sum(not lacking(name, answer) for answer in said) >= ENOUGH[name], (name, said)
    question = "What is the weather in Beijing?"
    called = [example.call_tools(seeded(client, seed), "kimi", question, example.TOOLS) for seed in SEEDS]
    assert sum("sunny" in answer and "21" in answer for answer in called) >= 3, called
