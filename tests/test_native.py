"""The native kernels beside the plain path in float32 on the same bfloat16 weights: they may be off by roundings only."""

import copy

import pytest
import torch

from kimi_k26 import attention_kimi_k26, decoding_kimi_k26, native_kimi_k26
from kimi_k26.attention_kimi_k26 import rotate_pairs
from kimi_k26.experts_kimi_k26 import Routing
from kimi_k26.native_kimi_k26 import attention, dequantize, few_rows, finish, many_rows
from kimi_k26.quantization_kimi_k26 import dequantize_int4, quantize_int4

from .native_models import KINDS, SHAPES, each_kind, error, inputs, make, needs_kernels, one_step, use_kernels  # noqa: F401: a fixture


pytestmark = [needs_kernels, pytest.mark.once]

LONG_ROWS = {"group_size": 128, "hidden_size": 640, "moe_intermediate_size": 128}  # longer than the nearest cache has them at once


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows, past, threads", [(1, 0, 2), (1, 37, 1), (3, 200, 3), (9, 64, 2), (2, 300, 1), (32, 31, 1)])
def test_a_layer_is_the_plain_one(shape, rows, past, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = make(SHAPES[shape])
    plain = copy.deepcopy(model).float()
    given = inputs(model, rows, past)
    for layer, reference in zip(model.language_model.model.layers, plain.language_model.model.layers):
        got = one_step(layer, *given)
        assert layer.native is not None and layer.native.fits
        want = one_step(reference, *(part.float() for part in given))
        assert reference.native is None
        assert error(got[0], want[0]) < 0.02
        assert error(got[2], want[2]) < 0.01 and error(got[3], want[3]) < 0.01
        if want[1] is not None:
            assert error(got[1], want[1]) < 0.02


@pytest.mark.usefixtures("each_kind")
def test_padding_is_not_seen():
    model = make({})
    layer = model.language_model.model.layers[1]
    x, cos, sin, latents, rotary = inputs(model, 3, 70)
    padding = torch.ones(3, 71, dtype=torch.long)
    padding[0, :5], padding[1, :40], padding[2, :70] = 0, 0, 0
    got = one_step(layer, x, cos, sin, latents, rotary, padding)[0]
    assert layer.native is not None
    for row, hidden in enumerate((5, 40, 70)):
        here = slice(row, row + 1)
        alone = one_step(layer, x[here], cos[here], sin[here], latents[here, :, hidden:], rotary[here, :, hidden:])[0]
        assert error(got[here], alone.float()) < 0.01


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", ["as published", "bfloat16 experts", "forty-nine heads"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_rows(shape, threads, monkeypatch):
    """To the last bit: who shares a batch changes nothing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = make(SHAPES[shape])
    layer = model.language_model.model.layers[1]
    given = inputs(model, 11, 50)
    together = one_step(layer, *given)[0]
    for row in range(11):
        alone = one_step(layer, *(part[row : row + 1] for part in given))[0]
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, outputs, inputs_", [(1, 5, 32), (2, 33, 64), (7, 16, 96), (20, 50, 160), (1, 4096, 48), (40, 18, 1120), (1, 20, 33), (3, 20, 41), (17, 20, 1)])
def test_few_rows(rows, outputs, inputs_):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs_).bfloat16(), torch.randn(outputs, inputs_).bfloat16()
    want = x.float() @ weight.float().T
    got = few_rows(x, weight)
    torch.testing.assert_close(got.float(), want, rtol=0.01, atol=0.01 * inputs_**0.5)
    assert all(torch.equal(got[row : row + some], few_rows(x[row : row + some], weight)) for some in (1, 2, 3) for row in range(0, rows, some))


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("rows, outputs, inputs_", [(1, 5, 32), (17, 33, 64), (40, 64, 1120), (600, 70, 544)])
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows(rows, outputs, inputs_, bias):
    """Values of very different sizes, too: what is small beside its neighbours in a stretch is rounded most."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs_) * torch.randn(rows, inputs_).exp(), torch.randn(outputs, inputs_) * torch.rand(outputs, 1)
    x, weight, added = x.bfloat16(), weight.bfloat16(), torch.randn(outputs).bfloat16() if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert error(many_rows(x, weight, added), want) < 1.1 * error(want.bfloat16(), want) + 1e-4


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("size", [16, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_what_products_become(size, biased):
    """To half a unit in the last place: of what is not rounded before."""
    torch.manual_seed(0)
    x, residual = torch.randn(9, size) * torch.randn(9, size).exp() * 3, torch.randn(9, size).bfloat16()
    x[0, :6] = torch.tensor([0.0, -0.0, 1e30, -1e30, 80.0, -80.0])
    x, bias = x.bfloat16(), torch.randn(size).bfloat16() if biased else None
    plain = x.double() if bias is None else x.double() + bias.double()
    gelu = torch.nn.functional.gelu(plain, approximate="tanh")
    for wanted, given in ((gelu, (True, None)), (plain + residual.double(), (False, residual)), (gelu + residual.double(), (True, residual))):
        torch.testing.assert_close(finish(x.clone(), bias, *given).double(), wanted, rtol=2**-8, atol=1e-5)
    x[4, 7], x[5, 8] = float("nan"), float("inf")
    broken = ~finish(x.clone(), bias, True, residual).isfinite()
    assert broken.nonzero().tolist() == [[4, 7], [5, 8]]


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_what_comes_of_it(bias):
    torch.manual_seed(0)
    module, x, residual = torch.nn.Linear(96, 70, bias=bias).bfloat16(), torch.randn(2, 30, 96).bfloat16(), torch.randn(2, 30, 70).bfloat16()
    wanted = torch.nn.functional.gelu(module(x), approximate="tanh") + residual
    apply_linear = decoding_kimi_k26.apply_linear
    assert torch.equal(apply_linear(module, x, gelu=True, residual=residual), wanted)  # with gradients it is PyTorch's
    before = residual.clone()
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)  # not as the kernel reads it
    with torch.no_grad():
        for given in (residual, turned, residual.float()):
            assert error(apply_linear(module, x, gelu=True, residual=given), wanted) < 0.01
        assert torch.equal(residual, before)
        for other in (residual[0, 0], residual[:1], residual[None]):  # of another shape, which PyTorch spreads
            assert error(apply_linear(module, x, residual=other), module(x) + other) < 0.01
        module.register_forward_hook(lambda _, inputs_, out: out * 0)
        assert torch.equal(apply_linear(module, x, residual=residual), residual)


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    x[3, 50] = bad
    broken = ~many_rows(x, weight).isfinite()
    assert broken[3].all() and not broken[:3].any() and not broken[4:].any()
    parts = [torch.randn(1, 40, *size).bfloat16() for size in ((3, 24), (3, 8), (3, 24), (8,), (3, 20))]
    parts[2][0, 30, 1] = bad
    broken = attention(*parts, 0, None, 0.3).isnan()[0]
    assert broken[30:, 1].all() and not broken[:30].any() and not broken[:, [0, 2]].any()
    model = make({})
    given = inputs(model, 3, 40)
    given[3][1, 0, 30, 2] = bad
    finite = one_step(model.language_model.model.layers[1], *given)[0].isfinite()
    assert not finite[1].any() and finite[[0, 2]].all()


@pytest.mark.usefixtures("each_kind")
def test_no_expert_is_chosen_twice():
    """Not even where scores are no numbers: a row would count twice among its expert's."""
    model = make({})
    layer = model.language_model.model.layers[1]
    layer.mlp.gate.e_score_correction_bias.data[[0, 1, *range(3, len(layer.mlp.experts))]] = float("nan")
    assert bool(one_step(layer, *inputs(model, 32, 4))[0].isfinite().all())


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_where_pytorch_is_slow(rows, bias, monkeypatch):
    monkeypatch.setattr(decoding_kimi_k26, "HAS_FAST_PRODUCTS", False)
    monkeypatch.setattr(decoding_kimi_k26, "WIDENED", 4096)  # of the 70 outputs below 42 at a time
    torch.manual_seed(0)
    module = torch.nn.Linear(96, 70, bias=bias).bfloat16()
    x = torch.randn(2, rows, 96).bfloat16()
    with torch.no_grad():
        got, wanted = decoding_kimi_k26.apply_linear(module, x), module.float()(x.float())
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    assert (got - wanted).abs().max() <= wanted.abs().max() / 256  # half a unit in the last place, after rounding once
    hooked = torch.nn.Linear(96, 70).bfloat16()
    hooked.register_forward_hook(lambda *_: "heard")
    with torch.no_grad():
        assert decoding_kimi_k26.apply_linear(hooked, x) == "heard"
    assert decoding_kimi_k26.apply_linear(module.bfloat16(), x).requires_grad  # with gradients it is PyTorch's


def test_all_kinds_round_alike(monkeypatch):
    """What is no product has the same bits from all kinds of kernels; norms and products all but the last."""
    torch.manual_seed(0)
    x, weight, gain = torch.randn(5, 224).bfloat16(), torch.randn(37, 224).bfloat16(), torch.randn(224).bfloat16()
    angles = torch.randn(5, 1, 112)
    parts = [torch.randn(1, 40, 3, 64).bfloat16() for _ in range(2)]
    turning, rotary = torch.randn(1, 40, 3, 32).bfloat16(), torch.randn(1, 40, 32).bfloat16()
    words, scale = quantize_int4(torch.randn(48, 128), 32)
    results = []
    for kind in KINDS:
        use_kernels(monkeypatch, kind)
        plain = torch.empty(48, 128, dtype=torch.bfloat16)
        dequantize(words, scale.bfloat16(), plain)
        turned = native_kimi_k26.rotate(x.view(5, 1, 224), angles.cos(), angles.sin())
        attended = attention(parts[0], turning, parts[1], rotary, parts[1], 0, None, 0.1)
        results.append(((turned, plain), (native_kimi_k26.norm(x, gain, 1e-5), few_rows(x, weight), attended)))
    (same, near), *others = results
    for same_too, near_too in others:
        assert all(map(torch.equal, same, same_too))
        for one, other in zip(near, near_too):
            assert (one.float() - other.float()).abs().max() <= one.abs().max() / 128


@pytest.mark.parametrize("shape", [(1, 50, 16, 64), (2, 7, 3, 6), (5, 4, 72), (1, 1, 1, 64), (2, 3, 1, 34)])
def test_turning_pairs_gives_the_same_bits(shape, monkeypatch):
    """Of a part of longer rows, as a query's rotary part is; and of what lies otherwise, which the plain path turns."""
    torch.manual_seed(sum(shape))
    held = torch.randn(*shape[:-1], shape[-1] + 32, dtype=torch.bfloat16)
    angles = torch.rand(*shape[:-2], 1, shape[-1] // 2) * 6
    own, calls = attention_kimi_k26.rotate, []
    monkeypatch.setattr(attention_kimi_k26, "rotate", lambda *given: calls.append(1) or own(*given))
    for x in (held[..., 32:], held[..., :-32].transpose(0, -3).contiguous().transpose(0, -3)):
        cos, sin = angles.cos(), angles.sin()
        expected = rotate_pairs(x, cos, sin)  # with gradients on: plainly
        assert not calls
        with torch.no_grad():
            assert torch.equal(rotate_pairs(x, cos, sin), expected)
            calls.clear()
    with torch.no_grad():
        rotate_pairs(held[..., 32:], cos, sin)
    assert calls


@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantizing_gives_the_same_bits(group):
    torch.manual_seed(0)
    words, scale = quantize_int4(torch.randn(37, 256).bfloat16(), group)
    out = torch.empty(37, 256, dtype=torch.bfloat16)
    dequantize(words, scale, out)
    assert torch.equal(out, dequantize_int4(words, scale, torch.bfloat16))


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("changes", [SHAPES["as published"], SHAPES["bfloat16 experts"], SHAPES["group size 64"], LONG_ROWS])
@pytest.mark.parametrize("rows", [2, 5, 40, 300])
def test_experts_on_many_rows(changes, rows):
    model = make(changes)
    experts = model.language_model.model.layers[1].mlp.experts
    reference = copy.deepcopy(experts).float()
    torch.manual_seed(rows)
    x = torch.randn(rows, experts.sizes["hidden"]).bfloat16()
    weights = torch.rand(rows, 3)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(rows)])  # three experts of eight get nothing
    with torch.no_grad():
        got, want = experts(x, weights, chosen), reference(x.float(), weights, chosen)
    assert experts.store.misses == len(chosen.unique()) and reference.store.misses == 0
    assert error(got, want) < 0.01
    if rows == 300:  # the same bits with fewer rows to an expert
        with torch.no_grad():
            assert torch.equal(experts(x[:40], weights[:40], chosen[:40]), got[:40])


def test_a_share_of_the_experts():
    """What some experts add and what the others add makes up the whole."""
    model = make({})
    experts = model.language_model.model.layers[1].mlp.experts
    torch.manual_seed(0)
    x, weights = torch.randn(20, 96).bfloat16(), torch.rand(20, 3)
    routing = Routing(weights, torch.stack([torch.randperm(8)[:3] for _ in range(20)]), 8)
    with torch.no_grad():
        parts = experts.native_share(range(3), x, routing).float() + experts.native_share(range(3, 8), x, routing).float()
        assert error(experts.native_share(range(8), x, routing), parts) < 0.01


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("outputs, inputs_", [(2056, 384), (72, 4128), (8, 64)])
def test_few_rows_on_several_threads(outputs, inputs_, monkeypatch):
    """Each output is made once, whoever is slower: threads that have none left take from others', here with fewer processors than threads."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, inputs_).bfloat16(), torch.randn(outputs, inputs_).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    want = few_rows(x, weight)
    assert error(want, x.float() @ weight.float().T) < 0.01
    for threads in (2, 3, 7) * 5:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        torch.full_like(want, float("nan"))  # whose memory the result most likely gets
        assert torch.equal(few_rows(x, weight), want)


@pytest.mark.usefixtures("each_kind")
@pytest.mark.parametrize("shape", ["as published", "bfloat16 experts"])
def test_many_rows_on_several_threads(shape, monkeypatch):
    model = make({**SHAPES[shape], "num_experts_per_tok": 3})
    experts, layer = model.language_model.model.layers[1].mlp.experts, model.language_model.model.layers[1]
    torch.manual_seed(0)
    x, weights = torch.randn(90, experts.sizes["hidden"]).bfloat16(), torch.rand(90, 3)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(90)])
    parts = [torch.randn(2, 70, *size).bfloat16() for size in ((3, 24), (3, 8), (3, 24), (8,), (3, 20))]
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with torch.no_grad():
            step = one_step(layer, *inputs(model, 3, 40))[0]
            results.append((experts(x, weights, chosen), attention(*parts, 0, None, 0.3), step))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        assert error(other[2], results[0][2].float()) < 0.01  # cached tokens are cut in as many pieces as there are threads
