"""Config dicts and random models that several test files share."""

import copy

import torch

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration


MEDIA, EOS, PAD = 97, 98, 99

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TEXT = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "rope_scaling": YARN,
    "bos_token_id": 96,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
}

VISION = {
    "patch_size": 14,
    "init_pos_emb_height": 6,
    "init_pos_emb_width": 6,
    "init_pos_emb_time": 4,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 2,
    "vt_hidden_size": 16,
    "vt_intermediate_size": 24,
    "mm_hidden_size": 16,
    "text_hidden_size": 32,
}

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "actorder": None,
                "dynamic": False,
                "group_size": 8,
                "num_bits": 4,
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}


def config_dict(vision: bool = True, quantized: bool = False, **text) -> dict:
    """A whole `config.json`, with changes to the text part."""
    text = copy.deepcopy(TEXT) | text
    if quantized:
        text["quantization_config"] = copy.deepcopy(QUANTIZATION)
    written = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": 96,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "media_placeholder_token_id": MEDIA,
        "dtype": "float32",
        "text_config": text,
    }
    if vision:
        written["vision_config"] = copy.deepcopy(VISION) | {"text_hidden_size": text["hidden_size"]}
    return written


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights large enough for every part of the model to show in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight_packed"):
                parameter.copy_(torch.randint(-(2**31), 2**31, parameter.shape, generator=generator))
            elif name.endswith("weight_shape"):
                continue
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.2 * noise)
                elif name.endswith("weight_scale"):
                    parameter.copy_(0.02 + 0.01 * noise.abs())
                else:
                    parameter.copy_(noise * (0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2))
    return module


def make_model(attn: str = "eager", seed: int = 0, dtype=None, few_queries=None, **changes) -> KimiK26ForConditionalGeneration:
    """A random model in eval mode; `few_queries` forces attention on latents (large) or on expanded keys (0)."""
    config = KimiK26Config(**config_dict(**changes), attn_implementation=attn)
    model = fill(KimiK26ForConditionalGeneration(config).eval(), seed)
    with torch.no_grad():
        # At the size of the other weights the logits would be nearly flat: every choice would hang on rounding.
        model.language_model.lm_head.weight.mul_(6)
    if few_queries is not None:
        force_attention(model, few_queries)
    return model if dtype is None else model.to(dtype)


def force_attention(model, few_queries: int):
    for layer in model.language_model.model.layers:
        layer.self_attn.few_queries = few_queries
    return model


ON_LATENTS, ON_EXPANDED = 10**9, 0


def media_prompt(seed: int = 0, grids=((1, 4, 6), (3, 2, 4)), text: int = 5):
    """A prompt with clips of these grids: ids `(1, length)`, pixel values, grids."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(0, 90, (count,), generator=generator)

    pieces, patches = [words(text)], 0
    for frames, rows, columns in grids:
        pieces += [torch.full((rows * columns // 4,), MEDIA), words(2)]
        patches += frames * rows * columns
    pixels = torch.randn(patches, 3, 14, 14, generator=generator)
    return torch.cat(pieces).unsqueeze(0), pixels, torch.tensor(grids)


def words(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model, input_ids, steps: int, eos=None, **inputs) -> torch.Tensor:
    """Greedy continuation of one unpadded row written out: the whole text through the model for each new token."""
    for _ in range(steps):
        token = model(input_ids=input_ids, use_cache=False, **inputs).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, token), dim=1)
        if eos is not None and int(token) == eos:
            break
    return input_ids
