"""The published `config.json` of Kimi-K2.5 and Kimi-K2.6: read, checked, and written back unchanged.

Other engines serve the same folder, so a config that was read keeps everything it was read from: the key order and
spelling of the file do not matter, but no key, value, `model_type` or `architectures` entry is lost on the way back.
"""

import copy
import math
from typing import Any, Optional

import torch
from transformers import PretrainedConfig


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


# A rule is (predicate, what is allowed, in words).
MOST = 2**31  # of what is counted
POSITIVE_INT = (lambda v: _is_int(v) and 0 < v < MOST, "a positive integer")
COUNT = (lambda v: _is_int(v) and 0 <= v < MOST, "an integer of at least 0")
COUNT_OR_NONE = (lambda v: v is None or COUNT[0](v), "an integer of at least 0, or null")
POSITIVE_INT_OR_NONE = (lambda v: v is None or POSITIVE_INT[0](v), "a positive integer, or null")
POSITIVE_NUMBER = (lambda v: _is_number(v) and v > 0, "a positive number")
NUMBER_FROM_0 = (lambda v: _is_number(v) and v >= 0, "a number of at least 0")
PROBABILITY = (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)")
BOOLEAN = (lambda v: isinstance(v, bool), "true or false")
INTEGER = (_is_int, "an integer")
STRING = (lambda v: isinstance(v, str) and bool(v), "a non-empty string")
TOKEN_ID = (lambda v: v is None or _is_int(v) and v >= 0, "a token id (an integer of at least 0), or null")
TOKEN_IDS = (
    lambda v: v is None
    or _is_int(v)
    and v >= 0
    or isinstance(v, (list, tuple))
    and len(v) > 0
    and all(_is_int(i) and i >= 0 for i in v),
    "a token id, a list of token ids, or null",
)
DTYPE = (
    lambda v: v is None or isinstance(v, torch.dtype) or isinstance(getattr(torch, str(v), None), torch.dtype),
    "the name of a torch dtype, such as 'bfloat16'",
)
KERNEL = (
    lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(map(POSITIVE_INT[0], v)),
    "two positive integers (rows, columns)",
)


def one_of(*values):
    return (lambda v: v in values and type(v) in {type(x) for x in values}, "one of " + ", ".join(map(repr, values)))


class _PublishedConfig(PretrainedConfig):
    """A config that is checked on the way in and complete on the way out.

    Subclasses give `fields`: key -> (default, rule). Keys that are not listed are kept as they are.
    """

    fields = {}  # not annotated: transformers 5 would take it for a dataclass field
    # Keys of the file that the library would act upon in ways that do not fit this model. They stay in the file.
    not_attributes = ("_attn_implementation", "architectures", "model_type", "transformers_version")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers 5 makes each subclass a dataclass, which brings an `__init__` and an `__eq__` of its own.
        cls.__init__, cls.__eq__ = _PublishedConfig.__init__, _PublishedConfig.__eq__

    def __init__(self, **kwargs):
        # What the file said. Everything the library adds or drops is measured against it in `to_dict`.
        from_library = ("attn_implementation", "experts_implementation", "name_or_path", "_commit_hash")
        source = copy.deepcopy({k: v for k, v in kwargs.items() if k not in from_library})
        if "dtype" not in kwargs and "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs["torch_dtype"]
        kwargs.pop("torch_dtype", None)
        for key, (default, _) in self.fields.items():
            kwargs.setdefault(key, copy.deepcopy(default))
        self._check(kwargs)
        own = {k: copy.deepcopy(kwargs.pop(k)) for k in self.fields if k != "dtype"}
        own_tokens = {k: v for k, v in own.items() if k.endswith("_token_id")}
        generation = _generation_defaults()
        rest = {k: v for k, v in kwargs.items() if k not in self.not_attributes and k not in generation}
        rest.pop("tie_word_embeddings", None)
        super().__init__(**rest, tie_word_embeddings=False, **own_tokens)
        for key, value in own.items():
            setattr(self, key, value)
        if kwargs.get("attn_implementation") is not None:  # the parts were not there when the library set it
            self._attn_implementation = kwargs["attn_implementation"]
        self._read(source)
        self.architectures = source.get("architectures", self.default_architectures)
        self.model_type = source.get("model_type", type(self).model_type)
        self._source = source
        self._baseline = None
        self._baseline = self._library_dict()

    def _read(self, source: dict[str, Any]):
        """Take from the file what is no attribute of its own name."""

    def _check(self, values: dict[str, Any]):
        """Raise `ValueError` for the first value that the model cannot be built from."""
        for key, (_, (allowed, words)) in self.fields.items():
            if not allowed(values[key]):
                raise ValueError(f"{self.where}{key} must be {words}, got {values[key]!r}")
        model_types = self.model_types
        if values.get("model_type", model_types[0]) not in model_types:
            allowed = ", ".join(map(repr, model_types))
            raise ValueError(f"{self.where}model_type must be one of {allowed}, got {values['model_type']!r}")

    def _require(self, condition: bool, key: str, words: str, value):
        if not condition:
            raise ValueError(f"{self.where}{key} must be {words}, got {value!r}")

    def _library_dict(self) -> dict[str, Any]:
        """The attributes as plain JSON values, without what is not part of a config file."""
        aside = ("_source", "_baseline", *self.sub_configs)
        hidden = {k: self.__dict__.pop(k) for k in aside if k in self.__dict__}
        values = super().to_dict()
        self.__dict__.update(hidden)
        return {k: v for k, v in values.items() if k not in self.not_attributes and not k.startswith("_")}

    def to_dict(self) -> dict[str, Any]:
        """This config as the published file has it: what was read, with every later change on top.

        Returns:
            `dict[str, Any]`: JSON values; `dtype` as a string.
        """
        now = self._library_dict()
        if self._baseline is None:  # the library asks while it is still building the object
            return now
        written = {}
        for key in self.fields:
            value = getattr(self, key)
            written[key] = str(value).removeprefix("torch.") if key == "dtype" else copy.deepcopy(value)
        if written.get("dtype") == "None":
            del written["dtype"]
        if self.default_architectures is not None:
            written["architectures"] = self.default_architectures
            written["model_type"] = type(self).model_type
        written.update(copy.deepcopy(self._source))
        for key, value in now.items():
            if key not in self._baseline or self._baseline[key] != value:
                written[key] = value
        if "torch_dtype" in self._source:  # the old name of the same key: keep one of them
            written["torch_dtype"] = written.pop("dtype", written["torch_dtype"])
        for key in ("dtype", "torch_dtype"):
            if isinstance(written.get(key), torch.dtype):
                written[key] = str(written[key]).removeprefix("torch.")
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: leaving out what equals a library default would lose what the file said."""
        return self.to_dict()

    def __eq__(self, other):
        return type(self) is type(other) and self.to_dict() == other.to_dict()


def _generation_defaults() -> set[str]:
    """Names of the generation parameters that old config files carry; they belong to `generation_config.json`."""
    from transformers import GenerationConfig

    names = set(GenerationConfig().to_dict()) | {"tf_legacy_loss", "use_bfloat16"}
    return names - {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions"} - {
        "output_hidden_states",
        "transformers_version",
    }


class KimiK26TextConfig(_PublishedConfig):
    """The text decoder (`text_config` of the published file).

    Every key of the published file is an attribute of the same name; the defaults are the published values. The
    quantization block, when there is one, is `expert_quantization` (a dict): under the name it has in the file the
    library would start a quantizer of its own and unpack every word.

    Raises:
        ValueError: naming the key, what is allowed, and what was given.
    """

    model_type = "kimi_k2"
    model_types = ("kimi_k2", "deepseek_v3")
    base_config_key = "text_config"
    default_architectures = ["DeepseekV3ForCausalLM"]
    not_attributes = (*_PublishedConfig.not_attributes, "quantization_config", "expert_quantization")
    keys_to_ignore_at_inference = ["past_key_values"]
    where = "text_config."
    rope_scaling = None  # an attribute as any other: transformers 5 has a property over `rope_parameters` here
    fields = {
        "vocab_size": (163840, POSITIVE_INT),
        "hidden_size": (7168, POSITIVE_INT),
        "intermediate_size": (18432, POSITIVE_INT),
        "moe_intermediate_size": (2048, POSITIVE_INT),
        "num_hidden_layers": (61, POSITIVE_INT),
        "num_attention_heads": (64, POSITIVE_INT),
        "num_key_value_heads": (64, POSITIVE_INT),
        "n_shared_experts": (1, COUNT_OR_NONE),
        "n_routed_experts": (384, POSITIVE_INT_OR_NONE),
        "routed_scaling_factor": (2.827, POSITIVE_NUMBER),
        "kv_lora_rank": (512, POSITIVE_INT),
        "q_lora_rank": (1536, POSITIVE_INT_OR_NONE),
        "qk_rope_head_dim": (64, POSITIVE_INT),
        "qk_nope_head_dim": (128, POSITIVE_INT),
        "v_head_dim": (128, POSITIVE_INT),
        "topk_method": ("noaux_tc", one_of("noaux_tc")),
        "n_group": (1, POSITIVE_INT),
        "topk_group": (1, POSITIVE_INT),
        "num_experts_per_tok": (8, POSITIVE_INT),
        "moe_layer_freq": (1, POSITIVE_INT),
        "first_k_dense_replace": (1, COUNT),
        "norm_topk_prob": (True, BOOLEAN),
        "scoring_func": ("sigmoid", one_of("sigmoid")),
        "aux_loss_alpha": (0.001, NUMBER_FROM_0),
        "seq_aux": (True, BOOLEAN),
        "hidden_act": ("silu", one_of("silu")),
        "max_position_embeddings": (262144, POSITIVE_INT),
        "initializer_range": (0.02, POSITIVE_NUMBER),
        "rms_norm_eps": (1e-5, POSITIVE_NUMBER),
        "use_cache": (True, BOOLEAN),
        "pad_token_id": (163839, TOKEN_ID),
        "bos_token_id": (163584, TOKEN_ID),
        "eos_token_id": (163586, TOKEN_IDS),
        "tie_word_embeddings": (False, one_of(False)),
        "rope_theta": (50000.0, (lambda v: _is_number(v) and 1 < v < 1e18, "a number above 1")),
        "rope_scaling": (
            {
                "type": "yarn",
                "factor": 64.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            (lambda v: v is None or isinstance(v, dict), "a dict, or null"),
        ),
        "attention_bias": (False, BOOLEAN),
        "attention_dropout": (0.0, PROBABILITY),
        "num_nextn_predict_layers": (0, COUNT),
        "dtype": ("bfloat16", DTYPE),
    }

    def _check(self, values):
        # transformers 5 writes both rotary keys as one: `rope_parameters`.
        if "rope_parameters" in values:
            raise ValueError(
                "text_config.rope_parameters is not a key of this model's files: give rope_theta and rope_scaling"
            )
        super()._check(values)
        v, need = values, self._require
        heads = v["num_attention_heads"]
        need(v["num_key_value_heads"] == heads, "num_key_value_heads", f"num_attention_heads ({heads})", v["num_key_value_heads"])
        need(v["qk_rope_head_dim"] % 2 == 0, "qk_rope_head_dim", "even", v["qk_rope_head_dim"])
        if v["n_routed_experts"] is not None:
            experts, groups, kept = v["n_routed_experts"], v["n_group"], v["topk_group"]
            need(experts % groups == 0, "n_group", f"a divisor of n_routed_experts ({experts})", groups)
            need(kept <= groups, "topk_group", f"at most n_group ({groups})", kept)
            need(groups == 1 or experts // groups >= 2, "n_group", "such that each group has two experts or more", groups)
            room = experts // groups * kept
            used = v["num_experts_per_tok"]
            need(used <= room, "num_experts_per_tok", f"at most the {room} experts of the chosen groups", used)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = v[key] if isinstance(v[key], (list, tuple)) else [v[key]]
            need(all(i is None or i < v["vocab_size"] for i in ids), key, f"below vocab_size ({v['vocab_size']})", v[key])
        self._check_rope(v["rope_scaling"])
        if v.get("quantization_config") is not None:
            self._check_quantization(v["quantization_config"], v)

    def _check_rope(self, rope):
        if rope is None:
            return
        kind = rope.get("rope_type", rope.get("type"))
        self._require(kind in ("yarn", "linear", "default"), "rope_scaling.type", "one of 'yarn', 'linear', 'default'", kind)
        keys = {"yarn": ("factor", "original_max_position_embeddings"), "linear": ("factor",), "default": ()}[kind]
        for key in keys:
            value = rope.get(key)
            self._require(_is_number(value) and 0 < value < 1e9, f"rope_scaling.{key}", "a positive number", value)
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = rope.get(key, 1.0)
            self._require(_is_number(value) and 0 <= value < 1e9, f"rope_scaling.{key}", "a number of at least 0", value)

    def _check_quantization(self, block, values):
        need, name = self._require, "quantization_config"
        need(isinstance(block, dict), name, "a dict", block)
        need(block.get("quant_method") == "compressed-tensors", f"{name}.quant_method", "'compressed-tensors'", block.get("quant_method"))
        need(block.get("format") == "pack-quantized", f"{name}.format", "'pack-quantized'", block.get("format"))
        groups = block.get("config_groups")
        need(isinstance(groups, dict) and len(groups) == 1, f"{name}.config_groups", "a dict of one group", groups)
        group_name, group = next(iter(groups.items()))
        weights = group.get("weights") if isinstance(group, dict) else None
        where = f"{name}.config_groups.{group_name}.weights"
        need(isinstance(weights, dict), where, "a dict", weights)
        wanted = {"num_bits": (4,), "type": ("int",), "strategy": ("group",), "symmetric": (True,), "actorder": (None, False)}
        for key, allowed in wanted.items():
            value = weights.get(key)
            need(any(value is a or value == a and type(value) is type(a) for a in allowed), f"{where}.{key}", repr(allowed[0]), value)
        size = weights.get("group_size")
        need(_is_int(size) and size > 0 and size % 8 == 0, f"{where}.group_size", "a positive multiple of 8", size)
        for key in ("hidden_size", "moe_intermediate_size"):
            need(values[key] % size == 0, key, f"a multiple of the quantization group size ({size})", values[key])
        for key in ("input_activations", "output_activations"):
            need(group.get(key) is None, f"{name}.config_groups.{group_name}.{key}", "null", group.get(key))

    def _read(self, source):
        self._read_block(source.get("quantization_config"))

    def _read_block(self, block):
        self._block_read, self.expert_quantization = copy.deepcopy(block), copy.deepcopy(block)

    def to_dict(self) -> dict[str, Any]:
        written = super().to_dict()
        if self._block_changed:
            written["quantization_config"] = copy.deepcopy(self.expert_quantization)
            if self.expert_quantization is None:
                del written["quantization_config"]
        return written

    @property
    def _block_changed(self) -> bool:
        return self.expert_quantization != self._block_read

    @property
    def int4_group_size(self) -> Optional[int]:
        """Inputs per scale in the routed experts, or `None` when they are not quantized."""
        if self.expert_quantization is None:
            return None
        return next(iter(self.expert_quantization["config_groups"].values()))["weights"]["group_size"]

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` has routed experts (else a dense feed-forward network)."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key of one head; the library knows by it that cached keys and values differ in width."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores: `qk_head_dim ** -0.5`, times the square of YaRN's `0.1 m ln(factor) + 1`.

        Source: YaRN (arXiv:2309.00071), section 3.4, with `m = mscale_all_dim`.
        """
        scale = self.qk_head_dim**-0.5
        rope = self.rope_scaling or {}
        if rope.get("mscale_all_dim") and rope.get("factor", 1.0) > 1.0:
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
        return scale


class KimiK26VisionConfig(_PublishedConfig):
    """The vision tower and its projector (`vision_config` of the published file).

    Raises:
        ValueError: naming the key, what is allowed, and what was given.
    """

    model_type = "kimi_k25_vision"
    model_types = ("kimi_k25_vision", "moonvit3d", "moonvit", "")
    base_config_key = "vision_config"
    default_architectures = None
    where = "vision_config."
    fields = {
        "patch_size": (14, POSITIVE_INT),
        "init_pos_emb_height": (64, POSITIVE_INT),
        "init_pos_emb_width": (64, POSITIVE_INT),
        "init_pos_emb_time": (4, POSITIVE_INT),
        "pos_emb_type": ("divided_fixed", one_of("divided_fixed")),
        "vt_num_attention_heads": (16, POSITIVE_INT),
        "vt_num_hidden_layers": (27, POSITIVE_INT),
        "vt_hidden_size": (1152, POSITIVE_INT),
        "vt_intermediate_size": (4304, POSITIVE_INT),
        "merge_kernel_size": ([2, 2], KERNEL),
        "video_attn_type": ("spatial_temporal", one_of("spatial_temporal")),
        "merge_type": ("sd2_tpool", one_of("sd2_tpool")),
        "mm_projector_type": ("patchmerger", one_of("patchmerger")),
        "mm_hidden_size": (1152, POSITIVE_INT),
        "projector_hidden_act": ("gelu", one_of("gelu")),
        "projector_ln_eps": (1e-5, POSITIVE_NUMBER),
        "text_hidden_size": (7168, POSITIVE_INT),
    }

    def _check(self, values):
        super()._check(values)
        hidden, heads = values["vt_hidden_size"], values["vt_num_attention_heads"]
        self._require(hidden % heads == 0, "vt_num_attention_heads", f"a divisor of vt_hidden_size ({hidden})", heads)
        # Each head holds pairs that turn by column and pairs that turn by row: multiples of four.
        self._require(hidden // heads % 4 == 0, "vt_hidden_size", "four times a multiple of vt_num_attention_heads", hidden)
        self._require(values["mm_hidden_size"] == hidden, "mm_hidden_size", f"vt_hidden_size ({hidden})", values["mm_hidden_size"])


def _of_text(name: str) -> property:
    """What is the text decoder's, under the same name of the whole."""
    return property(lambda self: getattr(self.text_config, name), lambda self, value: setattr(self.text_config, name, value))


class KimiK26Config(_PublishedConfig):
    """The published `config.json`: a text decoder, and a vision tower unless `vision_config` is absent or null.

    Args:
        text_config (`dict` or [`KimiK26TextConfig`], *optional*): the text decoder; published values where absent.
        vision_config (`dict` or [`KimiK26VisionConfig`], *optional*): the vision tower; without it the model is
            text only. `KimiK26Config.published()` gives both parts.
        media_placeholder_token_id (`int`): the token that stands for one media feature.
        quantization_config (`dict`, *optional*): the block as some copies have it, at top level. It counts as the
            text decoder's own, and is written back where it stood.

    Raises:
        ValueError: naming the key, what is allowed, and what was given.
    """

    model_type = "kimi_k25"
    model_types = ("kimi_k25", "kimi_k26")
    default_architectures = ["KimiK25ForConditionalGeneration"]
    sub_configs = {"text_config": KimiK26TextConfig, "vision_config": KimiK26VisionConfig}
    # What the Trainer does not gather: batches without pictures have no `image_hidden_states`.
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    where = ""
    # The library would start a quantizer of its own for a top-level block and unpack every word.
    not_attributes = (*_PublishedConfig.not_attributes, "quantization_config")
    fields = {
        "bos_token_id": (163584, TOKEN_ID),
        "eos_token_id": (163586, TOKEN_IDS),
        "pad_token_id": (163839, TOKEN_ID),
        "ignore_index": (-100, INTEGER),
        "media_placeholder_token_id": (163605, COUNT),
        "tie_word_embeddings": (False, one_of(False)),
        "use_unified_vision_chunk": (True, BOOLEAN),
        "video_placeholder": ("<|kimi_k25_video_placeholder|>", STRING),
        "dtype": ("bfloat16", DTYPE),
    }

    def _check(self, values):
        super()._check(values)
        given = values.get("text_config")
        text = self._part("text_config", {} if given is None else given)
        vision = self._part("vision_config", values.get("vision_config"))
        block = values.get("quantization_config")
        need = self._require
        if block is not None:
            text._check_quantization(block, text.to_dict())
            inside = text.expert_quantization
            if inside is None:
                text._read_block(block)
            same = inside is None or inside["config_groups"] == block["config_groups"]
            need(same, "quantization_config.config_groups", "the same as in text_config", block["config_groups"])
        size, pad = text.vocab_size, values["media_placeholder_token_id"]
        need(pad < size, "media_placeholder_token_id", f"below text_config.vocab_size ({size})", pad)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = values[key] if isinstance(values[key], (list, tuple)) else [values[key]]
            # The published ids are the defaults, which a smaller vocabulary that names no others cannot have.
            below = values[key] == self.fields[key][0] or all(i is None or i < size for i in ids)
            need(below, key, f"below text_config.vocab_size ({size})", values[key])
        if vision is not None:
            width = vision.text_hidden_size
            need(width == text.hidden_size, "vision_config.text_hidden_size", f"text_config.hidden_size ({text.hidden_size})", width)
        values["text_config"], values["vision_config"] = text, vision

    def _part(self, name, part):
        kind = self.sub_configs[name]
        if isinstance(part, dict):
            return kind(**part)
        self._require(part is None or isinstance(part, kind), name, f"a dict or a {kind.__name__}", type(part).__name__)
        return part

    @classmethod
    def published(cls, **kwargs) -> "KimiK26Config":
        """The published model: 61 layers, 384 experts, and the vision tower (without a quantization block)."""
        return cls(text_config={}, vision_config={}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        from transformers import __version__

        written = super().to_dict()
        if self._baseline is None:
            return written
        if self.text_config._block_changed:  # it stands in text_config now, or nowhere
            written.pop("quantization_config", None)
        for name in self.sub_configs:
            part = getattr(self, name)
            if part is not None:
                written[name] = part.to_dict()
            elif name in written:
                written[name] = None
        written.setdefault("transformers_version", __version__)
        return written

    max_position_embeddings = _of_text("max_position_embeddings")
    vocab_size = _of_text("vocab_size")
    hidden_size = _of_text("hidden_size")
    num_hidden_layers = _of_text("num_hidden_layers")
