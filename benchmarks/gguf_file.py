"""The text part of a checkpoint as a GGUF file, so that llama.cpp computes with the same weights.

    python benchmarks/gguf_file.py CHECKPOINT OUT.gguf        # takes `gguf` and NumPy, no torch

INT4 experts become Q4_0, whose blocks of 32 inputs with one float16 scale hold the same values exactly; norms and the
router become float32; all else stays bfloat16. Keys and values are read apart from `kv_b_proj`, as llama.cpp wants them
to attend to latents. There is no vocabulary in the file: it takes and gives token ids.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from checkpoints import Tensor, tensors_of


ARCHITECTURE = "deepseek2"  # llama.cpp's name for this kind of decoder
BLOCK = 32  # inputs to a scale in Q4_0
DTYPES = {"BF16": np.uint16, "F32": np.float32, "I32": np.uint32}


def read(tensor: Tensor) -> np.ndarray:
    """A tensor's values; bfloat16 as its bits, uint16."""
    return np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.start, tuple(tensor.shape))


def as_float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return np.array(values)
    return (values.astype(np.uint32) << 16).view(np.float32)


def q4_0(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """INT4 words as blocks of Q4_0.

    Args:
        words: `(outputs, inputs / 8)` uint32, eight values to a word, lowest bits first.
        scales: `(outputs, groups)` float32; a group is one or more blocks of 32 inputs.

    Returns:
        `(outputs, inputs / 32 * 18)` uint8: per block a float16 scale, then 16 bytes, of which the low halves are the
        first 16 values and the high halves the last 16; both formats store a value plus 8.

    Raises:
        ValueError: where groups are smaller than a block, or a scale has no float16 of the same value.
    """
    outputs, blocks = words.shape[0], words.shape[1] * 8 // BLOCK
    if blocks % scales.shape[1]:
        raise ValueError(f"{scales.shape[1]} groups of scales cannot be shared by {blocks} blocks of {BLOCK} inputs")
    scales = scales.repeat(blocks // scales.shape[1], axis=1)
    halves = scales.astype(np.float16)
    if not (halves.astype(np.float32) == scales).all():
        raise ValueError("a scale of the INT4 words has no float16 of the same value")
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    values = (words[..., None] >> shifts & 15).astype(np.uint8).reshape(outputs, blocks, 2, BLOCK // 2)
    packed = values[:, :, 0] | values[:, :, 1] << 4
    return np.concatenate((halves[..., None].view(np.uint8), packed), axis=-1).reshape(outputs, -1)


class Writer:
    """Puts the tensors of a checkpoint under llama.cpp's names."""

    def __init__(self, folder: Path, out: Path):
        import gguf

        self.types = gguf.GGMLQuantizationType
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        self.tensors = tensors_of(folder)
        self.file = gguf.GGUFWriter(str(out), ARCHITECTURE)
        self.sigmoid, self.yarn = gguf.ExpertGatingFuncType.SIGMOID, gguf.RopeScalingType.YARN

    def get(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise KeyError(f"{name}: not in the checkpoint")
        return read(self.tensors[name])

    def float32(self, target: str, name: str):
        self.file.add_tensor(target, as_float32(self.get(name)))

    def bfloat16(self, target: str, values: np.ndarray):
        values = np.ascontiguousarray(values)
        self.file.add_tensor(target, values.view(np.uint8), raw_dtype=self.types.BF16)

    def write(self):
        self.describe()
        model = "language_model.model."
        self.bfloat16("token_embd.weight", self.get(f"{model}embed_tokens.weight"))
        self.float32("output_norm.weight", f"{model}norm.weight")
        self.bfloat16("output.weight", self.get("language_model.lm_head.weight"))
        for number in range(self.config["num_hidden_layers"]):
            here, there = f"{model}layers.{number}.", f"blk.{number}."
            self.attention(here, there)
            self.feed_forward(here, there, number)
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()

    def describe(self):
        config, file = self.config, self.file
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        file.add_tokenizer_model("none")
        file.add_vocab_size(config["vocab_size"])
        file.add_context_length(config["max_position_embeddings"])
        file.add_block_count(config["num_hidden_layers"])
        file.add_embedding_length(config["hidden_size"])
        file.add_feed_forward_length(config["intermediate_size"])
        file.add_layer_norm_rms_eps(config["rms_norm_eps"])
        # Attention is over latents: one key of all heads, as wide as latent and rotary key together.
        file.add_head_count(config["num_attention_heads"])
        file.add_head_count_kv(1)
        file.add_q_lora_rank(config["q_lora_rank"])
        file.add_kv_lora_rank(rank)
        file.add_key_length(rank + rope)
        file.add_value_length(rank)
        file.add_key_length_mla(config["qk_nope_head_dim"] + rope)
        file.add_value_length_mla(config["v_head_dim"])
        file.add_leading_dense_block_count(config["first_k_dense_replace"])
        file.add_expert_count(config["n_routed_experts"])
        file.add_expert_used_count(config["num_experts_per_tok"])
        file.add_expert_shared_count(config["n_shared_experts"])
        file.add_expert_feed_forward_length(config["moe_intermediate_size"])
        file.add_expert_weights_scale(config["routed_scaling_factor"])
        file.add_expert_weights_norm(config.get("norm_topk_prob", True))
        file.add_expert_gating_func(self.sigmoid)
        file.add_rope_dimension_count(rope)
        file.add_rope_freq_base(config["rope_theta"])
        yarn = config.get("rope_scaling")
        if yarn is not None:
            file.add_rope_scaling_type(self.yarn)
            file.add_rope_scaling_factor(yarn["factor"])
            file.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
            file.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])

    def attention(self, here: str, there: str):
        config, own = self.config, f"{here}self_attn."
        self.float32(f"{there}attn_norm.weight", f"{here}input_layernorm.weight")
        self.float32(f"{there}attn_q_a_norm.weight", f"{own}q_a_layernorm.weight")
        self.float32(f"{there}attn_kv_a_norm.weight", f"{own}kv_a_layernorm.weight")
        names = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a_mqa": "kv_a_proj_with_mqa", "output": "o_proj"}
        for target, name in names.items():
            self.bfloat16(f"{there}attn_{target}.weight", self.get(f"{own}{name}.weight"))
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        both = self.get(f"{own}kv_b_proj.weight").reshape(heads, nope + config["v_head_dim"], config["kv_lora_rank"])
        self.bfloat16(f"{there}attn_k_b.weight", both[:, :nope].transpose(0, 2, 1))
        self.bfloat16(f"{there}attn_v_b.weight", both[:, nope:])

    def feed_forward(self, here: str, there: str, number: int):
        own, names = f"{here}mlp.", ("gate", "up", "down")
        self.float32(f"{there}ffn_norm.weight", f"{here}post_attention_layernorm.weight")
        if number < self.config["first_k_dense_replace"]:
            for name in names:
                self.bfloat16(f"{there}ffn_{name}.weight", self.get(f"{own}{name}_proj.weight"))
            return
        self.float32(f"{there}ffn_gate_inp.weight", f"{own}gate.weight")
        self.float32(f"{there}exp_probs_b.bias", f"{own}gate.e_score_correction_bias")
        for name in names:
            self.bfloat16(f"{there}ffn_{name}_shexp.weight", self.get(f"{own}shared_experts.{name}_proj.weight"))
            experts = [f"{own}experts.{k}.{name}_proj." for k in range(self.config["n_routed_experts"])]
            target = f"{there}ffn_{name}_exps.weight"
            if f"{experts[0]}weight_packed" in self.tensors:
                scales = (as_float32(self.get(f"{expert}weight_scale")) for expert in experts)
                blocks = [q4_0(self.get(f"{expert}weight_packed"), scale) for expert, scale in zip(experts, scales)]
                self.file.add_tensor(target, np.stack(blocks), raw_dtype=self.types.Q4_0)
            else:
                self.bfloat16(target, np.stack([self.get(f"{expert}weight") for expert in experts]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    Writer(args.checkpoint, args.out).write()
