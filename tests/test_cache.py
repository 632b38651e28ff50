"""cache_kimi_k26.py: what a token takes, and the quantized cache against a plain one that keeps rounded numbers."""

import copy
import json
import math
import mmap
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, KimiK26Processor, QuantizedLatentCache
from kimi_k26 import cache_kimi_k26 as module
from kimi_k26 import memory_kimi_k26 as memory
from kimi_k26.cache_kimi_k26 import LatentLayer, QuantizedLatentLayer, Scratch, restore, round_to_int8, write_latents
from kimi_k26.tests.tiny_models import EOS, PAD, make_model, media_prompt, words


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINED = EXAMPLES / "kimi-k26-tiny"
HALF = {torch.float32: torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
NEW = 8


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """A latent as int8 times a scale of 16 bits to each group, by the definition."""
    half, size = HALF[numbers.dtype], math.gcd(numbers.shape[-1], 64)
    groups = numbers.float().unflatten(-1, (-1, size))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(half).tiny).to(half)
    return ((groups / scale.float()).round() * scale.float()).flatten(-2).to(numbers.dtype)


class PlainLayer(DynamicLayer):
    """What the quantized layer shall do, in floating point and with the library's own ways to cut and choose."""

    def update(self, key_states, value_states, *args, **kwargs):
        before, held = self.get_seq_length(), (self.keys, self.values)
        new = (key_states, value_states)
        kept = (rounded(key_states), value_states.to(HALF[value_states.dtype]).to(value_states.dtype))
        self.keys, self.values = (torch.cat((h, k), dim=2) for h, k in zip(held, kept)) if before else kept
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        return tuple(torch.cat((h, n), dim=2) for h, n in zip(held, new)) if before else new

    def reset(self):  # version 4 of the library keeps the length and writes zeros
        self.keys = self.values = None
        self.is_initialized = False


class PlainCache(Cache):
    def __init__(self, config):
        super().__init__(layers=[PlainLayer() for _ in range(config.get_text_config(decoder=True).num_hidden_layers)])


def numbers(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def storages(cache) -> dict[int, int]:
    """Address → bytes of all memory that the layers of a cache hold, whether seen or not."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values, *layer._room)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}


# ---- Bytes ----


@pytest.fixture(scope="module")
def published_widths():
    """A model whose latents and rotary keys are as wide as published, and little else."""
    text = KimiK26Config.published().text_config
    assert (text.kv_lora_rank, text.qk_rope_head_dim) == (512, 64)
    return make_model("sdpa", dtype=torch.bfloat16, kv_lora_rank=512, qk_rope_head_dim=64)


@pytest.mark.parametrize(("kind", "expected"), [("dynamic", 1152), ("quantized", 656)])
@torch.no_grad()
def test_bytes_of_a_token_and_layer(published_widths, kind, expected):
    config = published_widths.config
    cache = DynamicCache(config=config) if kind == "dynamic" else QuantizedLatentCache(config)
    rows, prompt, steps = 2, 300, 120
    ids = words(rows, prompt + steps)
    published_widths(input_ids=ids[:, :prompt], past_key_values=cache)
    for at in range(prompt, prompt + steps):
        published_widths(input_ids=ids[:, at : at + 1], past_key_values=cache)
    tokens = rows * (prompt + steps)
    assert len(cache.layers) == config.text_config.num_hidden_layers
    for layer in cache.layers:
        assert layer.keys.nbytes + layer.values.nbytes == expected * tokens
    # With the room ahead: an eighth at most, or 64 tokens in each row.
    most = len(cache.layers) * expected * (1.125 * tokens + 64 * rows)
    assert sum(storages(cache).values()) <= most


def test_growth_is_amortized():
    cache = QuantizedLatentCache(KimiK26Config.published())
    key, value = numbers(1, 1, 1, 512, dtype=torch.bfloat16), numbers(1, 1, 1, 64, dtype=torch.bfloat16)
    homes, scratch = set(), set()
    for _ in range(3000):
        latent, _ = cache.update(key, value, 0)
        homes.add(cache.layers[0].keys.data_ptr())
        scratch.add(latent.data_ptr())
    assert cache.get_seq_length() == 3000 and len(homes) < 40 and len(scratch) < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_allocates_nothing_as_long_as_the_context(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    cache, length = QuantizedLatentCache(KimiK26Config.published()), 4000
    new = numbers(1, 1, 1, 512, dtype=dtype), numbers(1, 1, 1, 64, dtype=dtype)
    for layer in range(2):
        cache.update(numbers(1, 1, length, 512, dtype=dtype), numbers(1, 1, length, 64, dtype=dtype), layer)
        cache.update(*new, layer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(3):
            for layer in range(2):
                cache.update(*new, layer)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert sizes and max(sizes) <= 512 * 4  # one token in float32, or the scales of a block; of 4,000 tokens before


# ---- Rounding ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [512, 64, 16, 100, 7, 1])
def test_rounding(dtype, width):
    half, groups = HALF[dtype], width // math.gcd(width, 64)
    given = numbers(5, 40, width, seed=width, dtype=dtype) * torch.logspace(-2, 2, 40).to(dtype).unsqueeze(-1)
    given[0, 0] = 0
    integers, scales = torch.empty(5, 40, width, dtype=torch.int8), torch.empty(5, 40, groups, dtype=half)
    round_to_int8(given, integers, scales)
    into = torch.full_like(given, torch.nan)
    restore(integers, scales, into)
    torch.testing.assert_close(into, rounded(given), rtol=0, atol=0)
    # Half a step, and what the dtype itself cannot tell apart.
    largest = given.float().unflatten(-1, (groups, -1)).abs().amax(-1, keepdim=True)
    allowed = largest / 127 * 0.502 + largest * torch.finfo(half).eps + torch.finfo(half).tiny / 2
    assert ((into - given).float().unflatten(-1, (groups, -1)).abs() <= allowed).all()
    assert int(integers.abs().max()) <= 127 and bool((into[0, 0] == 0).all())


def test_error_of_normed_latents():
    given = numbers(2000, 512, dtype=torch.bfloat16)
    integers, scales = torch.empty(2000, 512, dtype=torch.int8), torch.empty(2000, 8, dtype=torch.bfloat16)
    round_to_int8(given, integers, scales)
    into = torch.empty_like(given)
    restore(integers, scales, into)
    assert float((into - given).float().norm() / given.float().norm()) < 0.007
    # A number far from the others spoils its own group alone.
    given[:, 3] = 100
    round_to_int8(given, integers, scales)
    restore(integers, scales, into)
    assert float((into - given)[:, 64:].float().norm() / given[:, 64:].float().norm()) < 0.007


# ---- What a cache does ----


OPERATIONS = {
    "cut": lambda cache, draw: cache.crop(-draw.randint(1, 3)),
    "reorder": lambda cache, draw: cache.reorder_cache(torch.tensor(draw.choices(range(rows_of(cache)), k=rows_of(cache)))),
    "repeat": lambda cache, draw: cache.batch_repeat_interleave(2) if rows_of(cache) < 4 else None,
    "choose": lambda cache, draw: cache.batch_select_indices(torch.tensor([draw.randrange(rows_of(cache))])),
    "copy": None,
}


def rows_of(cache):
    return cache.layers[0].keys.shape[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_done_to_a_cache(seed, dtype, monkeypatch):
    """Tokens come in pieces and are cut, rows are chosen, repeated and changed about, as with plain tensors."""
    monkeypatch.setattr(module, "BLOCK", 5)
    config = KimiK26Config.published()
    config.text_config.num_hidden_layers = 2
    caches, draw = [QuantizedLatentCache(config), PlainCache(config)], random.Random(seed)
    rank, rope = draw.choice([(512, 64), (16, 4), (7, 2)])
    rows, done = draw.randint(1, 3), set()
    for step in range(60):
        new = draw.choice([1, 1, 1, 2, 9, 30])
        for index in range(2):
            key = numbers(rows, 1, new, rank, seed=1000 * step + index, dtype=dtype)
            value = numbers(rows, 1, new, rope, seed=1000 * step + index + 500, dtype=dtype)
            got, want = (cache.update(key, value, index) for cache in caches)
            for one, other in zip(got, want):
                assert one.shape == other.shape and one.dtype == dtype
                torch.testing.assert_close(one, other, rtol=2e-7 if dtype == torch.float32 else 0, atol=0)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        name = draw.choice([*OPERATIONS, None, None])
        if name == "copy":
            caches = [copy.deepcopy(cache) for cache in caches]
        elif name is not None and caches[0].get_seq_length() > 3:
            state = draw.getstate()
            for cache in caches:
                draw.setstate(state)
                OPERATIONS[name](cache, draw)
            rows = rows_of(caches[0])
            assert rows == rows_of(caches[1])
        done.add(name)
        if step == 40:
            for cache in caches:
                cache.reset()
            assert caches[0].get_seq_length() == 0
            rows = draw.randint(1, 3)
    assert done == {*OPERATIONS, None}


def test_layers_share_one_stretch_of_memory():
    scratch = Scratch()
    layers = [QuantizedLatentLayer(scratch) for _ in range(3)]
    homes = set()
    for layer in layers:
        layer.update(numbers(1, 1, 90, 16), numbers(1, 1, 90, 4))
        homes.add(layer.update(numbers(1, 1, 1, 16), numbers(1, 1, 1, 4))[0].data_ptr())
    assert len(homes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_large_rooms_begin_with_a_large_page(dtype):
    like = torch.empty(0, dtype=dtype)
    small, large = memory.new_room(like, (1, 3, 5)), memory.new_room(like, (2, 1, 3000, 512))
    assert small.shape == (1, 3, 5) and large.shape == (2, 1, 3000, 512) and small.dtype == large.dtype == dtype
    assert large.is_contiguous() and (not hasattr(mmap, "MADV_HUGEPAGE") or large.data_ptr() % memory.LARGE_PAGE == 0)
    large.copy_(torch.arange(len(large.flatten())).view(large.shape))
    copied = copy.deepcopy(large)
    large.zero_()
    assert torch.equal(copied.flatten(), torch.arange(len(copied.flatten())).to(dtype))


def test_a_cache_in_large_pages_is_the_plain_one():
    """More tokens than small pages are used for, in one go and one by one, then cut and chosen from."""
    key, value = numbers(2, 1, 2100, 512, dtype=torch.bfloat16), numbers(2, 1, 2100, 64, dtype=torch.bfloat16)
    cache = DynamicCache()
    for some in (slice(0, 2050), *(slice(at, at + 1) for at in range(2050, 2100))):
        got = write_latents(cache, 0, key[:, :, some], value[:, :, some], torch.arange(2100)[some])
    assert torch.equal(got[0], key) and torch.equal(got[1], value)
    cache.crop(-30)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = write_latents(cache, 0, key[:, :, 2070:], value[:, :, 2070:], torch.arange(2070, 2100))
    want = torch.cat((key.flip(0)[:, :, :2070], key[:, :, 2070:]), dim=2)
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("kind", ["dynamic", "quantized"])
def test_inference_mode_may_end(kind):
    """A prompt read in inference mode, and tokens written outside of it, where PyTorch refuses to write in place."""
    cache = DynamicCache() if kind == "dynamic" else QuantizedLatentCache(KimiK26Config.published())
    key, value, where = numbers(1, 1, 20, 16), numbers(1, 1, 20, 4), torch.arange(20)
    with torch.inference_mode():
        write_latents(cache, 0, key[:, :, :7], value[:, :, :7], where[:7])
        write_latents(cache, 0, key[:, :, 7:9], value[:, :, 7:9], where[7:9])
    with torch.no_grad():
        got = write_latents(cache, 0, key[:, :, 9:], value[:, :, 9:], where[9:])
        got = [part.clone() for part in got]
    with torch.inference_mode():
        again = write_latents(cache, 0, key, value, where)
    for one, more, given in zip(got, again, (key, value)):
        torch.testing.assert_close(one, given, rtol=0.02, atol=0.02)
        assert more.shape[2] == 40 and torch.equal(more[:, :, 20:], given)
    assert type(cache.layers[0]) is (LatentLayer if kind == "dynamic" else QuantizedLatentLayer)


@pytest.mark.parametrize("first, then", [(torch.bfloat16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_a_quantized_cache_goes_on_in_another_dtype(first, then):
    cache = QuantizedLatentCache(KimiK26Config.published())
    key, value, where = numbers(1, 1, 20, 16), numbers(1, 1, 20, 4), torch.arange(20)
    write_latents(cache, 0, key[:, :, :12].to(first), value[:, :, :12].to(first), where[:12])
    got = write_latents(cache, 0, key[:, :, 12:].to(then), value[:, :, 12:].to(then), where[12:])
    for one, given in zip(got, (key, value)):
        assert one.dtype == then
        torch.testing.assert_close(one.float(), given.float(), rtol=0.02, atol=0.02)


# ---- Generation ----


@pytest.fixture(scope="module")
def model():
    made = make_model("sdpa")
    made.generation_config.eos_token_id = None  # every continuation has its full length
    made.generation_config.pad_token_id = PAD
    return made


HOW = {
    "greedy": {},
    "chunks of one": {"prefill_chunk_size": 1},
    "chunks of four": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": EOS},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, chunks": {"num_beams": 3, "prefill_chunk_size": 3},
}


def prompts(kind):
    if kind == "text":
        return {"input_ids": words(1, 11)}
    if kind == "media":
        ids, pixels, grids = media_prompt()
        return {"input_ids": ids, "pixel_values": pixels, "grid_thws": grids}
    rows = [words(1, length, seed=length) for length in (4, 11, 7)]
    ids = torch.cat([F.pad(row, (11 - row.shape[1], 0), value=PAD) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def both(model, asked):
    """Ids written with the quantized cache, and with the plain one."""
    caches = (cache(model.config) for cache in (QuantizedLatentCache, PlainCache))
    return [model.generate(**asked, past_key_values=cache) for cache in caches]


@pytest.mark.parametrize("kind", ["text", "media", "left-padded batch"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_generation(model, kind, how):
    given = prompts(kind)
    if "prompt_lookup_num_tokens" in how and len(given["input_ids"]) > 1:
        pytest.skip("the library looks up one row at a time")
    asked = {"max_new_tokens": NEW, "do_sample": False, **given, **how}
    got, want = both(model, asked)
    assert torch.equal(got, want) and got.shape[1] > given["input_ids"].shape[1]


def test_assisted_generation(model):
    helper = make_model("sdpa", seed=7, num_hidden_layers=1)
    helper.generation_config.eos_token_id = None
    asked = {"max_new_tokens": NEW, "do_sample": False, "assistant_model": helper, **prompts("media")}
    got, want = both(model, asked)
    assert torch.equal(got, want)


def test_logits_of_a_left_padded_batch_are_near_those_of_the_exact_cache(model):
    given = prompts("left-padded batch")
    ids, mask = given["input_ids"], given["attention_mask"]
    more = words(3, 12, seed=5)
    with torch.no_grad():
        logits = []
        for cache in (QuantizedLatentCache(model.config), DynamicCache(config=model.config)):
            model(**given, past_key_values=cache)
            seen, steps = mask, []
            for at in range(more.shape[1]):
                seen = F.pad(seen, (0, 1), value=1)
                out = model(input_ids=more[:, at : at + 1], attention_mask=seen, past_key_values=cache)
                steps.append(out.logits)
            logits.append(torch.cat(steps, dim=1))
    got, want = logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.02
    assert cache.get_seq_length() == ids.shape[1] + more.shape[1]


def test_gradients_may_be_on(model):
    """Forward passes outside `no_grad` give the same; a first one also has its gradients, as nothing is rounded yet."""
    ids, logits = words(2, 9), []
    for grad in (False, True):
        cache = QuantizedLatentCache(model.config)
        with torch.set_grad_enabled(grad):
            first = model(input_ids=ids[:, :5], past_key_values=cache).logits
            logits.append((first, model(input_ids=ids[:, 5:], past_key_values=cache).logits))
    assert all(torch.equal(one, other) for one, other in zip(*logits))
    name = "language_model.model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    (got,), (want,) = (
        torch.autograd.grad(made.square().sum(), model.get_parameter(name))
        for made in (logits[1][0], model(input_ids=ids[:, :5], use_cache=False).logits)
    )
    torch.testing.assert_close(got, want)


def test_remote_code_has_it(tiny_checkpoint):
    """A user of `trust_remote_code` takes the class from the folder."""
    cache = get_class_from_dynamic_module("cache_kimi_k26.QuantizedLatentCache", str(tiny_checkpoint))
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    for kind in (cache, QuantizedLatentCache):
        out = model.generate(words(1, 6), max_new_tokens=3, min_new_tokens=3, past_key_values=kind(model.config))
        assert out.shape == (1, 9)


# ---- The trained checkpoint ----


@torch.no_grad()
def test_greedy_text_of_the_trained_checkpoint_is_unchanged(monkeypatch):
    """Two cases of each of its skills: pictures, videos, tools, thinking. Texts may part only where the model itself is
    undecided, its two best words less than a quarter of a logit apart."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from tiny import evaluation

    processor = KimiK26Processor.from_pretrained(TRAINED)
    trained = KimiK26ForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32).eval()
    cases = [make(random.Random(seed)) for make in evaluation.SKILLS.values() for seed in (11, 12)]
    given = [evaluation.prompt(processor, evaluation.for_processor(case), case) for case in cases]
    length, pad = max(one["input_ids"].shape[1] for one in given), processor.tokenizer.pad_token_id
    ids = torch.cat([F.pad(one["input_ids"], (length - one["input_ids"].shape[1], 0), value=pad) for one in given])
    media = {key: torch.cat([one[key] for one in given if key in one]) for key in ("pixel_values", "grid_thws")}
    asked = {"input_ids": ids, "attention_mask": (ids != pad).long(), **media, "max_new_tokens": 120, "do_sample": False}
    exact = trained.generate(**asked, return_dict_in_generate=True, output_logits=True)
    got = trained.generate(**asked, past_key_values=QuantizedLatentCache(trained.config))
    want, best = exact.sequences, torch.stack(exact.logits, dim=1).topk(2).values
    steps = min(got.shape[1], want.shape[1]) - length
    undecided = 0
    for row in range(len(cases)):
        parted = (got[row, length : length + steps] != want[row, length : length + steps]).nonzero()
        if len(parted):
            undecided += 1
            first = best[row, int(parted[0])]
            assert float(first[0] - first[1]) < 0.25, processor.tokenizer.decode(want[row, length:])
        else:
            assert (got[row, length + steps :] == pad).all() and (want[row, length + steps :] == pad).all()
    assert undecided <= len(cases) // 20
