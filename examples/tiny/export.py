"""From trained weights to a checkpoint folder in the published layout."""

import json
import shutil
from pathlib import Path

import torch

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.image_processing_kimi_k26 import KimiK26ImageProcessor

from .batches import make_batches
from .learning import StackedExperts, moe_layers
from .settings import model_config
from .vocabulary import encoding


@torch.no_grad()
def plain_model(state: dict, ranks: int, quantized: bool) -> KimiK26ForConditionalGeneration:
    """The published class with the weights of a run's `state`, in bfloat16; experts as INT4 words or plain."""
    config = KimiK26Config(**model_config(ranks, quantized))
    model = KimiK26ForConditionalGeneration(config).to(torch.bfloat16).eval()
    master = state["optimizer"]["master"]
    for name, parameter in model.named_parameters():
        if name in master:
            parameter.copy_(master[name])
    for at, layer in enumerate(moe_layers(model)):
        layer.gate.e_score_correction_bias.data.copy_(state["biases"][at])
        stacked = StackedExperts(config.text_config)
        prefix = f"language_model.model.layers.{at + config.text_config.first_k_dense_replace}.mlp.experts."
        for name, parameter in stacked.named_parameters():
            parameter.copy_(master[prefix + name])
        stacked.weigh(layer.experts)
    return model


def write_checkpoint(model: KimiK26ForConditionalGeneration, folder: Path, template: Path) -> None:
    """Weights, config and what generation and media need; the tokenizer's files are there already."""
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    shutil.copyfile(template, folder / "chat_template.jinja")
    KimiK26ImageProcessor().save_pretrained(folder)
    config = model.config
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def expert_use(model: KimiK26ForConditionalGeneration, ranks: dict[bytes, int], seed: int) -> float:
    """The tokens of the least used expert of any layer over its fair share, in new dialogues of all kinds."""
    chosen: dict[int, list[torch.Tensor]] = {}
    layers = moe_layers(model)
    hooks = [
        layer.gate.register_forward_hook(lambda _, __, out, at=at: chosen.setdefault(at, []).append(out[2].flatten()))
        for at, layer in enumerate(layers)
    ]
    for batch in make_batches(encoding(ranks), seed, -1, 0, 1, rows=300, parts=300):  # one dialogue each: no padding
        real = batch.ids[:, : int((batch.ids != len(ranks) + 255).sum())]
        media = {}
        if batch.clips:
            clips = sorted(
                (start, grid, patches)
                for grid, (pixels, starts) in batch.clips.items()
                for start, patches in zip(starts, pixels)
            )
            pixels = torch.cat([patches for _, _, patches in clips]).view(-1, 3, 14, 14).float() / 127.5 - 1
            media = {"pixel_values": pixels, "grid_thws": torch.tensor([grid for _, grid, _ in clips])}
        model(input_ids=real, use_cache=False, **media)
    for hook in hooks:
        hook.remove()
    experts = model.config.text_config.n_routed_experts
    loads = torch.stack([torch.bincount(torch.cat(parts), minlength=experts) for parts in chosen.values()]).float()
    return float((loads.min(1).values / loads.mean(1)).min())
