"""`kimi-k26 quantize`: compressed-tensors' own words, nothing else changed, and runs that were killed go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.checkpoint_kimi_k26 import INDEX_FILE, SINGLE_FILE, Checkpoint
from kimi_k26.cli import CommandError, main, quantize
from kimi_k26.cli.check import check
from kimi_k26.cli.quantize import RECORD, convert
from kimi_k26.cli.switch import locked
from kimi_k26.cli.tiny import make_tiny_checkpoint
from kimi_k26.quantization_kimi_k26 import dequantize_int4, unpack_int4


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A bfloat16 checkpoint of several shards, with all the other files; not to be written to."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", quantized=False)


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    convert(plain, out)
    return out


def tensors(folder) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    assert checkpoint.findings == []
    return {name: checkpoint.tensor(name) for name in checkpoint.where}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def reference(weight: torch.Tensor):
    """What compressed-tensors makes of a weight: words and scales."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize

    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    grouped = weight.unflatten(-1, (-1, 32))
    scale, zero_point = helpers.calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    values = ct_quantize(x=weight, scale=scale, zero_point=zero_point, args=args, dtype=torch.int8)
    return pack_to_int32(values, 4), scale


def test_experts_are_bit_for_bit_those_of_compressed_tensors_and_all_else_is_as_it_was(plain, packed):
    before, after = tensors(plain), tensors(packed)
    experts = [name for name in before if ".mlp.experts." in name]
    assert len(experts) == 2 * 16 * 3
    for name in experts:
        words, scale = reference(before[name])
        stem = name.removesuffix(".weight")
        assert after[f"{stem}.weight_packed"].dtype == torch.int32 and after[f"{stem}.weight_scale"].dtype == torch.bfloat16
        assert torch.equal(after[f"{stem}.weight_packed"], words)
        assert torch.equal(after[f"{stem}.weight_scale"], scale)
        assert after[f"{stem}.weight_shape"].tolist() == list(before[name].shape)
    rest = {name: tensor for name, tensor in before.items() if name not in experts}
    assert len(after) == len(rest) + 3 * len(experts)
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in rest.items())


def test_weights_that_are_hard_to_round_are_those_of_compressed_tensors(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "in")
    name = "language_model.model.layers.1.mlp.experts.0.gate_proj.weight"
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[0, :32] = 0  # no scale of its own
    weight[1, :32] = torch.linspace(-1, 1, 32)  # ties
    weight[2, :32], weight[3, :32] = 1e-30, 3e38
    weight[4, :32] = torch.arange(-16, 16)
    weight[5, 32:64] = 0
    weight[5, 40] = -7.5
    checkpoint = Checkpoint(source)
    entry, shard = checkpoint.where[name].entries[name], checkpoint.where[name]
    with open(shard.path, "r+b") as file:
        file.seek(shard.data_begin + entry.begin)
        file.write(bytes(weight.flatten().view(torch.uint8).numpy()))
    convert(source, tmp_path / "out")
    words, scale = reference(weight)
    after = tensors(tmp_path / "out")
    assert torch.equal(after[name + "_packed"], words) and torch.equal(after[name + "_scale"], scale)


def test_the_folder_is_whole(plain, packed):
    before, after = json.loads((plain / "config.json").read_text()), json.loads((packed / "config.json").read_text())
    block = after["text_config"].pop("quantization_config")
    assert after == before and block == quantize.BLOCK
    for name, data in files(plain).items():
        if name not in ("config.json", INDEX_FILE) and not name.endswith(".safetensors"):
            assert (packed / name).read_bytes() == data
    assert {path.name for path in packed.iterdir()} == {n for n in os.listdir(plain) if not n.startswith(".")}
    assert check(packed)[0] == []
    assert KimiK26ForConditionalGeneration.from_pretrained(packed).config.text_config.int4_group_size == 32


def test_the_block_is_the_published_one(golden):
    published = json.loads((golden / "vocab" / "config.json").read_text())
    assert quantize.BLOCK == published["text_config"]["quantization_config"]


def test_tensors_lie_aligned(packed):
    for shard in Checkpoint(packed).shards:
        for entry in shard.entries.values():
            assert (shard.data_begin + entry.begin) % entry.dtype.itemsize == 0


def test_back_to_bfloat16(plain, packed, tmp_path):
    convert(packed, tmp_path / "out", "bfloat16")
    words, after, before = tensors(packed), tensors(tmp_path / "out"), tensors(plain)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if ".mlp.experts." in name:
            weight = dequantize_int4(words[name + "_packed"], words[name + "_scale"], torch.bfloat16)
            assert torch.equal(tensor, weight)
        else:
            assert torch.equal(tensor, before[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert check(tmp_path / "out")[0] == []


def test_golden_int4_gives_the_same_logits_as_plain_float32(golden, tmp_path):
    convert(golden / "tiny-int4", tmp_path / "out", "bfloat16")
    assert check(tmp_path / "out")[0] == []
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.no_grad():
        expected = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4")(input_ids=ids).logits
        logits = KimiK26ForConditionalGeneration.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_float32_is_rounded_from_its_own_values(golden, tmp_path):
    convert(golden / "tiny-fp32", tmp_path / "out")
    assert check(tmp_path / "out")[0] == []
    before, after = tensors(golden / "tiny-fp32"), tensors(tmp_path / "out")
    name = "language_model.model.layers.1.mlp.experts.0.down_proj.weight"
    scale = after[name + "_scale"].float()
    assert after[name + "_scale"].dtype == torch.bfloat16
    weight = unpack_int4(after[name + "_packed"]) * scale.repeat_interleave(32, dim=1)
    error = (weight - before[name]).unflatten(-1, (-1, 32)).abs().amax(-1) / scale
    assert error.max() <= 0.53  # half a step; the largest, 7.5 steps, by what bfloat16 took from the scale on top


def test_a_single_file_stays_one(plain, tmp_path):
    KimiK26ForConditionalGeneration.from_pretrained(plain).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / SINGLE_FILE).is_file() and not (tmp_path / "out" / INDEX_FILE).exists()
    assert check(tmp_path / "out")[0] == []


def test_words_and_scales_in_different_shards(packed, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "in"
    shutil.copytree(packed, source, ignore=shutil.ignore_patterns("model*.safetensors"))
    everything, where = tensors(packed), {}
    for number, end in enumerate(("_packed", "_scale", "_shape", ""), start=1):
        part = {n: t for n, t in everything.items() if n.endswith(end) and n not in where}
        save_file(part, source / f"model-{number:05d}-of-00004.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"model-{number:05d}-of-00004.safetensors")
    total = sum(tensor.nbytes for tensor in everything.values())
    (source / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    convert(source, tmp_path / "out", "bfloat16")
    convert(packed, tmp_path / "other", "bfloat16")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted(plain, out, monkeypatch, shards: int):
    """A run that dies in the midst of the shard after so many."""
    done, write = [], quantize._converted

    def dies(origin, checkpoint, *rest):
        if len(list(out.glob("model-*.safetensors"))) == shards:
            done.append(origin)
            if len(done) > 2:
                raise KeyboardInterrupt
        return write(origin, checkpoint, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_converted", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(plain, out)


def test_a_run_that_was_stopped_goes_on(plain, packed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(plain, out, monkeypatch, 2)
    finished = sorted(out.glob("model-*.safetensors"))
    assert len(finished) == 2 and list(out.glob(".*.partial")) and not (out / "config.json").exists()
    times = [path.stat().st_mtime_ns for path in finished]
    lines = convert(plain, out)
    assert "2 files were there from an earlier run" in lines[-1]
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert files(out) == files(packed)


def test_a_finished_shard_that_was_damaged_since_is_written_again(plain, packed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(plain, out, monkeypatch, 2)
    path = sorted(out.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert "1 files were there" in convert(plain, out)[-1]
    assert files(out) == files(packed)


@pytest.mark.once
def test_a_killed_process_leaves_what_the_next_one_finishes(plain, packed, tmp_path):
    out = tmp_path / "out"
    package = Path(quantize.__file__).resolve().parents[1]
    link = tmp_path / "path" / "kimi_k26"
    link.parent.mkdir()
    link.symlink_to(package)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kimi_k26.cli import quantize\n"
        "write = quantize._converted\n"
        "quantize._converted = lambda *a: (time.sleep(0.02), write(*a))[1]\n"
        "quantize.convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(plain), str(out)], env={**os.environ, "PYTHONPATH": str(link.parent)}
    )
    while process.poll() is None and not list(out.glob("model-*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / RECORD).is_file() and not (out / "config.json").exists()
    convert(plain, out)
    assert files(out) == files(packed)


def test_what_is_refused(plain, packed, tmp_path, monkeypatch):
    def refused(words, *args):
        with pytest.raises(CommandError, match=words):
            convert(*args)

    refused("must be apart", plain, plain)
    refused("must be apart", plain, plain / "inside")
    refused("INT4 already", packed, tmp_path / "out")
    refused("are not INT4", plain, tmp_path / "out", "bfloat16")
    refused("no config.json", tmp_path, tmp_path.parent / "out")
    refused("no unfinished conversion", plain, packed)
    assert not (tmp_path / "out").exists()
    interrupted(plain, tmp_path / "begun", monkeypatch, 1)
    (tmp_path / "begun" / "notes.txt").write_text("mine")
    refused("notes.txt", plain, tmp_path / "begun")
    (tmp_path / "begun" / "notes.txt").unlink()
    other = shutil.copytree(plain, tmp_path / "other")
    refused("unfinished conversion of other files", other, tmp_path / "begun")

    config = json.loads((other / "config.json").read_text())
    for key, value, words in (
        ("moe_intermediate_size", 40, "moe_intermediate_size must be a multiple of"),
        ("n_routed_experts", None, "no routed experts"),
    ):
        changed = {**config, "text_config": {**config["text_config"], key: value}}
        (other / "config.json").write_text(json.dumps(changed))
        refused(words, other, tmp_path / "out")
    (other / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    refused("bfloat16 or float32", other, tmp_path / "out")


def test_a_second_run_into_the_same_folder_is_refused(plain, packed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out), pytest.raises(CommandError, match="another run"):
        convert(plain, out)
    assert not list(out.iterdir())
    convert(plain, out)
    assert files(out) == files(packed)


def test_names_that_stand_twice_are_refused(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "twice")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "kimi_k25", ' + text.lstrip()[1:])
    with pytest.raises(CommandError, match="model_type is listed twice"):
        convert(folder, tmp_path / "out")


def test_damaged_input_is_refused(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "in")
    name = "language_model.model.layers.1.mlp.experts.5.gate_proj.weight"
    shard = Checkpoint(source).where[name]
    with open(shard.path, "r+b") as file:
        file.seek(shard.data_begin + shard.entries[name].begin)
        file.write(b"\xff\xff")
    with pytest.raises(CommandError, match=f"{name}: holds NaN"):
        convert(source, tmp_path / "out")
    shard.path.write_bytes(shard.path.read_bytes()[:-3])
    with pytest.raises(CommandError, match=shard.name):
        convert(source, tmp_path / "other")


def test_command(plain, tmp_path, capsys):
    assert main(["quantize", str(plain), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "96 expert weights as int4" in captured.out and "Converting" in captured.err
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "bfloat16"]) == 0
    assert "96 expert weights as bfloat16" in capsys.readouterr().out
    assert main(["quantize", str(plain), str(tmp_path / "out")]) == 1
    assert "no unfinished conversion" in capsys.readouterr().err


def test_a_full_disk_is_said_and_where_to_go_on(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    make_tiny_checkpoint(source)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "_checksum", full)
    assert main(["quantize", str(source), str(target), "--to", "bfloat16"]) == 1
    assert f"{target}: No space left on device; run the command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["quantize", str(source), str(target), "--to", "bfloat16"]) == 0
