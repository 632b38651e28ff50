"""The native kernels of attention, over expanded keys and over latents, beside the plain path."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from kimi_k26 import attention_kimi_k26, native_kimi_k26
from kimi_k26.cache_kimi_k26 import QuantizedLatentCache
from kimi_k26.native_kimi_k26 import attention, read_latents

from .native_models import each_kind, error, make, needs_kernels  # noqa: F401: a fixture


pytestmark = needs_kernels

QUERIES = [(1, 5, 1), (7, 0, 2), (33, 0, 1), (100, 0, 2), (40, 61, 3), (129, 3, 1)]


def attention_case(queries, past, batch, padded, key, value):
    """Queries over expanded keys and values: what the kernels are given, which of the answers somebody looks at, and those in float32."""
    heads, nope, rope, keys = 3, key.shape[-1], 8, past + queries
    query, turned = torch.randn(batch, queries, heads, nope).bfloat16(), torch.randn(batch, queries, heads, rope).bfloat16()
    rotary = torch.randn(batch, keys, rope).bfloat16()
    mask = torch.ones(batch, keys, dtype=torch.bool)
    if padded:
        mask[0, : keys // 3] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float())
    scores = (scores + torch.einsum("bqhd,bkd->bhqk", turned.float(), rotary.float())) * 0.3
    visible = torch.arange(keys) <= torch.arange(past, keys)[:, None]
    visible = visible & mask[:, None, None]
    weights = scores.masked_fill(~visible, -1e30).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, value.float())
    seen = visible[:, 0].any(-1)  # a token of the padding sees nothing, and nobody looks at it
    return query, turned, rotary, mask if padded else None, seen, want


@pytest.mark.once
@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("queries, past, batch", QUERIES)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_expanded_keys(queries, past, batch, padded):
    torch.manual_seed(queries)
    key, value = (torch.randn(batch, past + queries, 3, width).bfloat16() for width in (24, 20))
    query, turned, rotary, mask, seen, want = attention_case(queries, past, batch, padded, key, value)
    got = attention(query, turned, key, rotary, value, past, mask, 0.3)
    assert error(got[seen], want[seen]) < 0.01 and bool(got.isfinite().all())


@pytest.mark.once
@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("padded", [False, True])
def test_queries_that_meet_keys_together_are_what_they_are_alone(padded):
    """Keys so wide that those which blocks of queries meet one after the other are a few of them."""
    torch.manual_seed(0)
    queries, past = 200, 150
    key, value = torch.randn(1, past + queries, 3, 376).bfloat16() / 8, torch.randn(1, past + queries, 3, 384).bfloat16()
    query, turned, rotary, mask, seen, want = attention_case(queries, past, 1, padded, key, value)
    got = attention(query, turned, key, rotary, value, past, mask, 0.3)
    assert error(got[seen], want[seen]) < 0.01
    for first in range(0, queries, 32):
        some = slice(first, first + 32)
        alone = attention(query[:, some], turned[:, some], key, rotary, value, past + first, mask, 0.3)
        assert torch.equal(alone, got[:, some])


@pytest.mark.once
@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("queries, past, batch", [*QUERIES, (2, 700, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_latents(queries, past, batch, padded):
    torch.manual_seed(queries)
    room = torch.randn(batch, past + queries + 5, 64).bfloat16()  # a static cache is longer than what it holds
    latent, expansion = room[:, : past + queries], torch.randn(3, 24 + 20, 64).bfloat16() / 8
    key, value = torch.einsum("bkr,hdr->bkhd", latent.float(), expansion.float()).split([24, 20], dim=-1)
    query, turned, rotary, mask, seen, want = attention_case(queries, past, batch, padded, key, value)
    got = read_latents(query, turned, room, rotary, expansion, past, mask, 0.3)
    assert error(got[seen], want[seen]) < 0.015 and bool(got.isfinite().all())


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, new, past", [(1, 7, 0), (1, 32, 50), (2, 5, 600), (3, 10, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_some_tokens_at_once_are_one_after_the_other(rows, new, past, padded):
    """To the last bit, in both kinds of caches, whether somebody looks at the layers or not."""
    model = make({"num_hidden_layers": 3})
    ids = torch.randint(0, 90, (rows, past + new), generator=torch.Generator().manual_seed(new))
    mask = torch.ones_like(ids)
    mask[0, : past // 2] = 1 - padded

    def logits(step, cache, **options):
        places, given = [past, *range(past + step, past + new + 1, step)], []
        if past:
            model(input_ids=ids[:, :past], attention_mask=mask[:, :past], past_key_values=cache)
        for begin, end in zip(places, places[1:]):
            natives = model.language_model.model
            out = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, **options)
            assert natives.native is not None or natives.layers[0].native is not None
            given.append(out.logits)
        return torch.cat(given, dim=1)

    with torch.no_grad():
        want = logits(1, DynamicCache())
        assert torch.equal(logits(new, DynamicCache()), want)
        assert torch.equal(logits(new, DynamicCache(), output_hidden_states=True), want)
        assert torch.equal(logits(new, DynamicCache(), logits_to_keep=1), want[:, -1:])
        if past:
            one, some = (StaticCache(config=model.config.text_config, max_cache_len=past + new + 3) for _ in range(2))
            assert torch.equal(logits(new, some), logits(1, one)) and int(some.get_seq_length()) == past + new


def test_short_turns_and_other_caches_take_the_kernels_too(monkeypatch):
    """Where all layers cannot go in one call, attention over latents is the kernels' all the same."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 90), generator=torch.Generator().manual_seed(0))
    read = []
    monkeypatch.setattr(attention_kimi_k26, "read_latents", lambda *given: read.append(given[0].shape[1]) or native_kimi_k26.read_latents(*given))
    with torch.no_grad():
        for cache in (DynamicCache(), QuantizedLatentCache(model.config)):
            read.clear()
            got = [model(input_ids=ids[:, :50], past_key_values=cache).logits]
            got += [model(input_ids=ids[:, 50:89], past_key_values=cache).logits, model(input_ids=ids[:, 89:], past_key_values=cache).logits]
            assert read == ([] if type(cache) is DynamicCache else [1, 1])
            assert error(torch.cat(got, dim=1), plain(input_ids=ids).logits) < 0.05
        for layer in model.language_model.model.layers:
            layer.self_attn.few_queries = 1000
        cache, _ = DynamicCache(), read.clear()
        got = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(45, dim=1)]
        assert read == [45, 45]
        assert error(torch.cat(got, dim=1), plain(input_ids=ids).logits) < 0.02


@torch.no_grad()
def test_what_is_asked_of_a_short_turn_is_what_the_plain_path_gives():
    """Logits of some places, routers' logits, a loss; and places in a static cache that do not follow one another."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def turn(model, cache, places, **options):
        model(input_ids=ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        return model(input_ids=ids[:, 20 : 20 + len(places)], attention_mask=mask, past_key_values=cache, cache_position=places, **options)

    def both(make_cache, places, **options):
        return [turn(each, make_cache(each), torch.tensor(places), **options) for each in (model, plain)]

    for keep in (0, 1, 2, 5, -2, torch.tensor([0, 3])):
        got, want = both(lambda _: DynamicCache(), range(20, 25), logits_to_keep=keep, output_router_logits=True)
        assert got.logits.shape == want.logits.shape and error(got.logits, want.logits) < 0.03
        assert [part.shape for part in got.router_logits] == [part.shape for part in want.router_logits]
        assert all(error(*parts) < 0.03 for parts in zip(got.router_logits, want.router_logits))
    got, want = both(lambda _: DynamicCache(), range(20, 26), labels=ids[:, 20:26])
    assert error(got.loss, want.loss) < 0.01
    for places in (range(20, 24), [20, 22, 21]):
        got, want = both(lambda each: StaticCache(config=each.config.text_config, max_cache_len=30), list(places))
        assert error(got.logits, want.logits) < 0.03


@torch.no_grad()
def test_what_the_kernels_must_not_read_the_plain_path_does():
    """Masks and positions of other shapes, places that are not the next ones, caches that hold a window, no tokens at all."""
    model = make({"num_experts_per_tok": 8})
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 80), generator=torch.Generator().manual_seed(0))
    text = model.config.text_config

    def same(past, make_cache=DynamicCache, count=4, rows=2, **options):
        answers = []
        for each in (model, plain):
            cache = make_cache()
            each(input_ids=ids[:rows, :past], past_key_values=cache)
            answers.append(each(input_ids=ids[:rows, past : past + count], past_key_values=cache, **options).logits)
        assert error(*answers) < 0.03

    static = functools.partial(StaticCache, config=text, max_cache_len=40)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, :3] = 0
    same(10, attention_mask=mask)  # of one row for two
    same(10, attention_mask=mask, rows=1)
    same(10, position_ids=torch.full((1, 1), 10), rows=1)
    for places in (range(6, 10), range(14, 18), [10, 12, 13, 14], [12, 11, 10, 9]):
        same(10, cache_position=torch.tensor(list(places)))
    for at in (6, 14):
        same(10, static, cache_position=torch.arange(at, at + 4))
        same(10, static, count=1, cache_position=torch.tensor([at]))
    for chunk in (1, 4, 10):
        same(50, lambda: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=40) for _ in range(2)]), count=chunk)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(input_ids=ids[:, :0], past_key_values=model(input_ids=ids[:, :5]).past_key_values)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert error(compiled(input_ids=ids[:, :5], use_cache=False).logits, plain(input_ids=ids[:, :5]).logits) < 0.03


def test_a_prompt_is_read_as_by_the_plain_path():
    model = make({"num_experts_per_tok": 8})
    for layer in model.language_model.model.layers:
        layer.self_attn.few_queries = 0
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
        want = plain(input_ids=ids, attention_mask=mask).logits
        parts = model(input_ids=ids[:, :50], attention_mask=mask[:, :50], use_cache=True)
        rest = model(input_ids=ids[:, 50:], attention_mask=mask, past_key_values=parts.past_key_values).logits
    assert error(got[mask == 1], want[mask == 1]) < 0.02
    assert error(rest, got[:, 50:].float()) < 0.02
