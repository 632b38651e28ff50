"""What commands load: one function, whichever of them asks."""

import importlib
import json
import shutil

import pytest
import torch
from accelerate import utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.checkpoint_kimi_k26 import CheckpointError
from kimi_k26.cli import CommandError, loading, main


def test_a_checkpoint_is_loaded(tiny_checkpoint):
    processor, model = loading.load_checkpoint(tiny_checkpoint, "float32", "64MiB", "1MiB")
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert model.dtype == torch.float32 and not model.training and model.expert_store.budget == 2**20


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_the_auto_classes_map_the_files_too(tiny_checkpoint, auto):
    model = auto.from_pretrained(tiny_checkpoint, trust_remote_code=True, dtype=torch.bfloat16, expert_budget="1MiB")
    words = model.language_model.model.layers[1].mlp.experts[0].gate_proj.weight_packed
    assert words.as_in_file[0] == words.data_ptr() and model.expert_store.budget == 2**20


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, KimiK26ForConditionalGeneration])
@pytest.mark.parametrize("where", ["argument", "config"])
def test_the_attention_that_was_asked_for(tiny_checkpoint, auto, where):
    remote = {} if auto is KimiK26ForConditionalGeneration else {"trust_remote_code": True}
    given = {"attn_implementation": "eager"}
    if where == "config":
        kind = AutoConfig if remote else KimiK26Config
        given = {"config": kind.from_pretrained(tiny_checkpoint, attn_implementation="eager", **remote)}
    model = auto.from_pretrained(tiny_checkpoint, **given, **remote)
    assert model.language_model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert auto.from_pretrained(tiny_checkpoint, **remote).config._attn_implementation == "sdpa"


def test_inference_mode_may_end_after_loading(tiny_checkpoint):
    with torch.inference_mode():
        model = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint)
        want = model(torch.arange(9)[None]).logits
    with torch.no_grad():
        assert torch.equal(model(torch.arange(9)[None]).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("device_map", [None, {"": "disk"}], ids=["mapped", "by the library"])
def test_a_config_of_a_part_of_the_model(tiny_checkpoint, device_map, tmp_path):
    whole = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype="float32")
    config = KimiK26Config.from_pretrained(tiny_checkpoint)
    config.text_config.num_hidden_layers = 2
    if device_map is None:  # version 4's own loader stumbles over a part that there is not
        config.vision_config = None
    options = {"device_map": device_map, "offload_folder": tmp_path} if device_map else {}
    part, report = KimiK26ForConditionalGeneration.from_pretrained(
        tiny_checkpoint, config=config, dtype="float32", output_loading_info=True, **options
    )
    del whole.language_model.model.layers[2:]
    ids = torch.arange(9)[None]
    assert torch.equal(part(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    assert any("layers.2." in name for name in report["unexpected_keys"]) and not report["missing_keys"]
    config.text_config.num_hidden_layers = 9  # what is missing is damage all the same
    with pytest.raises(CheckpointError, match="is missing"):
        KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, config=config)


@pytest.mark.parametrize("dtype", ["bf15", "Tensor"])
def test_a_dtype_that_is_none(tiny_checkpoint, dtype):
    with pytest.raises(ValueError, match=dtype):
        KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)


@pytest.mark.parametrize("gpus, wanted", [({}, {"cpu": "9GiB"}), ({0: 1000, 1: 2000}, {0: 900, 1: 1800, "cpu": "9GiB"})])
def test_memory_bounds_main_memory_and_leaves_the_accelerators_in_use(tiny_checkpoint, monkeypatch, gpus, wanted):
    given = []

    def from_pretrained(folder, **kwargs):
        given.append(kwargs)
        return torch.nn.Module()

    monkeypatch.setattr(KimiK26ForConditionalGeneration, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(utils, "get_max_memory", lambda: {**gpus, "cpu": 10**9})
    loading.load_checkpoint(tiny_checkpoint, memory="9GiB")
    loading.load_checkpoint(tiny_checkpoint)
    assert given == [
        {"dtype": "auto", "device_map": "auto", "max_memory": wanted},
        {"dtype": "auto", "device_map": "auto"},
    ]


@pytest.mark.parametrize(
    "options, said",
    [({"dtype": "float99"}, "cannot be loaded: "), ({"dtype": "int8"}, "cannot be loaded: "), ({"memory": "much"}, "--memory must be"), ({"expert_budget": "some"}, "--expert-budget must be")],
)
def test_what_a_model_does_not_take(tiny_checkpoint, options, said):
    with pytest.raises(CommandError, match=said):
        loading.load_checkpoint(tiny_checkpoint, **options)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_commands_hand_on_their_options(command, tmp_path, monkeypatch, capsys):
    if command == "serve":
        pytest.importorskip("fastapi", reason="the server takes the extra `serve`")
    asked = []

    def load_checkpoint(*options):
        asked.append(options)
        raise CommandError("enough")

    monkeypatch.setattr(importlib.import_module(f"kimi_k26.cli.{command}"), "load_checkpoint", load_checkpoint)
    words = ["--dtype", "float32", "--memory", "9GiB", "--expert-budget", "2GiB", "--threads", "3", *(["--port", "0"] if command == "serve" else [])]
    assert main([command, str(tmp_path), *words]) == 1 and "enough" in capsys.readouterr().err
    assert asked == [(tmp_path, "float32", "9GiB", "2GiB", 3)]
    with pytest.raises(SystemExit):
        main([command, str(tmp_path), "--threads", "0"])
    assert "--threads" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["the Hub", "a subfolder"])
def test_files_that_are_elsewhere(tiny_checkpoint, where, tmp_path):
    """They are mapped, bounded and judged as those of a folder are."""
    if where == "the Hub":
        name, options, repository = "org/tiny", {"cache_dir": str(tmp_path), "local_files_only": True}, tmp_path / "models--org--tiny"
        folder = repository / "snapshots" / ("a" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
    else:
        name, options, folder = str(tmp_path), {"subfolder": "inside"}, tmp_path / "inside"
    shutil.copytree(tiny_checkpoint, folder)
    model = KimiK26ForConditionalGeneration.from_pretrained(name, max_memory={"cpu": "500KB"}, **options)
    assert hasattr(model.language_model.lm_head.weight, "as_in_file") and model.language_model.model.streams
    assert model.name_or_path == name and model.generation_config.eos_token_id is not None
    whole = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop("language_model.lm_head.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    state = load_file(shard)
    del state["language_model.lm_head.weight"]
    save_file(state, shard, metadata={"format": "pt"})
    for others in ({}, {"device_map": {"": "cpu"}, "offload_state_dict": False}, {"ignore_mismatched_sizes": False}):
        with pytest.raises(CheckpointError, match="lm_head.weight: is missing"):
            KimiK26ForConditionalGeneration.from_pretrained(name, **options, **others)


def test_a_repository_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="connect"):
        KimiK26ForConditionalGeneration.from_pretrained("org/none", cache_dir=str(tmp_path), local_files_only=True)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"use_cache": False}, TypeError, "use_cache is one of text_config's"),
        ({"num_experts_per_tok": 2}, TypeError, "num_experts_per_tok"),
        ({"dtype": {"": "bfloat16", "vision_config": "float32"}}, TypeError, "dtype must be one"),
        ({"expert_budget": "some"}, ValueError, "expert_budget must be a number of bytes"),
        ({"expert_budget": float("inf")}, ValueError, "expert_budget"),
        ({"max_memory": {"cpu": "a lot"}}, ValueError, "max_memory"),
    ],
)
def test_arguments_that_cannot_be_meant(tiny_checkpoint, options, error, match):
    with pytest.raises(error, match=match):
        KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, **options)


def test_arguments_that_are_heard(tiny_checkpoint, tmp_path):
    load = KimiK26ForConditionalGeneration.from_pretrained
    assert load(tiny_checkpoint, expert_budget=1.5e6).expert_store.budget == 1_500_000
    assert load(tiny_checkpoint, max_position_embeddings=64).config.text_config.max_position_embeddings == 64
    model = load(tiny_checkpoint, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    state = {f"other.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    renamed = load(tmp_path, key_mapping={r"^other\.": ""})
    assert all(torch.equal(tensor, state[f"other.{name}"]) for name, tensor in renamed.state_dict().items())
