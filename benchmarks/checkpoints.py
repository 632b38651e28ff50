"""What the benchmarks run on: a random checkpoint in the published layout, and the same as transformers 5 wants it.

    python benchmarks/checkpoints.py FOLDER [--size mid|small|vision] [--plain] [--seed N]

`mid` has 0.79 B parameters: heads as wide as published, 8 layers, 64 experts of which each token uses 8. `vision` has a
vision tower of the published size, before a text model that is hardly there. Weights are random, scaled so that activations keep their size from layer to layer; what the model says is noise.
"""

import argparse
import copy
import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path


FIRST_SPECIAL = {"mid": 3840, "small": 256, "vision": 256}  # ids of text end here
SIZES = {  # changes to the smallest config there is: text part, vision part
    "small": ({}, {}),
    "vision": (
        {},
        {
            "init_pos_emb_height": 64,
            "init_pos_emb_width": 64,
            "vt_hidden_size": 1152,
            "vt_intermediate_size": 4304,
            "vt_num_attention_heads": 16,
            "vt_num_hidden_layers": 27,
            "mm_hidden_size": 1152,
        },
    ),
    "mid": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 8,
            "intermediate_size": 2816,
            "moe_intermediate_size": 512,
            "n_routed_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 384,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        {
            "init_pos_emb_height": 64,
            "init_pos_emb_width": 64,
            "vt_hidden_size": 128,
            "vt_intermediate_size": 344,
            "vt_num_hidden_layers": 3,
            "mm_hidden_size": 128,
            "text_hidden_size": 1024,
        },
    ),
}


def make_checkpoint(folder: Path, size: str = "mid", quantized: bool = True, seed: int = 0) -> Path:
    """Write a random checkpoint: config and bfloat16 shards, without a tokenizer. The same seed gives the same weights.

    Args:
        size: a key of `SIZES`.
        quantized: routed experts as INT4 words.
    """
    import torch

    from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
    from kimi_k26.cli.tiny import tiny_config

    written = tiny_config(FIRST_SPECIAL[size], quantized)
    for part, changes in zip(("text_config", "vision_config"), SIZES[size]):
        written[part] |= changes
    config, before = KimiK26Config(**written), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = KimiK26ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight_packed", "weight_scale", "weight_shape")):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if is_norm(name) else noise * deviation(name, parameter.shape))
        for module in model.modules():
            if hasattr(module, "set_weight"):
                module.weight_shape.copy_(torch.tensor([module.out_features, module.in_features]))
                noise = torch.randn(module.out_features, module.in_features, generator=generator)
                module.set_weight((noise * module.in_features**-0.5).bfloat16())
    model.save_pretrained(folder, max_shard_size="300MB")
    return Path(folder)


def is_norm(name: str) -> bool:
    return "norm" in name and name.endswith("weight")


def deviation(name: str, shape) -> float:
    """Of a random weight: outputs of a product as large as its inputs, small biases, embeddings of size 1."""
    if "embed_tokens" in name:
        return 1.0
    return prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.05


@dataclass
class Tensor:
    """Where a tensor lies: `dtype` as safetensors writes it, first byte and length in bytes."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    nbytes: int


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by name, from the headers of its files."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            found[name] = Tensor(path, entry["dtype"], entry["shape"], 8 + length + first, end - first)
    if not found:
        raise FileNotFoundError(f"{folder}: no *.safetensors files here")
    return found


def as_transformers_has_it(folder: Path, target: Path) -> bool:
    """Links to the shards of `folder` in `target`, beside a config under the names of transformers 5's own `kimi_k25`.

    Returns:
        Whether the experts are INT4 words.
    """
    config = json.loads((folder / "config.json").read_text())
    text, vision = copy.deepcopy(config["text_config"]), config["vision_config"]
    quantization = text.pop("quantization_config", None)
    text["model_type"] = "deepseek_v3"
    names = {
        "patch_size": "patch_size",
        "hidden_size": "vt_hidden_size",
        "intermediate_size": "vt_intermediate_size",
        "num_attention_heads": "vt_num_attention_heads",
        "num_hidden_layers": "vt_num_hidden_layers",
        "pos_emb_height": "init_pos_emb_height",
        "pos_emb_width": "init_pos_emb_width",
        "pos_emb_time": "init_pos_emb_time",
        "merge_kernel_size": "merge_kernel_size",
    }
    written = {
        "model_type": "kimi_k25",
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "dtype": config["dtype"],
        "tie_word_embeddings": False,
        "image_token_id": config["media_placeholder_token_id"],
        "video_token_id": text["vocab_size"],  # an id that no text has
        "projection_hidden_size": vision["vt_hidden_size"],
        "text_config": text,
        "vision_config": {"model_type": "kimi_k25_vision"} | {theirs: vision[ours] for theirs, ours in names.items()},
    }
    if quantization is not None:
        written["quantization_config"] = quantization
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(written))
    for path in folder.glob("*.safetensors*"):
        os.symlink(path.resolve(), target / path.name)
    return quantization is not None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--plain", action="store_true", help="bfloat16 experts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.folder, args.size, not args.plain, args.seed)
    print(f"{sum(tensor.nbytes for tensor in tensors_of(args.folder).values()) / 2**20:.0f} MiB in {args.folder}")
