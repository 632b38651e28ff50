"""Generation in every mode and cache against a greedy loop written out, with pictures and clips."""

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kimi_k26 import KimiK26Config
from kimi_k26.tests.tiny_models import EOS, MEDIA, ON_EXPANDED, ON_LATENTS, PAD, greedy, make_model, media_prompt, words


NEAR = {"rtol": 1e-4, "atol": 1e-4}
NEW = 8


@pytest.fixture(scope="module")
def model():
    made = make_model("sdpa")
    made.generation_config.eos_token_id = None  # every continuation has its full length
    made.generation_config.pad_token_id = PAD
    return made


def prompt(kind: str):
    """Ids and what goes with them: text alone, or with pictures and clips."""
    if kind == "text":
        return words(1, 11), {}
    ids, pixels, grids = media_prompt()
    return ids, {"pixel_values": pixels, "grid_thws": grids}


kinds = pytest.mark.parametrize("kind", ["text", "media"])


def batch(prompts):
    """Left-padded ids, mask and media of several prompts."""
    length = max(ids.shape[1] for ids, _ in prompts)
    ids = torch.cat([F.pad(ids, (length - ids.shape[1], 0), value=PAD) for ids, _ in prompts])
    media = [given for _, given in prompts if given]
    given = {key: torch.cat([m[key] for m in media]) for key in ("pixel_values", "grid_thws")} if media else {}
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **given}


def three_prompts(kind):
    if kind == "text":
        return [(words(1, length, seed=length), {}) for length in (4, 11, 7)]
    made = [media_prompt(1, [(1, 4, 4)], 9), media_prompt(2, [(2, 2, 4), (1, 2, 2)], 2)]
    return [(ids, {"pixel_values": p, "grid_thws": g}) for ids, p, g in made] + [(words(1, 5), {})]


def continued(model, prompts):
    return [greedy(model, ids, NEW, **given)[0, -NEW:] for ids, given in prompts]


# How to generate -> arguments. All of these must say what the loop says.
GREEDY = {
    "default": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "chunks of one": {"prefill_chunk_size": 1},
    "chunks of four": {"prefill_chunk_size": 4},
    "chunks longer than the prompt": {"prefill_chunk_size": 1000},
    "chunks, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": EOS},  # the library wants to know the end here
    "one beam of its own": {"num_beams": 1, "return_dict_in_generate": True, "output_logits": True},
}


def skip_offload_without_a_device(how):
    if how.get("cache_implementation") == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("the library's offloaded cache moves layers with streams of an accelerator, and there is none")


@kinds
@pytest.mark.parametrize("how", GREEDY.values(), ids=GREEDY.keys())
def test_greedy(model, kind, how):
    skip_offload_without_a_device(how)
    ids, given = prompt(kind)
    out = model.generate(ids, **given, max_new_tokens=NEW, do_sample=False, **how)
    out = out if isinstance(out, torch.Tensor) else out.sequences
    assert torch.equal(out, greedy(model, ids, NEW, how.get("eos_token_id"), **given))


@kinds
@pytest.mark.parametrize("how", GREEDY.values(), ids=GREEDY.keys())
def test_greedy_in_a_left_padded_batch(model, kind, how):
    skip_offload_without_a_device(how)
    if "prompt_lookup_num_tokens" in how:
        how = {"use_cache": True, "prompt_lookup_num_tokens": None}  # the library looks up one row at a time
    prompts = three_prompts(kind)
    out = model.generate(**batch(prompts), max_new_tokens=NEW, do_sample=False, **how)
    out = out if isinstance(out, torch.Tensor) else out.sequences
    for row, expected in zip(out, continued(model, prompts)):
        assert torch.equal(row[-NEW:], expected)


@kinds
@pytest.mark.parametrize("few", [ON_LATENTS, ON_EXPANDED])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_of_generation(kind, few, attn):
    model = make_model(attn, few_queries=few)
    model.generation_config.eos_token_id = None
    prompts = three_prompts(kind)
    out = model.generate(
        **batch(prompts), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    for i, (ids, given) in enumerate(prompts):
        whole = torch.cat((ids, out.sequences[i : i + 1, -NEW:]), dim=1)[:, :-1]
        # A token the model wrote is its own embedding, also where it is the media token.
        where = torch.zeros_like(whole, dtype=torch.bool)
        where[:, : ids.shape[1]] = ids == MEDIA
        embeds = model.get_input_embeddings()(whole)
        if given:
            embeds = model.put_media(embeds, where, model.get_image_features(**given))
        with torch.no_grad():
            expected = model(inputs_embeds=embeds, use_cache=False).logits[0, -NEW:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[i], expected, **NEAR)


@kinds
def test_the_end_stops_a_row(kind):
    model = make_model("sdpa")
    prompts = three_prompts(kind)
    model.generation_config.eos_token_id = None
    free = [greedy(model, ids, NEW, **given)[0, -NEW:] for ids, given in prompts]
    stop = int(free[0][2])
    out = model.generate(**batch(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=PAD)
    out = out[:, batch(prompts)["input_ids"].shape[1] :]
    for row, expected in zip(out, free):
        end = expected.tolist().index(stop) + 1 if stop in expected.tolist() else NEW
        assert torch.equal(row[:end], expected[:end]) and (row[end:] == PAD).all()
    assert model.generate(words(1, 4), max_length=6, min_new_tokens=2, eos_token_id=EOS).shape == (1, 6)


def plain_sampling(model, ids, steps, seed, **given):
    torch.manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **given).logits[:, -1]
        ids = torch.cat((ids, torch.multinomial((logits / 0.7).softmax(-1), 1)), dim=1)
    return ids


@kinds
def test_sampling(model, kind):
    ids, given = prompt(kind)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW}
    torch.manual_seed(3)
    out = model.generate(ids, **given, **sampling)
    assert torch.equal(out, plain_sampling(model, ids, NEW, 3, **given))
    torch.manual_seed(3)
    three = model.generate(ids, **given, **sampling, num_return_sequences=3)
    assert three.shape == (3, ids.shape[1] + NEW) and len({tuple(row) for row in three.tolist()}) > 1


@torch.no_grad()
def plain_beams(model, ids, beams, steps, **given):
    """Beam search over continuations of one length: the best sums of log-probabilities, best first."""
    found = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, row in found:
            scores = model(input_ids=row, use_cache=False, **given).logits[0, -1].log_softmax(-1)
            for token in scores.topk(beams).indices:
                grown.append((score + float(scores[token]), torch.cat((row, token.view(1, 1)), dim=1)))
        found = sorted(grown, key=lambda pair: pair[0], reverse=True)[:beams]
    return torch.cat([row for _, row in found])


BEAMS = {"default": {}, "static": {"cache_implementation": "static"}, "chunks": {"prefill_chunk_size": 3}, "no cache": {"use_cache": False}}


@kinds
@pytest.mark.parametrize("how", BEAMS.values(), ids=BEAMS.keys())
def test_beams(model, kind, how):
    ids, given = prompt(kind)
    asked = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, **how}
    expected = plain_beams(model, ids, 3, 5, **given)
    assert torch.equal(model.generate(ids, **given, **asked, num_return_sequences=3), expected)
    prompts = three_prompts(kind)
    out = model.generate(**batch(prompts), **asked)
    for row, (ids, given) in zip(out, prompts):
        assert torch.equal(row[-5:], plain_beams(model, ids, 3, 5, **given)[0, -5:])


@kinds
def test_beams_that_sample(model, kind):
    ids, given = prompt(kind)
    out = model.generate(ids, **given, num_beams=2, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    assert out.shape == (2, ids.shape[1] + 4) and torch.equal(out[:, : ids.shape[1]], ids.expand(2, -1))


@kinds
@pytest.mark.parametrize("assistant", ["itself", "other weights", "text only"])
def test_assisted(model, kind, assistant):
    ids, given = prompt(kind)
    if assistant == "itself":
        helper = model
    else:
        helper = make_model("sdpa", seed=7, vision=assistant != "text only", num_hidden_layers=1)
        helper.generation_config.eos_token_id = None
    out = model.generate(ids, **given, assistant_model=helper, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(model, ids, NEW, **given))


def test_lookup_may_copy_media_tokens(model):
    """The words before a picture stand again at the end, so that lookup proposes the picture's tokens as text."""
    ids, pixels, grids = media_prompt(3, [(1, 4, 6)], 5)
    ids = torch.cat((ids, words(1, 3), ids[:, 2:5]), dim=1)
    given = {"pixel_values": pixels, "grid_thws": grids}
    out = model.generate(ids, **given, prompt_lookup_num_tokens=4, max_new_tokens=NEW, do_sample=False, eos_token_id=EOS)
    assert torch.equal(out, greedy(model, ids, NEW, EOS, **given))


def caches(config):
    return {
        "dynamic": DynamicCache(),
        "dynamic, of the config": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=64),
        "static, just long enough": StaticCache(config=config, max_cache_len=24),
    }


@pytest.mark.parametrize("kind", caches(KimiK26Config.published()).keys())
@pytest.mark.parametrize("few", [ON_LATENTS, ON_EXPANDED])
@torch.no_grad()
def test_caches_by_hand(kind, few):
    """A left-padded batch with a picture through each cache class, in pieces."""
    model = make_model("sdpa", few_queries=few)
    prompts = [media_prompt(1, [(1, 4, 4)], 18), (words(1, 15), None, None)]
    ids = torch.cat([F.pad(one, (24 - one.shape[1], 0), value=PAD) for one, _, _ in prompts])
    assert ids.shape == (2, 24)
    mask, cache = (ids != PAD).long(), caches(model.config)[kind]
    features = model.get_image_features(*prompts[0][1:])
    whole = model(input_ids=ids, attention_mask=mask, media_features=features, use_cache=False).logits
    for start, stop in ((0, 7), (7, 20), (20, 21), (21, 22), (22, 24)):
        before = int((ids[0, :start] == MEDIA).sum())
        count = int((ids[0, start:stop] == MEDIA).sum())
        some = {"media_features": features[before : before + count]} if count else {}
        # A static cache may be given the mask of what it has room for.
        seen = F.pad(mask[:, :stop], (0, 24 - stop), value=1) if "static" in kind else mask[:, :stop]
        out = model(input_ids=ids[:, start:stop], attention_mask=seen, past_key_values=cache, **some)
        kept = mask[:, start:stop].bool()
        torch.testing.assert_close(out.logits[kept], whole[:, start:stop][kept], **NEAR)
        assert int(out.past_key_values.get_seq_length()) == stop


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache(model, backend):
    if not (is_optimum_quanto_available() if backend == "quanto" else is_hqq_available()):
        pytest.skip(f"{backend} is not installed")
    group = 4  # divides 16 latent and 4 rotary numbers
    ids, given = prompt("media")
    for nbits in (4, 8) if backend == "hqq" else (4,):
        cache = QuantizedCache(backend, model.config, nbits=nbits, q_group_size=group, residual_length=64)
        out = model.generate(ids, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, greedy(model, ids, NEW, **given))  # what is not yet quantized is exact
    cache = QuantizedCache(backend, model.config, nbits=4, q_group_size=group, residual_length=4)
    out = model.generate(ids, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert out.shape == (1, ids.shape[1] + NEW)


@torch.no_grad()
def test_the_cache_holds_latents(model, golden):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=9)):
        model(input_ids=words(2, 9), past_key_values=cache)
        assert len(cache.layers) == 3
        for layer in cache.layers:
            assert layer.keys.shape == (2, 1, 9, 16) and layer.values.shape == (2, 1, 9, 4)
    published = KimiK26Config.from_pretrained(golden / "vocab").text_config
    assert published.kv_lora_rank + published.qk_rope_head_dim == 576


@kinds
@pytest.mark.parametrize("new_ids_only", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_a_dialogue_goes_on_from_its_cache(model, kind, new_ids_only, static):
    """Three turns; the second brings pictures of its own, and all pictures or only new ones may be given."""
    if new_ids_only and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 wants the ids of the whole dialogue beside a cache")
    turns = [prompt(kind), media_prompt(4, [(1, 2, 4), (2, 2, 2)], 3), (words(1, 6, seed=5), None, None)]
    for all_pictures in (False, True):
        ids, seen = None, {}
        cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
        for number, turn in enumerate(turns):
            if number == 0:
                added, new = turn
            else:
                added, new = turn[0], {"pixel_values": turn[1], "grid_thws": turn[2]} if turn[1] is not None else {}
            ids = added if ids is None else torch.cat((ids, added), dim=1)
            seen = {k: torch.cat([s[k] for s in (seen, new) if s]) for k in (new or seen)}
            expected = greedy(model, ids, NEW, **seen)
            given = seen if all_pictures and not new_ids_only else new
            asked = {"max_new_tokens": NEW, "do_sample": False, "past_key_values": cache, **given}
            if new_ids_only:
                held = int(cache.get_seq_length())
                out = model.generate(ids[:, held:], attention_mask=torch.ones_like(ids), **asked)
                out = torch.cat((ids[:, :held], out), dim=1)
            else:
                out = model.generate(ids, **asked)
            assert torch.equal(out, expected)
            ids = out


AHEAD = {
    "lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": EOS},
    "assisted": {"assistant_model": None},
    "chunks": {"prefill_chunk_size": 3},
    "one chunk": {"prefill_chunk_size": 1000},
}


@kinds
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("how", AHEAD)
def test_a_dialogue_goes_on_in_every_mode(model, kind, static, how):
    """Over a filled cache, whose tokens are neither read again nor counted twice."""
    if static and how in ("lookup", "assisted"):
        pytest.skip("the library takes no static cache where tokens are proposed")
    extra = {key: model if key == "assistant_model" else value for key, value in AHEAD[how].items()}
    ids, given = prompt(kind)
    cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
    for turn in range(3):
        expected = greedy(model, ids, NEW, extra.get("eos_token_id"), **given)
        out = model.generate(ids, **given, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **extra)
        # Looking up, transformers 4 may give a token more than it was asked for.
        assert torch.equal(out[:, : expected.shape[1]], expected) and int(cache.get_seq_length()) < out.shape[1] <= expected.shape[1] + 1
        ids = torch.cat((out, words(1, 6, seed=turn)), dim=1)


def test_pages_are_refused(model):
    """They hold keys and values of heads: the library would go on without a word."""
    with pytest.raises((NotImplementedError, ValueError), match="latents|cache_implementation"):  # 4.57.6 refuses it itself
        model.generate(words(1, 5), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="latents"):
        model.generate_batch(inputs=[[1, 2, 3]])


@torch.no_grad()
def test_masks_that_could_mean_anything_are_refused(model):
    ids = words(2, 6)
    square = torch.ones(6, 6).tril()[None, None].expand(2, 1, 6, 6)
    torch.testing.assert_close(model(ids, attention_mask=square.bool()).logits, model(ids).logits, **NEAR)
    for mask in (square.long(), square[:, 0]):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=mask)


@kinds
def test_embeddings_instead_of_ids(model, kind):
    ids, given = prompt(kind)
    embeds = model.get_input_embeddings()(ids)
    expected = greedy(model, ids, NEW, **given)[:, -NEW:]
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1, "num_return_sequences": 1}):
        out = model.generate(inputs_embeds=embeds, **given, max_new_tokens=NEW, do_sample=False, **how)
        assert torch.equal(out, expected)
    both = model.generate(ids, inputs_embeds=embeds, **given, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(both[:, -NEW:], expected)
    beams = model.generate(inputs_embeds=embeds, **given, num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(beams, plain_beams(model, ids, 3, 5, **given)[:1, -5:])


@kinds
def test_outputs_of_generation(model, kind):
    ids, given = prompt(kind)
    out = copy.deepcopy(model).generate(
        ids, **given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True,
        output_scores=True, output_attentions=True,
    )
    assert len(out.hidden_states) == len(out.scores) == len(out.attentions) == 3
    assert out.hidden_states[0][-1].shape == (1, ids.shape[1], 32) and out.hidden_states[1][-1].shape == (1, 1, 32)
    assert out.attentions[2][0].shape == (1, 4, 1, ids.shape[1] + 2)


def test_media_features_instead_of_pictures(model):
    ids, given = prompt("media")
    features = model.get_image_features(**given)
    out = model.generate(ids, media_features=features, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(model, ids, NEW, **given))


def test_types_of_tokens_say_nothing_new(model):
    ids, given = prompt("media")
    types = (ids == MEDIA).long()
    out = model.generate(ids, mm_token_type_ids=types, max_new_tokens=NEW, do_sample=False, **given)
    assert torch.equal(out, greedy(model, ids, NEW, **given))
    assert torch.equal(model(ids, mm_token_type_ids=types, **given).logits, model(ids, **given).logits)


def test_a_prompt_with_pictures_is_not_written_anew(model):
    ids, given = prompt("media")
    with pytest.raises(ValueError, match="token_healing"):
        model.generate(ids, token_healing=True, max_new_tokens=NEW, **given)


def test_pictures_are_encoded_once(model, monkeypatch):
    calls, encode = [], model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda *a, **k: calls.append(1) or encode(*a, **k))
    ids, given = prompt("media")
    for how in ({}, {"num_beams": 3}, {"prefill_chunk_size": 2}, {"do_sample": True, "num_return_sequences": 3}, {"use_cache": False}):
        calls.clear()
        model.generate(ids, **given, max_new_tokens=4, **how)
        assert len(calls) == 1


def test_generation_leaves_training_alone(model):
    """A model in training mode generates as well, and gradients do not leak out of it."""
    ids, given = prompt("media")
    made = copy.deepcopy(model).train()
    made.gradient_checkpointing_enable()
    out = made.generate(ids, **given, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(model, ids, NEW, **given)) and not out.requires_grad


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=["dynamic", "static", "chunks"])
@torch.no_grad()
def test_positions_that_were_given_go_on(model, how):
    ids, positions = words(1, 9), torch.tensor([[0, 1, 2, 3, 40, 41, 42, 43, 44]])
    asked = {"return_dict_in_generate": True, "output_logits": True, **how}
    out = model.generate(ids, position_ids=positions, max_new_tokens=NEW, do_sample=False, **asked)
    expected, scores = ids, []
    for step in range(NEW):
        whole = torch.cat((positions, torch.arange(45, 45 + step).unsqueeze(0)), dim=1)
        mask = torch.ones_like(expected)
        logits = model(input_ids=expected, position_ids=whole, attention_mask=mask, use_cache=False).logits
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        scores.append(logits[:, -1])
    assert torch.equal(out.sequences, expected)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(scores), **NEAR)
