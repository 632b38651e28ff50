"""A decode step in one compiled graph: no breaks, no second graph, the same answers."""

import shutil
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.native_kimi_k26 import library

from .native_models import make as make_native
from .tiny_models import config_dict, fill

PROMPT, STEPS = 8, 200
pytestmark = pytest.mark.usefixtures("no_graphs_of_others")
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32, "intermediate_size": 64}


def make(dtype, **changes):
    model = fill(KimiK26ForConditionalGeneration(KimiK26Config(**config_dict(vision=False, **changes))).eval())
    return model.to(dtype)


def prefilled(model, ids, **kwargs):
    cache = StaticCache(config=model.config.text_config, max_cache_len=ids.shape[1] + 4)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache, cache_position=torch.arange(PROMPT), **kwargs)
    return cache


def one(model, cache, ids, at, **kwargs):
    given = {"input_ids": ids[:, at : at + 1], "past_key_values": cache, "cache_position": torch.tensor([at])}
    return model(**given, **kwargs).logits


@pytest.mark.parametrize("dtype, backend", [(torch.float32, "aot_eager"), (torch.bfloat16, "inductor")])
@pytest.mark.parametrize("quantized", [True, False])
def test_one_graph_for_all_steps(dtype, backend, quantized):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("no compiler")
    model = make_native({"quantized": quantized}).to(dtype)
    ids = torch.randint(0, 90, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        caches = [prefilled(model, ids) for _ in range(2)]
        for at in range(PROMPT, PROMPT + STEPS):
            want, got = one(model, caches[0], ids, at), one(compiled, caches[1], ids, at)
            if dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            elif at == PROMPT:  # later a rounding may have changed the choice of an expert
                assert (got - want).abs().max() < 0.03 * want.abs().max()
        assert counter.frame_count == 1
        for mine, theirs in zip(*(cache.layers for cache in caches)):
            assert mine.keys.shape == theirs.keys.shape and mine.keys[:, :, -5].any() and theirs.keys[:, :, -5].any()


@pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")
def test_the_layers_are_one_operation_of_the_kernels():
    """Roundings apart, what the kernels write into a static cache is what they write without a graph."""
    model = make_native({})
    ids = torch.randint(0, 90, (1, PROMPT + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, traced = (prefilled(model, ids) for _ in range(2))
        one(model, plain, ids, PROMPT)
        assert model.language_model.model.native is not None
        graphs = []

        def keep(graph, inputs):
            graphs.append(str(graph.graph))
            return graph.forward

        one(torch.compile(model, backend=keep, fullgraph=True, dynamic=False), traced, ids, PROMPT)
    assert len(graphs) == 1 and graphs[0].count("decode") >= 1 and "bmm" not in graphs[0]
    for mine, theirs in zip(plain.layers, traced.layers):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")
def test_a_full_static_cache_is_refused_by_the_graph():
    model = make_native({})
    ids = torch.randint(0, 90, (1, PROMPT + 8), generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        cache = prefilled(model, ids[:, : PROMPT + 1])
        with pytest.raises(ValueError, match="room for 13 tokens"):
            for at in range(PROMPT, PROMPT + 8):
                one(compiled, cache, ids, at)


@pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")
def test_a_static_cache_of_another_model_is_refused_by_the_graph():
    model, other = make_native({}), make_native({"kv_lora_rank": 32})
    ids = torch.randint(0, 90, (1, PROMPT + 8), generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        one(compiled, prefilled(model, ids), ids, PROMPT)
        torch._dynamo.reset()
        with pytest.raises(ValueError, match="wide"):
            one(torch.compile(model, backend="eager", fullgraph=True, dynamic=False), prefilled(other, ids), ids, PROMPT)


def test_others_compile_meanwhile():
    """What another thread compiles is none of this thread's business."""
    models = [make(torch.float32, quantized=True, **WIDE), make_native({})]
    ids = torch.randint(0, 90, (1, PROMPT + 1), generator=torch.Generator().manual_seed(2))
    done = threading.Event()

    def compile_something():
        for number in range(20):
            torch.compile(lambda x, number=number: (x.sin() * number).cos(), backend="aot_eager")(torch.randn(number + 2))
        done.set()

    def answers():
        return [one(model, prefilled(model, ids), ids, PROMPT) for model in models]

    with torch.no_grad():
        want = answers()
        thread = threading.Thread(target=compile_something)
        thread.start()
        while not done.is_set():
            assert all(map(torch.equal, answers(), want))
        thread.join()


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(strict):
    model = make_native({})
    with torch.no_grad(), pytest.raises(Exception, match="torch.export cannot"):
        torch.export.export(model, (), {"input_ids": torch.arange(5)[None], "use_cache": False}, strict=strict)


def test_generate_compiles_with_a_static_cache():
    """The library's own `generate` gives the same greedy text with `cache_implementation="static"`."""
    model = make(torch.float32, quantized=True, **WIDE)
    ids = torch.randint(0, 90, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)
