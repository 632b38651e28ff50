"""The config: read, checked, written back with nothing lost."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, KimiK26TextConfig, KimiK26VisionConfig
from kimi_k26.tests import tiny_models
from kimi_k26.tests.tiny_models import QUANTIZATION, config_dict


ROOT = Path(__file__).resolve().parents[1]


def written(config) -> dict:
    """What stands in the file the config writes, without the version the library adds."""
    return {key: value for key, value in json.loads(config.to_json_string()).items() if key != "transformers_version"}


def contains(file: dict, given: dict) -> bool:
    """Whether a file has all that was given; it may have more keys, at their defaults."""
    return all(
        contains(file[key], value) if isinstance(value, dict) and key != "rope_scaling" else file[key] == value
        for key, value in given.items()
    )


def changed(path: str, value, **kinds) -> dict:
    """A config dict with the value at a dotted path replaced."""
    whole = config_dict(quantized=True, **kinds)
    *parents, key = path.split(".")
    part = whole
    for name in parents:
        part = part[name]
    part[key] = value
    return whole


@pytest.mark.parametrize("name", ["vocab", "tiny-fp32", "tiny-int4"])
def test_golden_files_come_back_as_they_were(golden, name, tmp_path):
    published = json.loads((golden / name / "config.json").read_text())
    config = KimiK26Config.from_pretrained(golden / name)
    assert written(config) == published
    config.save_pretrained(tmp_path)
    again = KimiK26Config.from_pretrained(tmp_path)
    assert written(again) == published and again == config
    assert json.loads(config.to_json_string(use_diff=False)).keys() == json.loads(config.to_json_string()).keys()


def test_published_values(golden):
    config = KimiK26Config.from_pretrained(golden / "vocab")
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.n_routed_experts, text.num_experts_per_tok) == (61, 7168, 384, 8)
    assert (text.kv_lora_rank, text.qk_rope_head_dim, text.max_position_embeddings) == (512, 64, 262144)
    assert text.int4_group_size == 32
    assert [text.is_moe_layer(i) for i in (0, 1, 60)] == [False, True, True]
    assert text.softmax_scale == pytest.approx(192**-0.5 * 1.4158883**2)
    assert (vision.vt_num_hidden_layers, vision.vt_hidden_size, vision.patch_size) == (27, 1152, 14)
    assert config.media_placeholder_token_id == 163605 and config.dtype == torch.bfloat16
    assert config.get_text_config() is text and config.get_text_config(decoder=True) is text
    defaults, read = KimiK26Config.published().text_config, {k: getattr(text, k) for k in KimiK26TextConfig.fields}
    assert {k: getattr(defaults, k) for k in KimiK26TextConfig.fields} == read
    published = KimiK26Config.published().vision_config
    assert all(getattr(published, k) == getattr(vision, k) for k in KimiK26VisionConfig.fields)


def test_a_dict_that_was_given_is_not_changed():
    given = config_dict(quantized=True)
    before = copy.deepcopy(given)
    config = KimiK26Config(**given)
    config.text_config.hidden_size = 64
    config.text_config.expert_quantization["format"] = "other"
    config.text_config.rope_scaling["factor"] = 3.0
    assert given == before


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
@pytest.mark.parametrize("top", ["kimi_k25", "kimi_k26"])
def test_model_types_stay(model_type, top):
    given = config_dict(model_type=model_type) | {"model_type": top, "architectures": ["SomethingElse"]}
    config = KimiK26Config(**given)
    assert config.model_type == top and config.text_config.model_type == model_type
    assert written(config)["text_config"]["model_type"] == model_type
    assert written(config)["architectures"] == ["SomethingElse"] and written(config)["model_type"] == top


@pytest.mark.parametrize("places", [("inside",), ("top",), ("inside", "top"), ()])
def test_places_of_the_quantization_block(places, tmp_path):
    given = config_dict(quantized="inside" in places)
    if "top" in places:
        given["quantization_config"] = copy.deepcopy(QUANTIZATION)
    config = KimiK26Config(**given)
    assert config.text_config.int4_group_size == (8 if places else None)
    assert not hasattr(config, "quantization_config") and not hasattr(config.text_config, "quantization_config")
    file = written(config)
    assert ("quantization_config" in file) == ("top" in places)
    assert ("quantization_config" in file["text_config"]) == ("inside" in places)
    config.save_pretrained(tmp_path)
    assert KimiK26Config.from_pretrained(tmp_path).text_config.int4_group_size == config.text_config.int4_group_size


def test_blocks_at_both_places_must_agree():
    given = config_dict(quantized=True)
    given["quantization_config"] = copy.deepcopy(QUANTIZATION)
    given["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    with pytest.raises(ValueError, match="quantization_config"):
        KimiK26Config(**given)


def test_quantization_can_be_taken_off_and_put_on():
    config = KimiK26Config(**config_dict(quantized=True))
    config.text_config.expert_quantization = None
    assert config.text_config.int4_group_size is None
    assert KimiK26Config(**config.to_dict()).text_config.int4_group_size is None
    plain = KimiK26Config(**config_dict())
    plain.text_config.expert_quantization = copy.deepcopy(QUANTIZATION)
    assert KimiK26Config(**plain.to_dict()).text_config.int4_group_size == 8
    top = KimiK26Config(**config_dict(), quantization_config=copy.deepcopy(QUANTIZATION))
    top.text_config.expert_quantization = None
    assert "quantization_config" not in str(written(top))
    inside = KimiK26Config(**config_dict(quantized=True))
    inside.text_config.expert_quantization["config_groups"]["group_0"]["weights"]["group_size"] = 16
    assert KimiK26Config(**inside.to_dict()).text_config.int4_group_size == 16


@pytest.mark.parametrize("vision", [{}, {"vision_config": None}])
def test_without_a_vision_part(vision, tmp_path):
    given = config_dict(vision=False) | vision
    config = KimiK26Config(**given)
    assert config.vision_config is None
    assert ("vision_config" in written(config)) == bool(vision)
    config.save_pretrained(tmp_path)
    assert KimiK26Config.from_pretrained(tmp_path).vision_config is None


def test_parts_may_be_objects():
    text, vision = KimiK26TextConfig(**tiny_models.TEXT), KimiK26VisionConfig(**tiny_models.VISION)
    given = {k: v for k, v in config_dict().items() if k not in ("text_config", "vision_config")}
    config = KimiK26Config(text_config=text, vision_config=vision, **given)
    assert written(config)["text_config"]["hidden_size"] == 32
    assert KimiK26Config(**config.to_dict()).vision_config.vt_hidden_size == 16


def test_auto_config_reads_a_folder_with_code(tmp_path):
    for file in ROOT.glob("*_k26.py"):
        shutil.copy(file, tmp_path)
    given = config_dict(quantized=True) | {"auto_map": {"AutoConfig": "configuration_kimi_k26.KimiK26Config"}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config).__name__ == "KimiK26Config" and type(config).__module__.startswith("transformers_modules")
    assert contains(written(config), given)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True) == config


def test_a_change_is_written_and_read():
    config = KimiK26Config(**config_dict(quantized=True))
    config.text_config.num_experts_per_tok = 2
    config.text_config.rope_scaling = {"type": "linear", "factor": 2.0}
    config.eos_token_id = [98, 97]
    config.note = "mine"
    config.vision_config.vt_num_hidden_layers = 1
    file = written(config)
    assert file["text_config"]["num_experts_per_tok"] == 2 and file["vision_config"]["vt_num_hidden_layers"] == 1
    assert file["text_config"]["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert "rope_parameters" not in file["text_config"]
    again = KimiK26Config(**file)
    assert again.eos_token_id == [98, 97] and again.note == "mine" and again != KimiK26Config(**config_dict())
    assert again.text_config.rope_scaling["factor"] == 2.0


def test_a_change_inside_a_value_is_written():
    config = KimiK26Config(**config_dict())
    config.text_config.rope_scaling["factor"] = 4.0
    assert written(config)["text_config"]["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_in_its_old_and_new_name(key):
    given = config_dict()
    del given["dtype"]
    config = KimiK26Config(**given, **{key: "bfloat16"})
    assert config.dtype == torch.bfloat16 and written(config)[key] == "bfloat16"
    config.dtype = torch.float16
    assert written(config)[key] == "float16"
    assert len({"dtype", "torch_dtype"} & set(written(config))) == 1
    assert KimiK26Config(**given, **{key: torch.float32}).to_dict()[key] == "float32"


def test_copies():
    config = KimiK26Config(**config_dict(quantized=True))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), KimiK26Config.from_dict(config.to_dict())):
        assert again == config and written(again) == written(config)
        assert again.text_config.int4_group_size == 8 and again.text_config is not config.text_config
        again.text_config.hidden_size = 64
        assert again != config
    assert config != config.text_config and "hidden_size" in repr(config)


def test_from_dict_takes_changes():
    config, unused = KimiK26Config.from_dict(config_dict(), ignore_index=-1, return_unused_kwargs=True, other=3)
    assert config.ignore_index == -1 and unused == {"other": 3}


def test_defaults_of_generation_do_not_come_from_the_config(golden):
    # The published text part carries temperature, top_k and the like at their old defaults.
    config = KimiK26Config.from_pretrained(golden / "vocab")
    generation = GenerationConfig.from_model_config(config)
    assert generation.eos_token_id == 163586 and generation.bos_token_id == 163584 and generation.pad_token_id == 163839
    assert generation.temperature in (None, 1.0) and generation.do_sample in (None, False)


WRONG = [
    ("text_config.vocab_size", 0),
    ("text_config.hidden_size", -1),
    ("text_config.hidden_size", 32.5),
    ("text_config.hidden_size", "32"),
    ("text_config.hidden_size", True),
    ("text_config.num_hidden_layers", None),
    ("text_config.num_key_value_heads", 2),
    ("text_config.q_lora_rank", 0),
    ("text_config.qk_rope_head_dim", 3),
    ("text_config.topk_method", "greedy"),
    ("text_config.scoring_func", "softmax"),
    ("text_config.hidden_act", "gelu"),
    ("text_config.n_group", 3),
    ("text_config.n_group", 8),
    ("text_config.topk_group", 2),
    ("text_config.num_experts_per_tok", 9),
    ("text_config.num_experts_per_tok", 0),
    ("text_config.norm_topk_prob", 1),
    ("text_config.routed_scaling_factor", float("nan")),
    ("text_config.rms_norm_eps", 0),
    ("text_config.attention_dropout", 1.0),
    ("text_config.attention_bias", "no"),
    ("text_config.first_k_dense_replace", -1),
    ("text_config.moe_layer_freq", 0),
    ("text_config.tie_word_embeddings", True),
    ("text_config.eos_token_id", 100),
    ("text_config.eos_token_id", []),
    ("text_config.eos_token_id", [1, -1]),
    ("text_config.pad_token_id", "99"),
    ("text_config.dtype", "float31"),
    ("text_config.model_type", "llama"),
    ("text_config.rope_theta", 0),
    ("text_config.rope_scaling", "yarn"),
    ("text_config.rope_scaling.type", "llama3"),
    ("text_config.rope_scaling.factor", None),
    ("text_config.rope_scaling.factor", "8"),
    ("text_config.rope_scaling.original_max_position_embeddings", 0),
    ("text_config.rope_scaling.mscale_all_dim", -1.0),
    ("text_config.rope_scaling.beta_fast", "fast"),
    ("text_config.quantization_config", []),
    ("text_config.quantization_config.quant_method", "gptq"),
    ("text_config.quantization_config.format", "int-quantized"),
    ("text_config.quantization_config.config_groups", {}),
    ("text_config.quantization_config.config_groups.group_0.weights", None),
    ("text_config.quantization_config.config_groups.group_0.weights.num_bits", 8),
    ("text_config.quantization_config.config_groups.group_0.weights.symmetric", False),
    ("text_config.quantization_config.config_groups.group_0.weights.strategy", "channel"),
    ("text_config.quantization_config.config_groups.group_0.weights.group_size", 12),
    ("text_config.quantization_config.config_groups.group_0.weights.actorder", "weight"),
    ("text_config.quantization_config.config_groups.group_0.input_activations", {"num_bits": 8}),
    ("text_config.moe_intermediate_size", 12),
    ("vision_config.patch_size", 0),
    ("vision_config.vt_num_attention_heads", 3),
    ("vision_config.vt_hidden_size", 12),
    ("vision_config.mm_hidden_size", 8),
    ("vision_config.text_hidden_size", 31),
    ("vision_config.merge_kernel_size", [2]),
    ("vision_config.merge_kernel_size", 2),
    ("vision_config.merge_type", "mean"),
    ("vision_config.pos_emb_type", "learned"),
    ("vision_config.mm_projector_type", "mlp"),
    ("vision_config.projector_hidden_act", "relu"),
    ("vision_config.model_type", "clip"),
    ("vision_config", "none"),
    ("text_config", [1]),
    ("text_config", []),
    ("media_placeholder_token_id", 100),
    ("media_placeholder_token_id", None),
    ("ignore_index", "-100"),
    ("video_placeholder", ""),
    ("use_unified_vision_chunk", "yes"),
    ("tie_word_embeddings", True),
    ("model_type", "gpt2"),
    ("eos_token_id", -2),
    ("eos_token_id", [1, 100]),
    ("pad_token_id", 100),
    ("bos_token_id", 100),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={value!r}"[-60:] for path, value in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(path, value):
    with pytest.raises(ValueError) as error:
        KimiK26Config(**changed(path, value))
    message = str(error.value)
    key = path.rsplit(".", 1)[-1]
    assert key in message and " must be " in message and "got " in message
    if not isinstance(value, (dict, list)) and path not in ("vision_config",):
        assert repr(value) in message


def test_the_unchanged_dict_behind_the_wrong_ones_is_right():
    assert KimiK26Config(**config_dict(quantized=True)).text_config.int4_group_size == 8


def test_the_model_leaves_the_names_in_the_file(tmp_path):
    given = config_dict(quantized=True, model_type="deepseek_v3") | {"architectures": ["KimiK25ForConditionalGeneration"]}
    model = KimiK26ForConditionalGeneration(KimiK26Config(**given))
    model.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    assert contains(file, given)


@pytest.mark.parametrize("given", ["eager", "sdpa", {"text_config": "eager", "vision_config": "sdpa"}])
def test_attention_implementation_reaches_the_parts(given):
    config = KimiK26Config(**config_dict(), attn_implementation=given)
    model = KimiK26ForConditionalGeneration(config)
    text, vision = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    assert [text, vision] == (list(given.values()) if isinstance(given, dict) else [given, given])
    assert "attn_impl" not in str(written(config))


def test_attention_implementation_by_default():
    model = KimiK26ForConditionalGeneration(KimiK26Config(**config_dict()))
    assert {part._attn_implementation for part in (model.config, model.config.text_config, model.config.vision_config)} == {"sdpa"}
