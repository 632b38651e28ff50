"""When a step takes the native kernels, and that it sees whatever is done to the model and its cache."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kimi_k26 import decoding_kimi_k26
from kimi_k26.attention_kimi_k26 import AttentionSpan
from kimi_k26.cache_kimi_k26 import write_latents

from .native_models import each_kind, error, inputs, make, needs_kernels, one_step  # noqa: F401


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


@torch.no_grad()
@pytest.mark.parametrize("frequency", [2, 3])
def test_layers_that_route_among_others_that_do_not(frequency):
    """Of which the last is one, or the first."""
    model = make({"num_hidden_layers": 4, "first_k_dense_replace": 0, "moe_layer_freq": frequency, "num_experts_per_tok": 8})
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    want = copy.deepcopy(model).float()(ids).logits[:, 5:]
    got = torch.cat(list(going_on(model, ids)), dim=1)
    assert model.language_model.model.native.fits and error(got, want) < 0.05


@torch.no_grad()
def test_another_number_of_experts_is_seen():
    """In prompts and in steps, in all layers or one."""
    model = make({"num_hidden_layers": 3, "num_experts_per_tok": 8})
    routers = [layer.mlp.gate for layer in model.language_model.model.layers if hasattr(layer.mlp, "gate")]
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    for changed in ([], routers, routers[-1:]):
        for router in routers:
            router.top_k = 8 - 6 * (router in changed)
        plain = copy.deepcopy(model).float()
        for length in (40, 6):
            want = plain(ids[:, :length], output_router_logits=True)
            got = model(ids[:, :length], use_cache=True, output_router_logits=True)
            alike = torch.ones(length, dtype=torch.bool)  # what chose the same experts
            for ours, theirs, router in zip(got.router_logits, want.router_logits, routers):
                choice = [(logits.sigmoid() + router.e_score_correction_bias).topk(router.top_k).indices.sort().values for logits in (ours, theirs)]
                alike &= (choice[0] == choice[1]).all(-1)
            last = int(alike.long().cumprod(0).sum())  # and comes after none that did not
            assert last and error(got.logits[:, :last], want.logits[:, :last]) < 0.05, (len(changed), length)


@torch.no_grad()
def test_an_expert_put_in_the_place_of_another_is_seen_at_the_next_prompt():
    model = make({"num_experts_per_tok": 8})
    experts = model.language_model.model.layers[1].mlp.experts
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    for length in (6, 40):
        before = model(ids[:, :length], use_cache=True).logits
        other = copy.deepcopy(experts[3])
        other.down_proj.weight_scale.data *= 3
        experts[3] = other
        want = copy.deepcopy(model)(ids[:, :length], use_cache=True).logits
        got = model(ids[:, :length], use_cache=True).logits
        assert torch.equal(got, want) and not torch.equal(got, before)


@torch.no_grad()
def test_more_experts_than_there_are_cannot_be_chosen():
    model = make({})
    ids = torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    model(ids, use_cache=True)
    for layer in model.language_model.model.layers[1:]:
        layer.mlp.gate.top_k = 20
    with pytest.raises(RuntimeError, match="out of range"):
        model(ids, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    model = make({"n_routed_experts": 64})
    ids = torch.randint(0, 90, (4, 5), generator=torch.Generator().manual_seed(0))
    asked = {"input_ids": ids, "use_cache": True, "output_router_logits": True}
    want = model(**asked)
    torch.set_default_dtype(dtype)
    try:
        got = [model(**asked) for _ in range(20)]
    finally:
        torch.set_default_dtype(torch.float32)
    for one in got:
        assert torch.equal(one.logits, want.logits)
        assert all(map(torch.equal, one.router_logits, want.router_logits))


@torch.no_grad()
def test_inputs_and_output_layers_of_other_widths_are_refused():
    model = make({})
    for width in (48, 95, 192):
        with pytest.raises(ValueError, match="length, 96"):
            model(inputs_embeds=torch.randn(4, 5, width).bfloat16(), use_cache=True)
    model.set_output_embeddings(torch.nn.Linear(4096, 100, bias=False).bfloat16())
    for length in (3, 40):
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.arange(length)[None], use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("widths", [{"qk_nope_head_dim": 25}, {"qk_nope_head_dim": 23, "v_head_dim": 21}], ids=str)
def test_keys_of_an_odd_width(widths, each_kind):
    model = make({**widths, "num_experts_per_tok": 8})
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    want = copy.deepcopy(model).float()(ids).logits
    for length in (40, 6):
        assert error(model(ids[:, :length], use_cache=True).logits, want[:, :length]) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6, 60])
@pytest.mark.parametrize("cached", [False, True])
def test_autocast_of_a_float32_model(length, cached):
    """Its cache holds float32, its queries are bfloat16."""
    model = make({"num_experts_per_tok": 8}).float()
    ids = torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    for given in ({}, {"attention_mask": mask}):
        want = model(ids, **given).logits
        with torch.autocast("cpu", torch.bfloat16):
            got = model(ids, **given, use_cache=cached).logits
        assert error(got[mask.bool()], want[mask.bool()]) < 0.05


def steps(model, ids, **options):
    """Logits of a prompt of all but two tokens, and of these."""
    out = model(ids[:, :-2], use_cache=True, **options)
    parts = [out.logits]
    for at in (-2, -1):
        out = model(ids[:, at][:, None], past_key_values=out.past_key_values)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


class Relu(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = network.gate_proj, network.up_proj, network.down_proj

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())


def narrow(network):
    for linear, rows in ((network.gate_proj, True), (network.up_proj, True), (network.down_proj, False)):
        linear.weight.data = linear.weight.data[:32].clone() if rows else linear.weight.data[:, :32].clone()


def another(layer):
    layer = copy.deepcopy(layer)
    layer.self_attn.o_proj.weight.mul_(-2)
    return layer


def set_bias(*linears):
    for linear in linears:
        linear.bias = torch.nn.Parameter(torch.ones(linear.out_features, dtype=linear.weight.dtype))


# What somebody may do to the layers of a model, of which only some are routed.
DONE = {
    "layers cut": lambda text: setattr(text, "layers", text.layers[:2]),
    "a layer replaced": lambda text: text.layers.__setitem__(2, another(text.layers[2])),
    "layers in another order": lambda text: setattr(text, "layers", torch.nn.ModuleList([text.layers[at] for at in (0, 2, 1)])),
    "norm of one number": lambda text: setattr(text.layers[0].input_layernorm, "weight", torch.nn.Parameter(text.norm.weight.new_full((1,), 0.5).expand(96))),
    "norm of every second number": lambda text: setattr(text.layers[0].input_layernorm, "weight", torch.nn.Parameter(torch.linspace(-1, 1, 192).to(text.norm.weight)[::2])),
    "experts made narrow": lambda text: [narrow(expert) for layer in text.layers[1:] for expert in layer.mlp.experts],
    "experts of another class": lambda text: [layer.mlp.experts.__setitem__(n, Relu(layer.mlp.experts[n])) for layer in text.layers[1:] for n in range(8)],
    "biases of the queries": lambda text: set_bias(*(layer.self_attn.q_b_proj for layer in text.layers)),
    "biases of the output": lambda text: set_bias(*(layer.self_attn.o_proj for layer in text.layers)),
    "biases of experts": lambda text: set_bias(*(expert.up_proj for layer in text.layers[1:] for expert in layer.mlp.experts)),
    "biases of the dense network": lambda text: set_bias(text.layers[0].mlp.up_proj),
    "another scale": lambda text: [setattr(layer.self_attn, "scaling", 1.0) for layer in text.layers],
    "another epsilon": lambda text: [setattr(layer.input_layernorm, "eps", 1.0) for layer in text.layers],
    "a parametrization": lambda text: torch.nn.utils.parametrize.register_parametrization(text.layers[0].self_attn.o_proj, "weight", torch.nn.Tanh()),
}


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a step"])
@pytest.mark.parametrize("what", DONE)
def test_what_is_done_to_a_model_is_heard(what, before):
    model = make({"num_hidden_layers": 3, "num_experts_per_tok": 8, "quantized": False})
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    if before:
        steps(model, ids)
    text = model.language_model.model
    DONE[what](text)
    want = copy.deepcopy(model).float()(ids, use_cache=False).logits
    assert error(steps(model, ids), want) < 0.05
    assert error(model(ids.repeat(1, 5), use_cache=False).logits[:, :9], want) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", ["KimiK26MLP", "KimiK26DecoderLayer"])
def test_a_forward_put_into_a_class_is_called(kind, monkeypatch):
    model = make({})
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    steps(model, ids)
    called, (cls,) = [], {type(m) for m in model.modules() if type(m).__name__ == kind}
    written = cls.forward

    def other(self, *args, **kwargs):
        called.append(self)
        return written(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", other)
    model(ids, use_cache=True)
    assert called


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 60])
def test_autocast_of_a_bfloat16_model(length):
    model = make({"num_experts_per_tok": 8})
    ids = torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(0))
    want = copy.deepcopy(model).float()(ids).logits
    for cached in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert error(model(ids, use_cache=cached).logits, want) < 0.05


@torch.no_grad()
def test_memory_that_was_given_back_is_not_read():
    """As where weights are gathered for a layer and freed after it."""
    model = make({})
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    steps(model, ids)
    model.language_model.model.layers[0].self_attn.o_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        steps(model, ids)


@torch.no_grad()
@pytest.mark.parametrize("held", ["keys first", "elsewhere"])
def test_static_caches_of_another_layout(held):
    model = make({"num_experts_per_tok": 8})
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    want = copy.deepcopy(model).float()(ids, use_cache=False).logits
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    out = model(ids[:, :8], past_key_values=cache)
    for layer in cache.layers:
        if held == "elsewhere":
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        else:
            layer.keys, layer.values = (part.transpose(2, 3).contiguous().transpose(2, 3) for part in (layer.keys, layer.values))
    if held == "elsewhere":
        with pytest.raises((RuntimeError, NotImplementedError)):
            model(ids[:, 8:], past_key_values=out.past_key_values)
    else:
        assert error(model(ids[:, 8:], past_key_values=out.past_key_values).logits, want[:, 8:]) < 0.05


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model = make({})
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    want = model(ids[:, 6:7], past_key_values=copy.deepcopy(cache)).logits
    model(ids[:, 7:], past_key_values=other)
    assert torch.equal(model(ids[:, 6:7], past_key_values=cache).logits, want)


@torch.no_grad()
def test_nothing_of_nobody():
    with pytest.raises(ValueError, match="at least one of each"):
        make({})(torch.zeros(0, 5, dtype=torch.long))


class Elsewhere(torch.Tensor):
    """A weight whose numbers are not in a memory of its own."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only
        out = function(*unwrap(cls, lambda one: one.held, args), **unwrap(cls, lambda one: one.held, kwargs or {}))
        return cls(out) if function is torch.ops.aten.detach.default else out


@torch.no_grad()
def test_weights_without_memory_of_their_own_are_not_read():
    model = make({})
    ids = torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    want = model(ids, use_cache=True).logits
    projection = model.language_model.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(Elsewhere(projection.weight.detach()), requires_grad=False)
    assert error(model(ids, use_cache=True).logits, want.float()) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_another_model_is_refused(kind):
    model, other = make({}), make({"kv_lora_rank": 32})
    ids = torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=other.config.text_config, max_cache_len=16)
    other(ids, past_key_values=cache)
    with pytest.raises((ValueError, RuntimeError), match="wide|shape"):
        model(ids[:, :1], past_key_values=cache, cache_position=torch.tensor([6]))


@torch.no_grad()
def test_a_cache_of_other_sequences_is_refused():
    model, ids = make({}), torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    for each in (model, model.float()):
        cache = DynamicCache()
        each(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"the cache holds \(2, 1, 6, 64\).* no tokens of 1 sequences"):
            each(ids[:1, :1], past_key_values=cache)


def test_threads_begin_together(monkeypatch):
    """The second is given the first one's decoder and table of experts, though it comes while these are made."""
    model, ids = make({}), torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    text = lambda: model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)  # noqa: E731
    want = copy.deepcopy(model).generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    begin, made = decoding_kimi_k26.NativeDecoder.__init__, []

    def slowly(self, owner):
        begin(self, owner)
        made.append(self)
        time.sleep(0.3)

    monkeypatch.setattr(decoding_kimi_k26.NativeDecoder, "__init__", slowly)
    with ThreadPoolExecutor(4) as threads:
        texts = [threads.submit(text) for _ in range(4)]
        assert all(torch.equal(one.result(timeout=60), want) for one in texts)
    assert len(made) == 1


@torch.no_grad()
def test_experts_may_be_dropped_while_others_decode():
    model, ids = make({}), torch.randint(0, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    text = lambda: model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)  # noqa: E731
    want = text()
    with ThreadPoolExecutor(3) as threads:
        texts = [threads.submit(text) for _ in range(9)]
        while not all(one.done() for one in texts):
            model.expert_store.clear()
        assert all(torch.equal(one.result(), want) for one in texts)
