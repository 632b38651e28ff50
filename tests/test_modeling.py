"""The whole model: golden logits, the published layout, saving, precision, devices, loss, errors."""

import copy
import io
import itertools
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.utils import logging as library_logging

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.tests.tiny_models import (
    MEDIA,
    ON_EXPANDED,
    ON_LATENTS,
    config_dict,
    force_attention,
    make_model,
    media_prompt,
    words,
)


WAYS = {"latents": ("eager", ON_LATENTS), "eager": ("eager", ON_EXPANDED), "sdpa": ("sdpa", ON_EXPANDED)}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
every_checkpoint = pytest.mark.parametrize("name", ["tiny-fp32", "tiny-int4"])
BAR = {"rtol": 0, "atol": 2e-4}


def published_tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def load(folder, way=("sdpa", None), **kwargs):
    model = KimiK26ForConditionalGeneration.from_pretrained(folder, attn_implementation=way[0], **kwargs)
    return model if way[1] is None else force_attention(model, way[1])


def inputs_of(expected: dict, case: str, *without) -> dict:
    """The inputs of a golden case; anything but these names."""
    aside = {"logits", "features", "output_ids", *without}
    return {k.split(".")[1]: v for k, v in expected.items() if k.split(".")[0] == case and k.split(".")[1] not in aside}


CASES = ["text", "padded", "padded, positions counted", "far", "image", "video"]


def golden_case(expected, case):
    inputs = inputs_of(expected, case.split(",")[0], *(["position_ids"] if "counted" in case else []))
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return inputs, kept, expected[f"{case.split(',')[0]}.logits"]


@every_checkpoint
@every_way
@torch.no_grad()
def test_golden_logits(golden, name, way):
    model, expected = load(golden / name, way), load_file(golden / name / "expected.safetensors")
    assert not model.training and model.dtype == torch.float32
    for case in CASES:
        inputs, kept, logits = golden_case(expected, case)
        for use_cache in (True, False):
            out = model(**inputs, use_cache=use_cache)
            torch.testing.assert_close(out.logits[kept], logits[kept], **BAR, msg=lambda m: f"{case}: {m}")
            assert (out.past_key_values is not None) == use_cache
    for case in ("image", "video"):
        pixels, grids = expected[f"{case}.pixel_values"], expected[f"{case}.grid_thws"]
        torch.testing.assert_close(model.get_image_features(pixels, grids), expected[f"{case}.features"], **BAR)


def in_pieces(model, inputs, cuts):
    """Logits of inputs that are fed piece by piece through a cache; pictures go with the pieces their tokens are in."""
    inputs, cache, logits, used = dict(inputs), None, [], 0
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    features = None
    if "pixel_values" in inputs:
        features = model.get_image_features(inputs["pixel_values"], inputs["grid_thws"])
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1])):
        piece, given = ids[:, start:stop], {}
        count = int((piece == model.config.media_placeholder_token_id).sum()) if features is not None else 0
        if count:
            given["media_features"], used = features[used : used + count], used + count
        if mask is not None:
            given["attention_mask"] = mask[:, :stop]
        if positions is not None:
            given["position_ids"] = positions[:, start:stop]
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **given)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@every_checkpoint
@every_way
@torch.no_grad()
def test_golden_logits_from_a_cache(golden, name, way):
    model, expected = load(golden / name, way), load_file(golden / name / "expected.safetensors")
    generator = torch.Generator().manual_seed(1)
    for case in CASES:
        inputs, kept, logits = golden_case(expected, case)
        length = kept.shape[1]
        some = sorted({int(i) for i in torch.randint(1, length, (4,), generator=generator)})
        for cuts in (range(1, length), some):
            if way[0] == "sdpa" and len(cuts) > 4:
                continue
            out = in_pieces(model, inputs, tuple(cuts))
            torch.testing.assert_close(out[kept], logits[kept], **BAR, msg=lambda m: f"{case}, {cuts}: {m}")


@every_checkpoint
@torch.no_grad()
def test_golden_greedy(golden, name):
    model, expected = load(golden / name), load_file(golden / name / "expected.safetensors")
    ids, wanted = expected["greedy.input_ids"], expected["greedy.output_ids"]
    new = wanted.shape[1] - ids.shape[1]
    new = new if new > 0 and torch.equal(wanted[:, : ids.shape[1]], ids) else wanted.shape[1]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    assert torch.equal(out[:, -wanted.shape[1] :], wanted)


def manifest_tensors(manifest) -> dict[str, tuple]:
    found = {}
    for pattern in manifest["patterns"]:
        axes = {k: range(pattern[k][0], pattern[k][1] + 1) for k in ("layer", "expert", "block") if k in pattern}
        for place in itertools.product(*axes.values()):
            name = pattern["name"].format(**dict(zip(axes, place)))
            found[name] = (pattern["shape"], pattern["dtype"])
    return found


@pytest.mark.once
def test_published_layout_on_meta(golden):
    manifest = json.loads((golden / "checkpoint_manifest.json").read_text())
    config = KimiK26Config.from_pretrained(golden / "vocab")
    with torch.device("meta"):
        model = KimiK26ForConditionalGeneration._from_config(config)
    tensors = model.state_dict()
    mine = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    assert len(mine) == manifest["tensors"] == 208_550
    assert mine == manifest_tensors(manifest)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == manifest["total_bytes"]
    assert {t.device.type for t in tensors.values()} == {"meta"} and not list(model.buffers())


def same_bits(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@every_checkpoint
@pytest.mark.parametrize("shard", ["5GB", "300KB"])
def test_saving_gives_back_every_bit(golden, name, shard, tmp_path):
    model = load(golden / name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard == "300KB")
    same_bits(published_tensors(tmp_path), published_tensors(golden / name))
    with safe_open(tmp_path / files[0], "pt") as file:
        assert file.metadata()["format"] == "pt"
    again = load(tmp_path)
    same_bits(again.state_dict(), model.state_dict())
    ids = words(1, 9)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


KEPT = ("weight_scale", "weight_packed", "weight_shape", "e_score_correction_bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["loading", "after"])
def test_casts_leave_what_is_packed(golden, dtype, when, tmp_path):
    folder = golden / "tiny-int4"
    model = load(folder, dtype=dtype) if when == "loading" else load(folder).to(dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    saved, published = published_tensors(tmp_path), published_tensors(folder)
    kept = {name for name in published if name.endswith(KEPT)}
    assert len(kept) == 2 * (16 * 3 * 3 + 1)
    same_bits({k: saved[k] for k in kept}, {k: published[k] for k in kept})
    assert {saved[k].dtype for k in saved.keys() - kept} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        logits = load(tmp_path)(input_ids=words(1, 9)).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_way
@torch.no_grad()
def test_low_precision_forward(dtype, way):
    model, (ids, pixels, grids) = make_model(*way[:1], dtype=dtype, few_queries=way[1], quantized=True), media_prompt()
    logits = model(input_ids=ids, pixel_values=pixels, grid_thws=grids).logits
    exact = make_model(quantized=True)(input_ids=ids, pixel_values=pixels, grid_thws=grids).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert (logits.float() - exact).abs().mean() < 0.15 * exact.abs().mean()


def test_a_new_model_has_sensible_weights():
    model = KimiK26ForConditionalGeneration(KimiK26Config(**config_dict(quantized=True)))
    for name, tensor in model.state_dict().items():
        assert tensor.float().isfinite().all(), name
    expert = model.language_model.model.layers[1].mlp.experts[0].up_proj
    assert 0.015 < expert.dequantize(torch.float32).std() < 0.025 and expert.weight_shape.tolist() == [16, 32]
    assert not model.language_model.model.layers[1].mlp.gate.e_score_correction_bias.any()
    ids = words(1, 9)
    assert model(input_ids=ids, labels=ids).loss < 6


@every_way
def test_outputs(way):
    model = make_model(way[0], few_queries=way[1])
    ids, pixels, grids = media_prompt()
    given = {"input_ids": ids, "pixel_values": pixels, "grid_thws": grids}
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        plain, out = model(**given), model(**given, **asked)
    length = ids.shape[1]
    torch.testing.assert_close(out.logits, plain.logits)
    assert plain.hidden_states is plain.attentions is plain.router_logits is plain.loss is None
    assert len(out.hidden_states) == 4 and all(x.shape == (1, length, 32) for x in out.hidden_states)
    assert torch.equal(model.language_model.lm_head(out.hidden_states[-1]), out.logits)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(out.hidden_states[0][ids != MEDIA], embeds[ids != MEDIA])
    assert torch.equal(out.hidden_states[0][ids == MEDIA], out.image_hidden_states)
    layer = model.language_model.model.layers[0]
    assert layer.self_attn.few_queries == way[1] and len(out.attentions) == 3
    for weights in out.attentions:
        assert weights.shape == (1, 4, length, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, length))
    assert len(out.router_logits) == 2 and all(x.shape == (length, 8) for x in out.router_logits)
    assert model(**given, return_dict=False)[0].shape == plain.logits.shape
    assert len(model(**given, return_dict=False, labels=ids)) == 4  # loss, logits, cache, features


@torch.no_grad()
def test_outputs_asked_for_in_the_config():
    model = make_model()
    model.config.output_hidden_states = True
    model.config.text_config.output_router_logits = True
    out = model(input_ids=words(2, 5))
    assert len(out.hidden_states) == 4 and out.router_logits[0].shape == (10, 8)
    model.config.text_config.use_cache = False
    assert model(input_ids=words(2, 5)).past_key_values is None


@torch.no_grad()
def test_logits_to_keep():
    model, ids = make_model(), words(2, 9)
    whole = model(input_ids=ids).logits
    for kept, columns in ((0, slice(None)), (1, slice(8, 9)), (4, slice(5, 9)), (torch.tensor([0, 7]), [0, 7])):
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, columns])


def plain_loss(logits, labels, ignore=-100):
    losses = []
    for row, wanted in zip(logits, labels):
        for scores, label in zip(row[:-1], wanted[1:].tolist()):
            if label != ignore:
                losses.append(-scores.double().log_softmax(-1)[label])
    return sum(losses) / len(losses)


@every_way
def test_loss(way):
    model = make_model(way[0], few_queries=way[1])
    ids, pixels, grids = media_prompt()
    labels = ids.masked_fill(ids == MEDIA, -100)
    for mode in (model.eval, model.train):
        mode()
        out = model(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=labels)
        torch.testing.assert_close(out.loss.double(), plain_loss(out.logits, labels), rtol=1e-5, atol=1e-6)
    out.loss.backward()
    for name in ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.2.weight", "language_model.lm_head.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0
    assert model.vision_tower.patch_embed.pos_emb.weight.grad.abs().sum() > 0
    model.config.ignore_index = 7
    labels = labels.masked_fill(labels == -100, 7)
    again = model(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=labels)
    torch.testing.assert_close(again.loss.double(), plain_loss(again.logits, labels, 7), rtol=1e-5, atol=1e-6)
    summed = model(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=labels, num_items_in_batch=5)
    count = int((labels[:, 1:] != 7).sum())
    torch.testing.assert_close(summed.loss * 5, again.loss * count)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_gradient_checkpointing(reentrant, quantized):
    ids, pixels, grids = media_prompt()
    model = make_model(quantized=quantized).train()

    def gradients():
        model.zero_grad()
        out = model(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=ids)
        out.loss.backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    runs, layer = [], model.language_model.model.layers[1].self_attn
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    out, found = gradients()
    handle.remove()
    assert len(runs) == 2 and out.past_key_values is None and plain.past_key_values is not None
    torch.testing.assert_close(out.loss, plain.loss)
    assert expected.keys() == found.keys()
    torch.testing.assert_close(found, expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and gradients()[0].past_key_values is not None


def test_dropout_only_while_training():
    model, ids = make_model(attention_dropout=0.5), words(1, 12)
    for few in (ON_LATENTS, ON_EXPANDED):
        for attn in ("eager", "sdpa"):
            force_attention(model, few).set_attn_implementation(attn)
            torch.manual_seed(0)
            first, second = model.train()(input_ids=ids).logits, model(input_ids=ids).logits
            assert not torch.equal(first, second)
            assert torch.equal(model.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_everything_can_be_asked_to_train():
    model = make_model(quantized=True)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.endswith(KEPT)}


def test_embeddings_can_be_exchanged_and_grow():
    model, ids = make_model(), words(1, 6)
    before = model(input_ids=ids).logits
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (100, 32)
    grown = model.resize_token_embeddings(104)
    assert grown is model.get_input_embeddings() and model.get_output_embeddings().weight.shape == (104, 32)
    assert model.config.text_config.vocab_size == model.config.vocab_size == model.vocab_size == 104
    torch.testing.assert_close(model(input_ids=ids).logits[..., :100], before)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    fresh = torch.nn.Embedding(104, 32)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    assert json.loads(model.config.to_json_string())["text_config"]["vocab_size"] == 104


@torch.no_grad()
def test_copies():
    model, ids = make_model(quantized=True), words(1, 6)
    logits = model(input_ids=ids).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids).logits, logits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = make_model(quantized=True, seed=5)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(input_ids=ids).logits, logits)


def echo_attention(module, query, key, value, attention_mask, **kwargs):
    raise RuntimeError("the registered function was asked")


AttentionInterface.register("echo_attention", echo_attention)


@torch.no_grad()
def test_attention_can_be_exchanged_at_run_time():
    model = force_attention(make_model("eager"), ON_EXPANDED)
    ids, pixels, grids = media_prompt()
    given = {"input_ids": ids, "pixel_values": pixels, "grid_thws": grids}
    before = model(**given).logits
    model.set_attn_implementation("sdpa")
    assert model.config.vision_config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "echo_attention"})
    assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="was asked"):
        model(**given)


@torch.no_grad()
def test_attention_by_parts_at_loading(golden):
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    model = load(golden / "tiny-int4", (chosen, None))
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    default = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4")
    assert default.config.text_config._attn_implementation == "sdpa"


LAYERS = "language_model.model.layers"
MAPS = {
    "cpu": {"": "cpu"},
    "auto": "auto",
    "one layer on disk": {
        "vision_tower": "cpu", "mm_projector": "cpu", "language_model.model.embed_tokens": "cpu", f"{LAYERS}.0": "cpu",
        f"{LAYERS}.1": "disk", f"{LAYERS}.2": "cpu", "language_model.model.norm": "cpu", "language_model.lm_head": "cpu",
    },
    "most on disk": {
        "vision_tower": "disk", "mm_projector": "disk", "language_model.model.embed_tokens": "cpu", f"{LAYERS}.0": "disk",
        f"{LAYERS}.1": "disk", f"{LAYERS}.2": "cpu", "language_model.model.norm": "cpu", "language_model.lm_head": "disk",
    },
    "all on disk": {"": "disk"},
}


@every_checkpoint
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS.keys())
@torch.no_grad()
def test_placement(golden, name, places, tmp_path):
    model, expected = load(golden / name), load_file(golden / name / "expected.safetensors")
    placed = load(golden / name, device_map=places, offload_folder=tmp_path)
    if "disk" in str(places) and len(places) > 1:
        assert any(p.device.type == "meta" for p in placed.parameters())
        placed.save_pretrained(tmp_path / "again")  # reads what is on disk
        same_bits(published_tensors(tmp_path / "again"), published_tensors(golden / name))
    inputs, _, _ = golden_case(expected, "video")
    for few in (ON_LATENTS, ON_EXPANDED):
        force_attention(model, few), force_attention(placed, few)
        torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)


def test_masks_follow_a_layer_to_its_device():
    """With layers on several devices the library moves what a layer is given by its `to`."""
    from kimi_k26.attention_kimi_k26 import AttentionSpan

    span = AttentionSpan(torch.arange(3), 0, torch.tensor([[0, 1, 1]]), None)
    assert span.to("cpu") is span
    moved = span.to("meta", non_blocking=True)
    assert moved.rows(0, 3, 3).device.type == "meta" and moved is span.to("meta")


def test_inputs_that_do_not_fit():
    model = make_model()
    ids, pixels, grids = media_prompt()  # 6 + 2 media tokens
    with pytest.raises(ValueError, match=r"8 media tokens.*6 features"):
        model(input_ids=ids, pixel_values=pixels[:24], grid_thws=grids[:1])
    with pytest.raises(ValueError, match=r"0 media tokens.*8 features"):
        model(input_ids=words(1, 5), pixel_values=pixels, grid_thws=grids)
    with pytest.raises(ValueError, match=r"prompt has 8 media tokens.*6 features"):
        model.generate(ids, pixel_values=pixels[:24], grid_thws=grids[:1], max_new_tokens=1)
    with pytest.raises(ValueError, match="grid_thws"):
        model(input_ids=ids, pixel_values=pixels)
    with pytest.raises(ValueError, match="grid_thws"):
        model.generate(ids, pixel_values=pixels, max_new_tokens=1)
    with pytest.raises(ValueError, match="not both"):
        model(input_ids=ids, pixel_values=pixels, grid_thws=grids, media_features=torch.zeros(8, 32))
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match=r"covers 4 tokens.*6.*0 in the cache and 6 new"):
        model(input_ids=words(1, 6), attention_mask=torch.ones(1, 4))
    cache = model(input_ids=words(1, 6)).past_key_values
    with pytest.raises(ValueError, match=r"covers 2 tokens.*8.*6 in the cache and 2 new"):
        model(input_ids=words(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)


def test_a_text_model_refuses_pictures():
    model = make_model(vision=False)
    ids, pixels, grids = media_prompt()
    assert model.vision_tower is None and not any("vision" in name for name, _ in model.named_parameters())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="no vision part"):
            call(input_ids=ids, pixel_values=pixels, grid_thws=grids)


def test_past_the_last_position_is_warned_of(caplog):
    library_logging.get_logger("transformers").propagate = True
    model, warned = make_model(max_position_embeddings=16), "max_position_embeddings"
    model(input_ids=words(1, 16))
    assert warned not in caplog.text
    model(input_ids=words(1, 17))
    assert warned in caplog.text and "17" in caplog.text


@torch.no_grad()
def test_embeddings_instead_of_ids():
    model = make_model()
    ids, pixels, grids = media_prompt()
    embeds = model.get_input_embeddings()(ids)
    by_ids = model(input_ids=ids, pixel_values=pixels, grid_thws=grids).logits
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels, grid_thws=grids).logits, by_ids)
    features = model.get_image_features(pixels, grids)
    assert torch.equal(model(input_ids=ids, media_features=features).logits, by_ids)
    ready = embeds.masked_scatter((ids == MEDIA).unsqueeze(-1), features)
    assert torch.equal(model(inputs_embeds=ready).logits, by_ids)


@torch.no_grad()
def test_media_of_a_batch_go_to_their_rows():
    model, prompts = make_model(), [media_prompt(1, [(1, 4, 4)], 9), media_prompt(2, [(2, 2, 4), (1, 2, 2)], 2)]
    length = max(ids.shape[1] for ids, _, _ in prompts)
    ids = torch.cat([F.pad(ids, (length - ids.shape[1], 0), value=99) for ids, _, _ in prompts])
    pixels, grids = (torch.cat(parts) for parts in list(zip(*prompts))[1:])
    out = model(input_ids=ids, attention_mask=(ids != 99).long(), pixel_values=pixels, grid_thws=grids).logits
    for row, (one, some, sizes) in zip(out, prompts):
        alone = model(input_ids=one, pixel_values=some, grid_thws=sizes).logits[0]
        torch.testing.assert_close(row[-one.shape[1] :], alone, rtol=1e-4, atol=1e-4)
