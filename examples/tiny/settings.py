"""The small model's config: the published one in miniature."""

from kimi_k26.cli.tiny import INT4_EXPERTS, SPECIAL_IDS, YARN

HIDDEN, VISION = 128, 128


def model_config(ranks: int, quantized: bool) -> dict:
    """`config.json` as a dict, for a vocabulary of so many byte-pair ranks; experts as INT4 words or plain."""
    ids = {"bos_token_id": ranks, "eos_token_id": ranks + 2, "pad_token_id": ranks + 255}
    text = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **ids,
        "dtype": "bfloat16",
        "vocab_size": ranks + SPECIAL_IDS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.827,
        "aux_loss_alpha": 0.001,
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
        text["quantization_config"] = INT4_EXPERTS
    vision = {
        "patch_size": 14,
        "init_pos_emb_height": 16,
        "init_pos_emb_width": 16,
        "init_pos_emb_time": 4,
        "merge_kernel_size": [2, 2],
        "vt_hidden_size": VISION,
        "vt_intermediate_size": 384,
        "vt_num_attention_heads": 4,
        "vt_num_hidden_layers": 3,
        "mm_hidden_size": VISION,
        "text_hidden_size": HIDDEN,
    }
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        **ids,
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": ranks + 21,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }
