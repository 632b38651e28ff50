"""The tokenizer's benchmark on little text: what is measured is worth nothing here, how it is measured is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_k26

pytestmark = pytest.mark.once

BENCHMARKS = Path(kimi_k26.__file__).resolve().parent / "benchmarks"


@pytest.fixture
def mixed_text(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mixed_text

    return mixed_text


def test_everything_is_measured(tiny_checkpoint, tmp_path):
    options = ["--tokenizer", tiny_checkpoint, "--megabytes", "0.5", "--rounds", "2", "--json", tmp_path / "out.json"]
    command = [str(word) for word in (sys.executable, BENCHMARKS / "tokenizer.py", *options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    ranks = len((tiny_checkpoint / "tiktoken.model").read_bytes().splitlines())
    assert results["bytes"] >= 500_000 and results["ids"] > 0 and results["ranks"] == ranks
    tasks = {"encode", "tokenizer(text)", "decode", "decode(skip_special_tokens=True)"}
    assert {(row["what"], row["engine"]) for row in results["rows"]} == {(t, e) for t in tasks for e in ("kimi_k26", "tiktoken")}
    for row in results["rows"] + results["loading"]:
        assert row["count"] == 2 and 0 < row["fastest"] <= row["median"] <= row["slowest"]
        assert f"| {row['what']} |" in done.stdout.replace("`", "")
    assert [row["what"] for row in results["loading"]][-1] == "processor, AutoProcessor"


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "tokenizer.py"), "--tokenizer", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == f"{tmp_path}: no tiktoken.model here"


def test_the_text_has_all_kinds_and_is_always_the_same(mixed_text):
    text = mixed_text.mixed_text(300_000)
    assert text == mixed_text.mixed_text(300_000) != mixed_text.mixed_text(300_000, seed=1)
    assert 300_000 <= len(text.encode()) < 310_000
    for kind in (" the ", "的", "def ", "SELECT", "😀", " " * 400, "<|im_end|>", "<|im_end |>", r"\d{4}-\d\d-\d\d\t"):
        assert re.search(kind if "\\d" in kind else re.escape(kind), text), kind
    # Runs that tiktoken takes as they are: both engines cut the same text.
    assert max(len(run) for run in re.findall(r"\s+|\S+", text)) <= 25_000


def test_a_made_vocabulary_has_the_wanted_size_and_can_be_merged(mixed_text, tmp_path):
    ranks = mixed_text.made_ranks(5000, size=100_000)
    assert list(ranks.values()) == list(range(5000)) and list(ranks)[:256] == [bytes([byte]) for byte in range(256)]
    for token in list(ranks)[256:]:
        assert ranks[token[:-1]] < ranks[token] and len(token) <= mixed_text.LONGEST_TOKEN
    assert len(mixed_text.made_ranks(40_000, size=1000)) == 40_000  # of words, where the text has no more
    tokenizer = kimi_k26.TikTokenTokenizer.from_pretrained(mixed_text.make_vocabulary(tmp_path / "made", 5000))
    text = mixed_text.mixed_text(20_000)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(tokenizer) == 5256 and len(ids) < 0.7 * len(text.encode())
