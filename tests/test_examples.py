"""The example scripts, run as a user runs them; with the trained checkpoint also what they answer."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor
from kimi_k26.tests.media_samples import make_video

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINED = EXAMPLES / "kimi-k26-tiny"
SCRIPTS = ("chat", "picture", "video", "thinking", "tools", "batch", "streaming")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script: str, *words) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/NAME.py` has it
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def short_answers(monkeypatch):
    """Noise may go on for long."""
    generate = KimiK26ForConditionalGeneration.generate

    def shorter(self, *args, **kwargs):
        return generate(self, *args, **{**kwargs, "max_new_tokens": 4})

    monkeypatch.setattr(KimiK26ForConditionalGeneration, "generate", shorter)


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_attached_folder_serves(script, run, tiny_checkpoint, short_answers):
    assert run(script, tiny_checkpoint).strip()


def test_own_pictures_videos_and_questions(run, tiny_checkpoint, short_answers, tmp_path):
    picture, video = tmp_path / "own.png", tmp_path / "own.mp4"
    Image.new("RGB", (60, 40), "teal").save(picture)
    video.write_bytes(make_video(frames=20))
    assert run("picture", tiny_checkpoint, picture, "Is it teal?").startswith("> Is it teal?")
    assert run("video", tiny_checkpoint, video, "Does it move?").startswith("> Does it move?")
    assert run("chat", tiny_checkpoint, "One?", "Two?").count("> ") == 2
    with pytest.raises(Exception, match="missing.png"):
        run("picture", tiny_checkpoint, tmp_path / "missing.png")


def test_an_adapter_is_taught_saved_and_loaded(run, tiny_checkpoint, short_answers, tmp_path):
    pytest.importorskip("peft", reason="finetune_lora.py takes the extra `train`")
    out = tmp_path / "adapter"
    few = ("--steps", 2, "--rows", 3, "--cases", 4)
    printed = run("finetune_lora", tiny_checkpoint, "--out", out, *few)
    assert (out / "adapter_model.safetensors").is_file() and (out / "adapter_config.json").is_file()
    assert "before: 0 % right" in printed and "after:  0 % right" in printed
    assert "loaded on a fresh base: 0 % right, logits apart by 0e+00 at most" in printed


class Scripted:
    """Replies written beforehand, in place of what a model would say."""

    def __init__(self, monkeypatch, processor, *replies):
        self.replies, self.prompts = list(replies), []

        def generate(model, input_ids, **kwargs):
            self.prompts.append(processor.decode(input_ids[0]))
            reply = processor.tokenizer(self.replies.pop(0), return_tensors="pt")["input_ids"]
            return torch.cat((input_ids, reply), dim=1)

        monkeypatch.setattr(KimiK26ForConditionalGeneration, "generate", generate)


def call(name: str, arguments: str, index: int = 0) -> str:
    return (
        f"I call.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )


def test_the_tool_loop(run, tiny_checkpoint, monkeypatch):
    processor = KimiK26Processor.from_pretrained(tiny_checkpoint)
    wrong = [call("get_wether", "{}"), call("get_weather", '{"city": "Rome"', 1)]
    replies = [*wrong, call("get_weather", '{"city": "Rome"}', 2)]
    script = Scripted(monkeypatch, processor, *replies, "I know.</think>It is sunny.<|im_end|>")
    assert run("tools", tiny_checkpoint, "Rome?").rstrip().endswith("It is sunny.")
    assert "get_weather" in script.prompts[0] and "Rome?<|im_end|>" in script.prompts[0]
    assert "## Return of functions.get_wether:0\nKeyError" in script.prompts[1]
    assert "## Return of functions.get_weather:1\nJSONDecodeError" in script.prompts[2]
    assert '## Return of functions.get_weather:2\n{"weather": "sunny"' in script.prompts[3]
    assert not script.replies


# What each script prints with the trained checkpoint, where nothing is given.
ANSWERS = {
    "chat": ("I am Kimi", "compare numbers and call tools"),
    "picture": ("red circle", "blue square"),
    "video": ("red circle moves to the right",),
    "thinking": ("on:   9 = 9.", "</think>9.9 is bigger", "off:  9.9 is bigger", "numbers are 215 and 222"),
    "tools": ('{"city": "Beijing"}', "sunny", "21"),
    "batch": ("绿色的正方形", "3 figures", "3.7 is bigger"),
    "streaming": ("(thinks: 12 = 12.", "\n12.5 is bigger"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_trained_checkpoint_answers(script, run):
    if not TRAINED.is_dir():
        pytest.skip(f"there is no {TRAINED.name} among the examples: train_tiny.py makes it")
    printed = run(script)
    assert [words for words in ANSWERS[script] if words not in printed] == [], printed
    if script == "thinking":
        lost = printed.split("lost:")[1]
        assert "215" not in lost and "222" not in lost
