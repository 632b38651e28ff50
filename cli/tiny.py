"""A small random checkpoint in the published layout, for the demo and the tests: right in shape, wise in nothing."""

import json
import re
from collections import Counter
from pathlib import Path

from ..vocabulary_kimi import SPECIAL_IDS, write_ranks
from .attach import attach
from .quantize import BLOCK

MERGES = 256

# Offsets behind the byte-pair ranks, as published; the ids between are `<|reserved_token_N|>`. Markers of tools and
# thinking are part of what the model says, so they are not "special" and survive `skip_special_tokens`.
CONTROL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    254: "[UNK]",
    255: "[PAD]",
}
SPOKEN_TOKENS = {
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    22: "<think>",
    23: "</think>",
}

# As published.
YARN = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

SAMPLE = """
What is in this picture? There is a red circle to the left of a blue square. How many figures are there? There are three.
Which way does the ball move in the video? It moves from the left to the right, and after two seconds it stops there.
The user asks what the weather is like today, so the assistant thinks about it and then answers in a few short words.
这张图片里有什么？这张图片里有一个红色的圆和一个蓝色的正方形。视频里的球从左边移动到右边。
"""


def learn_ranks(text: str, merges: int) -> dict[bytes, int]:
    """Byte-pair ranks learnt from a text: the 256 bytes, then the most frequent pair again and again.

    Args:
        text: What to learn from.
        merges: How many pairs to join at most; fewer where the text holds no pair twice any more.

    Returns:
        Rank by piece, as a tiktoken vocabulary has it.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in re.findall(r" ?\w+|\s+|[^\w\s]+", text))
    while len(ranks) < 256 + merges:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        (left, right), count = max(pairs.items(), key=lambda item: (item[1], item[0]), default=((b"", b""), 0))
        if count < 2:
            break
        ranks.setdefault(left + right, len(ranks))
        joined: Counter = Counter()
        for word, count in words.items():
            pieces: list[bytes] = []
            for piece in word:
                if pieces and (pieces[-1], piece) == (left, right):
                    pieces[-1] = left + right
                else:
                    pieces.append(piece)
            joined[tuple(pieces)] += count
        words = joined
    return ranks


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, ranks: dict[bytes, int]) -> None:
    """Writes `tiktoken.model` and `tokenizer_config.json` of a small vocabulary, in the published form."""
    write_ranks(ranks, folder / "tiktoken.model")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(len(ranks) + offset): {"content": content, **plain, "special": offset in CONTROL_TOKENS}
        for offset, content in sorted((CONTROL_TOKENS | SPOKEN_TOKENS).items())
    }
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [t for t in CONTROL_TOKENS.values() if t not in named.values()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "tokenizer_class": "TikTokenTokenizer",
        **named,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    _write_json(folder / "tokenizer_config.json", config)


def tiny_config(first_special: int, quantized: bool) -> dict:
    """The published config in small: 3 layers, the first dense; 16 experts, 4 per token; 2 vision blocks."""
    ids = {"bos_token_id": first_special, "eos_token_id": first_special + 2, "pad_token_id": first_special + 255}
    text = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **ids,
        "dtype": "bfloat16",
        "vocab_size": first_special + SPECIAL_IDS,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 262144,
        "rope_theta": 50000.0,
        "rope_scaling": YARN,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if quantized:
        text["quantization_config"] = BLOCK
    vision = {
        "patch_size": 14,
        "init_pos_emb_height": 8,
        "init_pos_emb_width": 8,
        "init_pos_emb_time": 4,
        "merge_kernel_size": [2, 2],
        "vt_hidden_size": 64,
        "vt_intermediate_size": 172,
        "vt_num_attention_heads": 4,
        "vt_num_hidden_layers": 2,
        "mm_hidden_size": 64,
        "text_hidden_size": 128,
    }
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        **ids,
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": first_special + 21,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def make_tiny_checkpoint(folder: str | Path, quantized: bool = True, seed: int = 0) -> Path:
    """Writes a small checkpoint with random weights in the published layout, and attaches this project's code to it.

    Args:
        folder: Where; made where it is missing.
        quantized: Routed experts as INT4 words; otherwise all weights are bfloat16.
        seed: Of the weights. The same seed gives the same weights.

    Returns:
        The folder.
    """
    import torch

    from .. import KimiK26Config, KimiK26ForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learn_ranks(SAMPLE, MERGES)
    write_tokenizer(folder, ranks)
    config = tiny_config(len(ranks), quantized)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KimiK26ForConditionalGeneration(KimiK26Config(**config)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("eos_token_id", "pad_token_id")})
    attach(folder)
    return folder
