"""The benchmarks' machinery on small checkpoints: what is measured is worth nothing here, how it is measured is."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kimi_k26
from kimi_k26.quantization_kimi_k26 import quantize_int4, unpack_int4

pytestmark = pytest.mark.once

BENCHMARKS = Path(kimi_k26.__file__).resolve().parent / "benchmarks"


def load(name: str, monkeypatch):
    """A module of the benchmarks, which are scripts and import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of text.py on the small checkpoint that it makes: its folder, what it printed, its JSON."""
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = ["--size", "small", "--contexts", "8", "24", "--batch", "3", "8", "--rounds", "1", "--steps", "5"]
    files = ["--work", folder, "--json", folder / "out.json", "--plot", folder / "out.png"]
    command = [sys.executable, BENCHMARKS / "text.py", "--engines", "kimi_k26", "--threads", "1", *sizes, *files]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "out.json").read_text())


def test_every_row_is_measured(run):
    _, printed, results = run
    measured = {(row["what"], row["context"], row["batch"]): row for row in results["rows"]}
    sizes = {(8, 1), (24, 1), (8, 3)}
    assert set(measured) == {(what, *size) for what in ("prefill", "decode") for size in sizes}
    for (what, *_), row in measured.items():
        assert row["count"] == (5 if what == "decode" else 1)
        assert 0 < row["limit"] < row["fastest"] <= row["median"] <= row["slowest"]
    assert "| decode, 24 tokens |" in printed and "3 rows, " in printed
    assert results["versions"]["torch"] == torch.__version__


def test_memory_is_measured_with_and_without_a_budget(run):
    _, printed, results = run
    whole, quarter = results["memory"]
    assert whole["budget"] is None and 0 < quarter["budget"] < results["weights"] / 4
    assert len(whole["tokens"]) == 50 and quarter["tokens"] == whole["tokens"]
    assert min(whole["bytes"], quarter["bytes"]) > 0 and "the same tokens" in printed


def test_the_plot_is_drawn(run):
    assert (run[0] / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_compiled_step_is_measured_beside_the_eager_one(run, tmp_path):
    options = ["--checkpoint", run[0] / "small", "--contexts", "8", "--steps", "4", "--threads", "1", "--json", tmp_path / "out.json"]
    done = subprocess.run([str(word) for word in (sys.executable, BENCHMARKS / "compiled.py", *options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["eager", "compiled", "compiled, guards skipped"]
    assert all(row["count"] == 4 and 0 < row["quartile"] <= row["median"] for row in rows)
    assert "decode, 8 tokens, median" in done.stdout and "as fast" in done.stdout


def test_the_checkpoint_is_sound_and_its_limits_are_those_of_its_bytes(run, monkeypatch):
    from kimi_k26.cli import main

    folder = run[0] / "small"
    assert main(["check", str(folder), "--json"]) == 0
    text = load("text", monkeypatch)
    limits = text.Limits(folder, {"bandwidth": 1.0, "flops": 1e30})
    config = json.loads((folder / "config.json").read_text())["text_config"]
    assert limits.decode(11) - limits.decode(10) == 2 * config["num_hidden_layers"] * (64 + 16)
    inner, hidden, layers = config["moe_intermediate_size"], config["hidden_size"], config["num_hidden_layers"] - 1
    one_expert = 3 * (inner * hidden // 2 + inner * hidden // 32 * 2 + 8)
    assert limits.expert_bytes == layers * config["n_routed_experts"] * one_expert
    assert limits.decode(0, batch=10**6) == pytest.approx(limits.plain_bytes + limits.expert_bytes)


def test_no_gpu_is_said_plainly():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "text.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("there is no GPU that PyTorch sees")


def from_q4_0(blocks: np.ndarray, inputs: int) -> np.ndarray:
    """What blocks of Q4_0 stand for, by their definition: value - 8, times the scale."""
    blocks = blocks.reshape(blocks.shape[0], inputs // 32, 18)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    values = np.concatenate((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), axis=-1).astype(np.float32) - 8
    return (values * scale).reshape(blocks.shape[0], inputs)


@pytest.mark.parametrize("group", [32, 64])
def test_words_become_blocks_of_the_same_values(group, monkeypatch):
    gguf_file = load("gguf_file", monkeypatch)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    words, scale = quantize_int4(weight, group)
    blocks = gguf_file.q4_0(words.numpy().view(np.uint32), scale.float().numpy())
    expected = unpack_int4(words).float() * scale.float().repeat_interleave(group, dim=1)
    assert np.array_equal(from_q4_0(blocks, 128), expected.numpy())


def test_words_without_equal_blocks_are_refused(monkeypatch):
    gguf_file = load("gguf_file", monkeypatch)
    words = np.zeros((1, 4), dtype=np.uint32)
    with pytest.raises(ValueError, match="no float16 of the same value"):
        gguf_file.q4_0(words, np.array([[1e-9]], dtype=np.float32))
    with pytest.raises(ValueError, match="2 groups of scales cannot be shared by 1 blocks"):
        gguf_file.q4_0(words, np.ones((1, 2), dtype=np.float32))


def test_transformers_gets_a_config_in_its_own_names(run, tmp_path, monkeypatch):
    folder = run[0] / "small"
    assert load("checkpoints", monkeypatch).as_transformers_has_it(folder, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["text_config"]["model_type"] == "deepseek_v3" and "quantization_config" in config
    assert (tmp_path / "theirs" / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    reason = "this version of transformers has no kimi_k25"
    kimi_k25 = pytest.importorskip("transformers.models.kimi_k25", reason=reason)
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "theirs"))
    assert type(model).__module__.startswith(kimi_k25.__name__)
