"""The small random checkpoint, and the demo that shows it: what a new user runs first."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from kimi_k26.cli import main, tiny


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_ranks_are_a_byte_pair_vocabulary():
    ranks = tiny.learn_ranks(tiny.SAMPLE, tiny.MERGES)
    assert list(ranks.values()) == list(range(len(ranks))) and len(ranks) > 256
    for piece in list(ranks)[256:]:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        assert any(max(ranks.get(a, 10**9), ranks.get(b, 10**9)) < ranks[piece] for a, b in halves), piece
    assert b" there" in ranks
    assert len(tiny.learn_ranks("abab", 10)) == 257  # "ab", then no pair stands twice


def test_checkpoint_has_the_published_layout(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["model_type"] == "kimi_k25" and config["architectures"] == ["KimiK25ForConditionalGeneration"]
    assert config["text_config"]["quantization_config"]["format"] == "pack-quantized"
    found = tensors(tiny_checkpoint)
    expert = "language_model.model.layers.1.mlp.experts.0.down_proj"
    assert found[f"{expert}.weight_packed"].dtype == torch.int32
    assert found[f"{expert}.weight_packed"].shape == (128, 8) and found[f"{expert}.weight_scale"].shape == (128, 2)
    assert found[f"{expert}.weight_shape"].tolist() == [128, 64]
    assert f"{expert}.weight" not in found
    assert found["vision_tower.encoder.blocks.0.wqkv.weight"].dtype == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in found.values())
    specials = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert specials[str(config["eos_token_id"])]["content"] == "<|im_end|>"
    assert specials[str(config["media_placeholder_token_id"])]["content"] == "<|media_pad|>"
    assert specials[str(config["pad_token_id"])]["content"] == "[PAD]"
    for name in ("chat_template.jinja", "preprocessor_config.json", "generation_config.json", "modeling_kimi_k26.py"):
        assert (tiny_checkpoint / name).is_file()


def test_the_seed_decides_the_weights_and_nothing_else_random(tmp_path, tiny_checkpoint):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    same = tensors(tiny.make_tiny_checkpoint(tmp_path / "same"))
    assert torch.equal(torch.random.get_rng_state(), before)
    first = tensors(tiny_checkpoint)
    assert first.keys() == same.keys() and all(torch.equal(first[name], same[name]) for name in first)
    other = tensors(tiny.make_tiny_checkpoint(tmp_path / "other", quantized=False, seed=1))
    name = "language_model.model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])
    assert "language_model.model.layers.1.mlp.experts.0.down_proj.weight" in other


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert main(["demo", "--out", str(out)]) == 0
    return out, re.sub(r"\n {15,}", "", "\n".join(lines))  # long prompts in one line again


def test_demo_shows_text_picture_and_video(shown):
    out, text = shown
    assert (out / "picture.png").is_file() and (out / "video.mp4").is_file()
    # 336 x 224 pixels are 12 x 8 tokens; 6 frames of 224 x 168 are clips of 4 and 2 with 8 x 6 tokens each.
    assert re.findall(r"of which (\d+) stand", text) == ["96", "96", "192"]
    assert "<|media_begin|>image<|media_content|><|media_pad|>×96<|media_end|>" in text
    # Its 36 frames, 12 a second, are seen at 0, 7, 14, 21, 28 and 35; the second clip begins with the fifth.
    assert "00:00:00.000<|media_begin|>video" in text and "00:00:02.333<|media_begin|>video" in text
    assert "[[1, 16, 24]]" in text and "[[4, 12, 16], [2, 12, 16]]" in text
    assert "[[1, 16, 24], [4, 12, 16], [2, 12, 16]]" in text
    assert "(384, 3, 14, 14) float32" in text
    assert "<|im_assistant|>assistant<|im_middle|><think></think>" in text
    assert text.count("tokens in") == 4


def test_a_demo_that_cannot_write_says_so(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken" / "out")]) == 1
    assert "kimi-k26 demo: error:" in capsys.readouterr().err
