"""The decode step of a compiled graph: the kernels' own answers to the last bit, whatever happens to the model meanwhile."""

import copy
import gc
import importlib.util
import sys
import threading

import pytest
import torch
from transformers import StaticCache

from kimi_k26 import graph_kimi_k26, text_kimi_k26
from kimi_k26.decoding_kimi_k26 import NativeDecoder
from kimi_k26.graph_kimi_k26 import STEPS

from .native_models import make, needs_kernels


PROMPT, ROOM = 6, 120
pytestmark = [needs_kernels, pytest.mark.usefixtures("no_graphs_of_others")]


@pytest.fixture
def looks(monkeypatch):
    """A list that grows with every step that Python sees of layers as one."""
    seen, run = [], NativeDecoder.run
    monkeypatch.setattr(NativeDecoder, "run", lambda *given: seen.append(1) or run(*given))
    return seen


class Dialogue:
    """A static cache, and the steps that `call` takes over it: `model` itself or a graph of it."""

    def __init__(self, model, call, rows: int = 1, padded: bool = False, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.call, self.at, self.mask = call, PROMPT, None
        self.ids = torch.randint(0, 90, (rows, ROOM), generator=generator)
        if padded:
            self.mask = torch.ones(rows, ROOM, dtype=torch.long)
            self.mask[0, :2] = 0
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=ROOM)
        with torch.no_grad():
            model(self.ids[:, :PROMPT], past_key_values=self.cache, cache_position=torch.arange(PROMPT), **self.masked(PROMPT))

    def masked(self, count: int) -> dict:
        return {} if self.mask is None else {"attention_mask": self.mask[:, :count]}

    @torch.no_grad()
    def step(self, call=None):
        place, ids = torch.tensor([self.at]), self.ids[:, self.at : self.at + 1]
        self.at += 1
        return (call or self.call)(ids, past_key_values=self.cache, cache_position=place, **self.masked(ROOM)).logits

    def agrees(self, model) -> bool:
        """Whether the next step is what the model says without a graph, to the last bit."""
        other = copy.deepcopy(self)
        return torch.equal(self.step(), other.step(model))

    def __deepcopy__(self, memo):
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache, memo)
        return other


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=False)  # whose cosines are those of the model without a graph


@pytest.mark.parametrize(
    "changes, rows, padded",
    [({}, 1, False), ({}, 3, True), ({"quantized": False}, 2, False), ({"n_group": 4, "topk_group": 2, "q_lora_rank": None}, 2, True)],
)
def test_the_same_bits_with_few_looks(looks, changes, rows, padded):
    model = make(changes)
    plain, traced = (Dialogue(model, call, rows, padded) for call in (model, compiled(model)))
    for _ in range(3 * STEPS):
        assert torch.equal(plain.step(), traced.step())
    for mine, theirs in zip(plain.cache.layers, traced.cache.layers):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    looks.clear()
    for _ in range(2 * (STEPS + 1)):
        plain.step()  # first, as an expert that is new takes a look
        traced.step()
    assert len(looks) == 2 * (STEPS + 1) + 2 or graph_kimi_k26._direct() is None


def test_what_nobody_was_asked_for_is_counted():
    model = make({})
    store = model.language_model.model.layers[-1].mlp.experts.store

    def hits(call) -> int:
        dialogue, before = Dialogue(model, call), store.hits
        for _ in range(2 * (STEPS + 1) + 1):  # the last one takes a look
            dialogue.step()
        return store.hits - before

    hits(model)  # all experts are known then
    assert hits(model) == hits(compiled(model)) > 0


def weights_of_layers(model):
    return [parameter for parameter in model.language_model.model.layers.parameters() if parameter.dtype == torch.bfloat16]


@pytest.mark.parametrize("change", ["other memory", "moved", "an expert, then a prompt", "the store is cleared, then a prompt"])
def test_changes_are_seen(change):
    model = make({})
    traced = Dialogue(model, compiled(model))
    for _ in range(STEPS + 3):
        traced.step()
    layers = model.language_model.model.layers
    if change == "other memory":
        for parameter in weights_of_layers(model):
            parameter.data = parameter.data * 1.25
        for _ in range(STEPS):
            traced.step()
    elif change == "moved":
        model.float().to(torch.bfloat16)
    elif change == "an expert, then a prompt":
        for layer in layers:
            for expert in getattr(layer.mlp, "experts", ()):
                expert.down_proj.weight_scale.data = expert.down_proj.weight_scale.data * 2
        Dialogue(model, model, seed=1).step()
    else:
        layers[-1].mlp.experts.store.clear()
        Dialogue(model, model, seed=1).step()
    gc.collect()  # what the kernels read must still be there
    for _ in range(STEPS + 2):
        assert traced.agrees(model)


def test_a_prompt_is_a_look():
    """A dialogue that begins anew over the same cache and goes on from where it was is not taken for the same."""
    model = make({})
    traced = Dialogue(model, compiled(model))
    for _ in range(40):
        traced.step()
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data * 1.5
    traced.cache.reset()
    with torch.no_grad():
        model(traced.ids[:, : traced.at], past_key_values=traced.cache, cache_position=torch.arange(traced.at))
    assert traced.agrees(model)


def test_a_cache_for_fewer_sequences_is_refused():
    model = make({})
    one, three = Dialogue(model, compiled(model)), Dialogue(model, None, rows=3)
    for _ in range(3):
        one.step()
    three.call, three.cache, three.at = one.call, one.cache, one.at
    with pytest.raises(ValueError, match="room for 1 sequences, and there are 3"):
        three.step()


def test_dialogues_in_turn():
    model = make({})
    call = compiled(model)
    traced = [Dialogue(model, call, seed=seed) for seed in range(3)]
    for turn in range(24):
        assert traced[turn % 3].agrees(model)
        assert turn % 4 or traced[turn % 3].agrees(model)


def test_threads_share_a_model():
    model = make({})
    call = compiled(model)
    plain, traced = ([Dialogue(model, how, seed=seed) for seed in range(4)] for how in (model, call))
    wanted = [[dialogue.step() for _ in range(40)] for dialogue in plain]
    traced[0].step(), traced[0].step()  # the graph is there
    traced[0] = Dialogue(model, call, seed=0)
    found = [[] for _ in traced]
    threads = [threading.Thread(target=lambda n=n: found[n].extend(traced[n].step() for _ in range(40))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(mine, theirs) for pair in zip(wanted, found) for mine, theirs in zip(*pair))
    assert [len(steps) for steps in found] == [40] * 4


def test_under_a_budget_the_store_is_asked_each_time(looks):
    model = make({})
    model.language_model.model.layers[-1].mlp.experts.store.budget = 10_000
    traced = Dialogue(model, compiled(model))
    looks.clear()
    for _ in range(20):
        assert traced.agrees(model)
    assert len(looks) >= 20


def test_a_model_that_is_no_more_is_named():
    if graph_kimi_k26._direct() is None:
        pytest.skip("this PyTorch has no interface for kernels without Python")
    x, cos, at = torch.zeros(1, 1, 32, dtype=torch.bfloat16), torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="is no more"):
        graph_kimi_k26._operation(x, cos, cos, at, None, [x[None]], [x[None]], None, 12345)


def test_without_the_interface_python_calls_the_kernels(monkeypatch, looks):
    name = "kimi_k26.graph_again"  # as one more copy of the code has it
    spec = importlib.util.spec_from_file_location(name, graph_kimi_k26.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, again)
    spec.loader.exec_module(again)
    again.INTERFACE.append("no such function")
    monkeypatch.setattr(text_kimi_k26, "compiled_decode", again.compiled_decode)
    model = make({})
    traced = Dialogue(model, compiled(model))
    looks.clear()
    for _ in range(20):
        traced.step()
    assert len(looks) == 20 and again._direct() is None and traced.agrees(model)
