"""The small model's config: the published one in miniature."""

from kimi_k26.cli.tiny import tiny_config


def model_config(ranks: int, quantized: bool) -> dict:
    """`config.json` as a dict, for a vocabulary of so many byte-pair ranks; experts as INT4 words or plain. That of the demo's
    random checkpoint with more layers, and eyes for pictures of 16 by 16 patches."""
    config = tiny_config(ranks, quantized)
    config["text_config"] |= {"num_hidden_layers": 5, "intermediate_size": 384}
    config["vision_config"] |= {
        "init_pos_emb_height": 16,
        "init_pos_emb_width": 16,
        "vt_hidden_size": 128,
        "vt_intermediate_size": 384,
        "vt_num_hidden_layers": 3,
        "mm_hidden_size": 128,
    }
    return config
