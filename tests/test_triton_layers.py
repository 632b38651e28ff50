"""Layers that compute by the GPU's kernels, against loops over tokens."""

import copy

import pytest
import torch

from kimi_k26 import KimiK26Config, experts_kimi_k26, store_kimi_k26
from kimi_k26 import triton_kimi_k26 as kernels
from kimi_k26.experts_kimi_k26 import KimiK26Experts, KimiK26MoE, KimiK26Router, Routing
from kimi_k26.store_kimi_k26 import DeviceExpert
from kimi_k26.tests.tiny_models import config_dict, fill
from kimi_k26.triton_kimi_k26 import grouped_experts

from .triton_models import DEVICE, error, loops, needs_triton, rows, small_blocks, tensors_of  # noqa: F401: a fixture


pytestmark = needs_triton

CHECKED = 12  # tokens, from which on every expert is looked at


@pytest.fixture
def calls(monkeypatch, small_blocks) -> list[int]:
    """Layers of experts compute by the kernels, here too; how many tokens these were given, call by call."""
    asked, run = [], grouped_experts

    def counted(x, *rest, **more):
        if "added" not in more:  # else it is the shared expert
            asked.append(len(x))
        return run(x, *rest, **more)

    for module in (kernels, experts_kimi_k26):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    for module in (experts_kimi_k26, store_kimi_k26):
        monkeypatch.setattr(module, "grouped_experts", counted)
    monkeypatch.setattr(experts_kimi_k26, "CHECKED_ROWS", CHECKED)
    monkeypatch.setattr(KimiK26Experts, "native_share", lambda *args: None)
    return asked


@pytest.fixture
def nobody_waits(monkeypatch):
    for name in ("picked", "counts", "by_expert"):
        monkeypatch.setattr(Routing, name, property(lambda routing: pytest.fail("the host asked the device")))


def make_layer(quantized=True, dtype=torch.bfloat16) -> KimiK26MoE:
    """Eight experts, of which a token has two; hidden size 32."""
    config = KimiK26Config(**config_dict(vision=False, quantized=quantized, num_experts_per_tok=2)).text_config
    return fill(KimiK26MoE(config)).requires_grad_(False).to(dtype).to(DEVICE)


def expected_of(layer: KimiK26MoE, x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1)
    _, weights, chosen = layer.gate(flat)
    return (loops(layer.experts, flat, weights, chosen) + layer.shared_experts(flat)).view_as(x)


def tokens_of(batch, length):
    return rows(batch * length, 32, torch.bfloat16, seed=2).view(batch, length, 32)


@pytest.mark.parametrize("quantized", [True, False])
@torch.no_grad()
def test_a_layer_of_experts(quantized, calls, nobody_waits):
    layer = make_layer(quantized)
    for shape in ((1, 1), (2, 2), (3, 10)):
        x = tokens_of(*shape)
        assert error(layer(x)[0], expected_of(layer, x)) < 0.02
    assert calls == [1, 4, 30]


@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_the_router_picks_what_it_picks_without_kernels(normalize, monkeypatch):
    config = KimiK26Config(text_config={"hidden_size": 96, "n_routed_experts": 24, "num_experts_per_tok": 6}).text_config
    router = KimiK26Router(config).to(torch.bfloat16).to(DEVICE)
    router.normalize = normalize
    generator = torch.Generator().manual_seed(3)
    router.weight.copy_(torch.randn(24, 96, generator=generator) / 8)
    router.e_score_correction_bias.copy_(torch.randn(24, generator=generator) / 8)
    x = rows(8, 96, torch.bfloat16)
    ways = []
    for by_kernels in (False, True):
        monkeypatch.setattr(experts_kimi_k26, "has_kernels", lambda device: by_kernels)
        logits, weights, chosen = router(x)
        chosen, order = chosen.sort(dim=1)
        ways.append((logits, weights.gather(1, order), chosen))
    (logits, weights, chosen), (its_logits, its_weights, its_chosen) = ways
    assert its_logits.dtype == its_weights.dtype == torch.float32 and torch.equal(its_chosen, chosen)
    torch.testing.assert_close(its_logits, logits)
    torch.testing.assert_close(its_weights, weights)
    x[0] = float("nan")
    chosen = router(x)[2]
    assert ((chosen >= 0) & (chosen < 24)).all()  # what lies elsewhere is not read


@torch.no_grad()
def test_the_shared_expert_may_be_changed_and_watched(calls):
    layer, x = make_layer(), tokens_of(1, 2)
    seen = []
    handle = layer.shared_experts.register_forward_hook(lambda *args: seen.append(1))
    watched = layer(x)[0]
    assert seen
    handle.remove()
    assert error(layer(x)[0], watched.double()) < 0.02 and len(seen) == 1
    layer.shared_experts.up_proj.weight.mul_(2)  # in the same place
    assert error(layer(x)[0], expected_of(layer, x)) < 0.02
    layer.shared_experts.up_proj.weight = torch.nn.Parameter(layer.shared_experts.up_proj.weight.flip(0))
    assert error(layer(x)[0], expected_of(layer, x)) < 0.02
    assert error(copy.deepcopy(layer)(x)[0], expected_of(layer, x)) < 0.02


@torch.no_grad()
def test_a_share_of_the_experts(calls, nobody_waits):
    layer = make_layer()
    x = tokens_of(1, 20)[0]
    _, weights, chosen = layer.gate(x)
    routing = Routing(weights, chosen, 8)
    parts = [layer.experts.share(numbers, x, routing) for numbers in (range(3), {3: None, 5: None}, (4, 6, 7))]
    assert calls == [20] * 3 and all(part.dtype == torch.float32 for part in parts)
    assert error(sum(parts), loops(layer.experts, x, weights, chosen)) < 0.02
    some = [expert if number in (3, 5) else None for number, expert in enumerate(layer.experts)]
    assert error(parts[1], loops(some, x, weights, chosen)) < 0.02


def test_what_the_kernels_do_not_serve(calls):
    layer, x = make_layer(), tokens_of(1, 3)
    layer(x.clone().requires_grad_())[0].sum().backward()
    with torch.no_grad():
        make_layer(dtype=torch.float32)(x.float())
        seen = []
        handle = layer.experts[5].down_proj.register_forward_hook(lambda *args: seen.append(1))
        many = tokens_of(1, CHECKED)
        layer(many)
        assert seen and not calls
        handle.remove()
        layer(many), layer(x)
        assert calls == [CHECKED, 3]
        layer.experts[2].up_proj = torch.nn.Sequential(layer.experts[2].up_proj)  # as adapters stand around it
        assert error(layer(many)[0], expected_of_any(layer, many)) < 0.02 and len(calls) == 2


def expected_of_any(layer, x):
    """As [`expected_of`], of experts with anything in them."""
    flat = x.flatten(0, 1)
    _, weights, chosen = layer.gate(flat)
    total = torch.zeros(flat.shape, device=x.device)
    for token, row in enumerate(flat):
        for weight, number in zip(weights[token], chosen[token].tolist()):
            total[token] += weight * layer.experts[number](row[None])[0]
    return (total + layer.shared_experts(flat)).view_as(x)


@torch.no_grad()
def test_changed_weights_are_seen(calls):
    layer, x, many = make_layer(), tokens_of(1, 2), tokens_of(1, CHECKED)
    layer(x)
    layer.experts[0].up_proj.weight_packed.copy_(layer.experts[1].up_proj.weight_packed)  # in the same place
    assert error(layer(x)[0], expected_of(layer, x)) < 0.02
    for parameter in layer.parameters():  # all lie elsewhere
        parameter.data = parameter.data.flip(0)
    assert error(layer(x)[0], expected_of(layer, x)) < 0.02
    one = layer.experts[6].down_proj
    one.weight_packed.data = one.weight_packed.data.flip(1)
    assert error(layer(many)[0], expected_of(layer, many)) < 0.02
    one.weight_packed = torch.nn.Parameter(one.weight_packed.flip(1), requires_grad=False)
    for _ in layer.experts:
        got = layer(x)[0]
    assert error(got, expected_of(layer, x)) < 0.02
    assert not set(calls) - {2, CHECKED}


@torch.no_grad()
def test_a_copy_has_experts_of_its_own(calls):
    layer, x = make_layer(), tokens_of(1, 2)
    expected = layer(x)[0]
    other = copy.deepcopy(layer)
    for expert in layer.experts:
        expert.down_proj.weight_packed.zero_()
    assert torch.equal(other(x)[0], expected) and not torch.equal(layer(x)[0], expected)
    assert calls == [2] * 3


@pytest.mark.parametrize("quantized", [True, False])
@torch.no_grad()
def test_an_expert_that_was_sent_to_the_device(quantized, calls):
    layer = make_layer(quantized)
    sent, x = DeviceExpert(layer.experts[3], DEVICE), tokens_of(1, 20)[0]
    for some in (x[:1], x):
        once, first = torch.ones(len(some), 1, device=DEVICE), torch.zeros(len(some), 1, dtype=torch.int64)
        assert error(sent(some), loops([layer.experts[3]], some, once, first)) < 0.02
    assert calls == [1, 20]


def test_weights_come_from_the_store_of_the_device():
    experts, device = make_layer().experts, torch.device("meta")  # stands for one that is not there
    assert experts.weights_on(3, device) is None
    sent = experts.fetch(3, device)
    assert [id(t) for t in experts.weights_on(3, device)] == [id(t) for pair in sent.weights for t in pair]
    assert experts.store.on(device).hits == 0  # looking is not using
    with torch.no_grad():
        experts[3].gate_proj.weight_packed.zero_()  # what was sent is no longer what there is
    assert experts.weights_on(3, device) is None
    assert all(mine is its for mine, its in zip(experts.weights_on(3, DEVICE), tensors_of(experts[3]), strict=True))


@torch.no_grad()
def test_a_table_that_cannot_be_made_is_tried_again_for_many_tokens(calls, monkeypatch):
    experts = make_layer().experts
    tried, run = [], experts.weights_on
    monkeypatch.setattr(experts, "weights_on", lambda *args: tried.append(1) or run(*args))
    elsewhere = torch.device("meta")
    for thorough, lookups in ((False, 8), (False, 0), (True, 8), (False, 0)):
        assert experts.table(experts.shares[0][1], elsewhere, thorough) is None
        assert len(tried) == lookups
        tried.clear()


@torch.no_grad()
def test_a_graph_holds_a_layer(calls, nobody_waits):
    layer, x = make_layer(), tokens_of(1, 4)
    expected = layer(x)[0]
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
