"""When a step takes the native kernels, and that it sees whatever is done to the model and its cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kimi_k26 import decoding_kimi_k26
from kimi_k26.attention_kimi_k26 import AttentionSpan
from kimi_k26.cache_kimi_k26 import write_latents

from .native_models import error, inputs, make, needs_kernels, one_step


pytestmark = needs_kernels


def test_a_whole_model_where_pytorch_is_slow(monkeypatch):
    model, ids = make({}), torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        wanted = copy.deepcopy(model).float()(ids).logits
        for fast in (False, True):
            monkeypatch.setattr(decoding_kimi_k26, "HAS_FAST_PRODUCTS", fast)
            assert (model(ids).logits - wanted).norm() < 0.05 * wanted.norm()


def test_logits_are_no_farther_from_float32_than_those_of_the_plain_path(monkeypatch):
    model = make({"num_experts_per_tok": 8})  # all experts: no choice hangs on a rounding
    plain = copy.deepcopy(model).float()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(model):
        out, parts = model(input_ids=ids[:, :10], use_cache=True), []
        for at in range(10, 30):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits.float())
        return torch.cat(parts, dim=1)

    want, fast = logits(plain), logits(model)
    assert model.language_model.model.native is not None
    monkeypatch.setattr("kimi_k26.decoding_kimi_k26.library", lambda: None)
    monkeypatch.setattr("kimi_k26.experts_kimi_k26.library", lambda: None)
    slow = logits(model)
    assert not torch.equal(fast, slow)
    assert error(fast, want) < 1.2 * error(slow, want)


def test_a_static_cache_gives_the_same_bits():
    model = make({})
    layer = model.language_model.model.layers[1]
    x, cos, sin, latents, rotary = inputs(model, 3, 20)
    padding = torch.ones(3, 21, dtype=torch.long)
    padding[0, :7] = 0
    want = one_step(layer, x, cos, sin, latents, rotary, padding)[0]
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    span = AttentionSpan(torch.tensor([20]), None, padding)
    layer.native = None
    with torch.no_grad():
        for at in range(2):
            write_latents(cache, at, latents, rotary, torch.arange(20))
        got = layer(x, (cos, sin), span, past_key_values=cache)[0]
    assert layer.native is not None
    assert torch.equal(got, want) and int(cache.get_seq_length(1)) == 21


def test_a_cache_may_be_cut_and_chosen_from():
    model = make({})
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 13
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([1]))
        got = model(input_ids=ids[1:, 8:9], past_key_values=cache).logits[:, -1]
        fresh = model(input_ids=ids[1:, :8], use_cache=True).past_key_values
        want = model(input_ids=ids[1:, 8:9], past_key_values=fresh).logits[:, -1]
    assert error(got, want.float()) < 0.05


def test_a_weight_that_moved_is_found_again():
    model = make({})
    layer = model.language_model.model.layers[1]
    given = inputs(model, 1, 5)
    before = one_step(layer, *given)[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros_like(layer.self_attn.o_proj.weight))
        for expert in layer.mlp.experts:
            expert.down_proj.weight_scale.data = torch.zeros_like(expert.down_proj.weight_scale)
        layer.mlp.shared_experts.down_proj.weight.zero_()
    after = one_step(layer, *given)[0]
    assert torch.equal(after, given[0]) and not torch.equal(before, after)


@pytest.mark.parametrize("where", ["self_attn.o_proj", "mlp.gate", "mlp.experts.3", "mlp.experts.3.up_proj", "input_layernorm"])
def test_hooks_are_heard(where):
    """What a user hangs on a module runs, wherever it is."""
    model = make({"num_experts_per_tok": 8})
    layer = model.language_model.model.layers[1]
    calls = []
    layer.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    one_step(layer, *inputs(model, 1, 5))
    assert calls


def test_a_copy_has_its_own():
    model = make({})
    layer = model.language_model.model.layers[1]
    given = inputs(model, 1, 5)
    want = one_step(layer, *given)[0]
    other = copy.deepcopy(layer)
    assert other.native is None
    assert torch.equal(one_step(other, *given)[0], want)


def test_float32_and_gradients_take_the_plain_path():
    model = make({})
    ids = torch.tensor([[3]])
    cache = DynamicCache()
    model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache)
    model(input_ids=ids, past_key_values=cache).logits.sum().backward()
    assert all(layer.native is None for layer in model.language_model.model.layers)


def test_all_layers_in_one_call_are_the_layers_one_by_one():
    model = make({"num_hidden_layers": 4, "first_k_dense_replace": 2})
    ids = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    results = []
    for by_layer in (False, True):
        model.expert_store.clear()
        with torch.no_grad():
            out, logits = model(input_ids=ids[:, :6], attention_mask=mask[:, :6]), []
            for at in range(6, 12):
                given = {"input_ids": ids[:, at : at + 1], "attention_mask": mask[:, : at + 1], "output_router_logits": True}
                out = model(**given, past_key_values=out.past_key_values, output_hidden_states=by_layer)
                logits.append(torch.stack((out.logits, *[part.mean() + 0 * out.logits for part in out.router_logits])))
        results.append((torch.stack(logits), model.expert_store.hits, model.expert_store.misses))
    assert model.language_model.model.native is not None and model.language_model.model.layers[3].native is not None
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:] and results[0][1] > 0


def test_a_budget_forgets_experts_after_use():
    model = make({})
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))

    def text():
        return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)

    want, size = text(), sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    experts = model.language_model.model.layers[1].mlp.experts
    assert experts.known._held
    model.set_budget(expert_budget=size // 3)
    assert torch.equal(text(), want)
    assert not experts.known._held and model.expert_store.bytes_held <= size // 3
    model.set_budget(expert_budget=size)
    assert torch.equal(text(), want) and experts.known._held


def test_experts_of_a_prompt_are_known_to_the_tokens_after_it():
    model = make({"num_experts_per_tok": 8})
    experts, store = model.language_model.model.layers[1].mlp.experts, model.expert_store
    with torch.no_grad():
        out = model(input_ids=torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0)), use_cache=True)
        assert sorted(experts.known._held) == list(range(8)) and (store.hits, store.misses) == (0, 8)
        model(input_ids=torch.tensor([[3]]), past_key_values=out.past_key_values)
        assert (store.hits, store.misses) == (8, 8)
        model(input_ids=torch.randint(0, 90, (1, 40)), use_cache=True)
        assert (store.hits, store.misses) == (16, 8)


def test_a_changed_expert_is_seen_at_the_next_prompt():
    model = make({})
    ids = torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))

    def last():
        with torch.no_grad():
            out = model(input_ids=ids[:, :5], use_cache=True)
            return model(input_ids=ids[:, 5:], past_key_values=out.past_key_values).logits

    before, experts = last(), model.language_model.model.layers[1].mlp.experts
    for number in list(experts.known._held)[:1]:
        experts[number].down_proj.weight_scale.data = torch.zeros_like(experts[number].down_proj.weight_scale)
    assert not torch.equal(last(), before)


def going_on(model, ids):
    """Logits of one token after the other, in one sequence."""
    out = model(input_ids=ids[:, :5], use_cache=True)
    for at in range(5, ids.shape[1]):
        yield model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values).logits


@torch.no_grad()
def test_what_is_done_to_all_layers_is_seen_at_the_next_token():
    model = make({"num_hidden_layers": 4})
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    steps = going_on(model, ids)
    for _ in range(3):
        next(steps)
    for layer in model.language_model.model.layers:
        shared = getattr(layer.mlp, "shared_experts", layer.mlp)
        for linear in (layer.self_attn.o_proj, shared.down_proj):
            linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
        for expert in getattr(layer.mlp, "experts", ()):
            expert.down_proj.weight_scale.data = torch.zeros_like(expert.down_proj.weight_scale)
    text = model.language_model
    want = text.lm_head(text.model.norm(text.model.embed_tokens(ids[:, 8:9])))
    assert torch.equal(next(steps), want)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layers.2.self_attn.o_proj", "norm"])
def test_what_is_done_to_one_layer_is_seen_after_as_many_tokens(where):
    model = make({"num_hidden_layers": 4})
    text = model.language_model.model
    steps = going_on(model, torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(0)))
    for _ in range(3):
        next(steps)
    module, known, tokens = text.get_submodule(where), text.native, 0
    module.weight = torch.nn.Parameter(module.weight.clone())
    while text.native is known:
        next(steps)
        tokens += 1
    assert tokens <= 5


@torch.no_grad()
def test_weights_that_move_are_not_kept():
    model = make({})
    steps = going_on(model, torch.randint(0, 90, (1, 7), generator=torch.Generator().manual_seed(0)))
    next(steps)
    assert model.language_model.model.native is not None
    model.to(torch.float32)
    assert model.language_model.model.native is None
