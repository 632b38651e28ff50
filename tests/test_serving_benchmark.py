"""The load test of the server, for a few seconds: what it measures is worth nothing here, what it finds is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

import kimi_k26

pytestmark = pytest.mark.once

BENCHMARKS = Path(kimi_k26.__file__).resolve().parent / "benchmarks"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_serving", BENCHMARKS / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_run(tiny_checkpoint, tmp_path):
    words = ["--clients", "4", "--seconds", "3", "--alone", "1", "--first-tokens", "2"]
    words += ["--max-tokens", "12", "--threads", "1"]
    command = [sys.executable, BENCHMARKS / "serving.py", "--checkpoint", tiny_checkpoint, "--json", tmp_path / "out.json"]
    done = subprocess.run([*map(str, command), *words], capture_output=True, text=True)
    results = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert results["wrong"] == [] and results["end"]["faults"] == results["end"]["status"] == 0
    assert results["end"]["health"] == {"status": "ok", "running": 0, "waiting": 0}
    assert {status for status, *_ in results["alone"]} == {200}
    assert results["counts"]["streamed"] + results["counts"]["whole"] > 0 and len(results["memory"]) > 0
    assert "| good requests, all right |" in done.stdout and "kimi_completion_tokens_total" in results["metrics"]


def results_of(**parts) -> dict:
    idle = {"status": "ok", "running": 0, "waiting": 0}
    made = {"wrong": [], "end": {"health": idle, "status": 0, "faults": 0, "log": ""}}
    made["end"] |= parts.pop("end", {})
    return {**made, **parts}


def test_what_is_not_sound_is_told(serving):
    assert serving.sound(results_of())
    assert not serving.sound(results_of(wrong=["whole: question 1"]))
    for end in ({"status": -9}, {"faults": 1}, {"health": {"status": "ok", "running": 1, "waiting": 0}}):
        assert not serving.sound(results_of(end=end))


def test_growth_is_judged_after_the_warm_up(serving):
    taken = [*range(20), *[100] * 20, *[101] * 59, 110]
    assert serving.growth(taken) == {"first": 100, "last": 101, "largest": 110}


def test_another_answer_is_found(serving, monkeypatch):
    """An answer that differs in a word is wrong, unless two tokens were nearly as likely when it was given alone."""
    alone, other = serving.Answer(), serving.Answer()
    alone.status = other.status = 200
    alone.texts, other.texts = {"reasoning": "", "content": "yes"}, {"reasoning": "", "content": "no"}
    monkeypatch.setattr(serving, "ask", lambda server, body, stream: other)
    monkeypatch.setattr(serving, "leave", lambda *_: None)
    monkeypatch.setattr(serving, "refused", lambda *_: "")
    for margin, wrong in ((1.0, True), (0.01, False)):
        alone.margin = margin
        clients = serving.Clients(None, [{}], [alone], seed=0)
        clients.run(2, 0.3)
        assert clients.counts["whole"] + clients.counts["streamed"] > 0 and bool(clients.wrong) == wrong
