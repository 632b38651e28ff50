"""Where experts live: the store and its budget, layouts for the CPU, and memory given back to the files."""

import copy
import mmap
import pickle
import random
import sys
import threading

import pytest
import torch

from kimi_k26 import KimiK26ForConditionalGeneration, decoding_kimi_k26
from kimi_k26 import memory_kimi_k26 as memory
from kimi_k26.checkpoint_kimi_k26 import Checkpoint
from kimi_k26.memory_kimi_k26 import release
from kimi_k26.store_kimi_k26 import ExpertStore, Layout


class Sized(Layout):
    def __init__(self, nbytes):
        self.nbytes = nbytes


@pytest.fixture(params=["native kernels", "PyTorch alone"], autouse=True)
def kernels(request, monkeypatch):
    """All of this holds with and without the kernels of this machine."""
    if request.param == "PyTorch alone":
        for module in ("experts_kimi_k26", "decoding_kimi_k26"):
            monkeypatch.setattr(f"kimi_k26.{module}.library", lambda: None)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def load(folder, **options):
    return KimiK26ForConditionalGeneration.from_pretrained(folder, **options)


def answer(model, ids):
    return model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, eos_token_id=None).tolist()


def test_the_store_counts_and_keeps_what_fits():
    store = ExpertStore(budget=100)
    made = []

    def get(key, size=40):
        return store.get(key, 0, lambda: made.append(key) or Sized(size))

    get("a"), get("b"), get("a")
    assert made == ["a", "b"] and (store.hits, store.misses) == (1, 2)
    assert store.bytes_held == store.bytes_moved == 80
    get("c")  # asked for once, as often as the coldest: no reason to push it out
    get("b")
    assert made == ["a", "b", "c"] and store.hits == 2
    get("c"), get("c"), get("c")  # more often than the least recently used
    assert store.bytes_held <= 100
    before = store.misses
    get("c")
    assert store.misses == before


def test_threads_share_a_store():
    """Six of them, switched as often as Python can: what is counted as held is what is there."""
    store, failed = ExpertStore(budget=100), []

    def work(seed):
        keys = random.Random(seed)
        try:
            for _ in range(5000):
                store.get(keys.randrange(14), 0, lambda: Sized(10))
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and store.bytes_held == 10 * len(store._kept) and store.hits + store.misses == 30_000


def test_a_layout_is_made_again_when_its_tensors_change():
    store = ExpertStore()
    first = store.get("a", 1, lambda: Sized(1))
    assert store.get("a", 1, lambda: Sized(1)) is first
    assert store.get("a", 2, lambda: Sized(1)) is not first and store.bytes_held == 1


def test_counts_fade():
    store = ExpertStore()
    for _ in range(store.FORGET_AFTER + 10):
        store.get("a", 0, lambda: Sized(1))
    assert store._asked["a"] < store.FORGET_AFTER


def test_all_layers_share_one_store_and_copies_have_their_own(tiny_checkpoint, ids):
    model = load(tiny_checkpoint)
    expected = answer(model, ids)
    assert model.expert_store.misses > 0 and model.expert_store.bytes_held > 0
    other = copy.deepcopy(model)
    assert other.expert_store is not model.expert_store and other.expert_store.bytes_held == 0
    stores = {id(layer.mlp.experts.store) for layer in other.language_model.model.layers[1:]}
    assert stores == {id(other.expert_store)}
    assert answer(other, ids) == expected
    assert pickle.loads(pickle.dumps(model.expert_store)).budget == model.expert_store.budget


def test_any_budget_gives_the_same_tokens(tiny_checkpoint, ids):
    model = load(tiny_checkpoint)
    expected, whole = answer(model, ids), model.expert_store.bytes_held
    for budget in (0, whole // 4, whole // 2):
        model.set_budget(expert_budget=budget)
        assert answer(model, ids) == expected
        assert model.expert_store.bytes_held <= budget
        assert model.expert_store.misses > 0
    small = load(tiny_checkpoint, expert_budget="64KiB")
    assert small.expert_store.budget == 2**16 and answer(small, ids) == expected


def test_memory_too_small_for_the_layers_streams_them(tiny_checkpoint, ids):
    expected = answer(load(tiny_checkpoint), ids)
    model = load(tiny_checkpoint, max_memory={"cpu": "200KiB"}, device_map="auto")
    assert model.language_model.model.streams and model.expert_store.budget == 100 * 2**10
    assert answer(model, ids) == expected
    roomy = load(tiny_checkpoint, max_memory={"cpu": "1GiB"})
    assert not roomy.language_model.model.streams


@pytest.mark.parametrize("copied", [False, True])
@torch.no_grad()
def test_what_the_next_layer_would_choose_is_read_ahead(tiny_checkpoint, ids, copied, monkeypatch):
    model = load(tiny_checkpoint, dtype=torch.float32, expert_budget=0)
    model = copy.deepcopy(model) if copied else model
    routing = [layer.mlp for layer in model.language_model.model.layers if hasattr(layer.mlp, "experts")]
    place = {id(expert): (at, number) for at, mlp in enumerate(routing) for number, expert in enumerate(mlp.experts)}
    asked = []
    monkeypatch.setattr("kimi_k26.experts_kimi_k26.read_ahead", lambda expert: asked.append(place[id(expert)]))
    for rows in (1, 3, 40):
        asked.clear()
        x = torch.randn(rows, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
        now, later = ({(at, n) for n in routing[at].gate(x)[2].flatten().tolist()} for at in (0, 1))
        routing[0](x.unsqueeze(0))
        assert set(asked[: len(now)]) == now
        assert asked[len(now) :] == [] if rows == 40 else set(asked[len(now) :]) == later
    model.set_budget(expert_budget="1GiB")  # holds all
    asked.clear()
    routing[0](x[:1].unsqueeze(0))
    assert {at for at, _ in asked} == {0}
    model.bfloat16().set_budget(expert_budget=0)
    asked.clear()
    answer(model, ids)
    assert {at for at, _ in asked} == set(range(len(routing)))


def test_few_rows_on_the_int4_product_are_close_to_the_reference(tiny_checkpoint):
    model = load(tiny_checkpoint)
    experts = model.language_model.model.layers[1].mlp.experts
    for rows in (1, 2, 7, 48, 49):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        with torch.no_grad():
            reference = experts[3](x).float()
            got = experts.run(3, x).float()
        assert (got - reference).norm() <= 0.02 * reference.norm()
    assert model.expert_store.hits == 3 and model.expert_store.misses == 1  # 49 rows go another way


def test_changed_words_are_seen(tiny_checkpoint):
    model = load(tiny_checkpoint)
    experts = model.language_model.model.layers[1].mlp.experts
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        before = experts.run(0, x)
        experts[0].down_proj.weight_packed.copy_(experts[1].down_proj.weight_packed)
        after = experts.run(0, x)
        reference = experts[0](x)
    assert not torch.equal(before, after)
    assert (after.float() - reference.float()).norm() <= 0.02 * reference.float().norm()


def test_gradients_take_the_way_that_has_them(tiny_checkpoint):
    model = load(tiny_checkpoint)
    experts = model.language_model.model.layers[1].mlp.experts
    x = torch.randn(2, 128).to(torch.bfloat16).requires_grad_()
    experts.run(0, x).sum().backward()
    assert x.grad is not None and model.expert_store.misses == 0


def test_released_memory_is_read_again_and_written_memory_stays(tiny_checkpoint):
    model = load(tiny_checkpoint)
    checkpoint = Checkpoint(tiny_checkpoint)
    embedding = model.get_input_embeddings()
    name = "language_model.model.embed_tokens.weight"
    release(embedding)
    assert torch.equal(embedding.weight, checkpoint.tensor(name))
    with torch.no_grad():
        embedding.weight[5] = 1.0
    release(embedding)  # what was written is nowhere else
    assert bool((embedding.weight[5] == 1.0).all())


@pytest.mark.parametrize("change", ["data", "merge", "cast", "move", "pickle"])
def test_released_memory_is_never_what_only_we_have(change, tiny_checkpoint):
    """Written past the version count, moved elsewhere, or copied with all its attributes."""
    module = load(tiny_checkpoint).language_model
    if change == "data":
        module.lm_head.weight.data[7] = 1.0
    elif change == "merge":
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data += 0.5
    elif change == "cast":
        module.float()
    elif change == "move":
        module._apply(lambda tensor: tensor.clone())
    else:
        module = pickle.loads(pickle.dumps(module))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    release(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_what_every_token_reads_settles_in_large_pages(tiny_checkpoint, ids, monkeypatch, tmp_path):
    """In inference mode, and without: the bits are those of the files, and the files' memory is given back."""
    monkeypatch.setattr(memory, "LARGE_PAGE", mmap.PAGESIZE)
    given_back = []
    monkeypatch.setattr(memory, "release", lambda *modules: given_back.extend(memory._mapped(modules)))
    plain, model = load(tiny_checkpoint, dtype="bfloat16"), load(tiny_checkpoint, dtype="bfloat16")
    settled = model.language_model.model.layers[1].dense()
    with torch.inference_mode():
        memory.settle(*settled)
    moved = {id(parameter) for module in settled for parameter in module.parameters()}
    for (name, parameter), before in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(parameter, before) and not parameter.is_inference(), name
        if hasattr(mmap, "MADV_HUGEPAGE") and id(parameter) in moved:
            assert parameter.as_in_file[0] != parameter.data_ptr() and parameter.untyped_storage().nbytes() == parameter.nbytes, name
        elif hasattr(parameter, "as_in_file"):
            assert parameter.as_in_file[0] == parameter.data_ptr(), name
    assert bool(given_back) == hasattr(mmap, "MADV_HUGEPAGE")
    assert answer(model, ids) == answer(plain, ids)
    model.save_pretrained(tmp_path)
    assert answer(load(tmp_path), ids) == answer(plain, ids)


def test_layers_that_must_stream_go_back_to_their_files(tiny_checkpoint, ids, monkeypatch):
    """When the memory they may take is known before the first token, or bounded after some; what was written to stays."""
    monkeypatch.setattr(memory, "LARGE_PAGE", mmap.PAGESIZE)
    model = load(tiny_checkpoint, dtype="bfloat16")
    kept, written = (layer.self_attn.o_proj.weight for layer in model.language_model.model.layers[:2])
    settles = decoding_kimi_k26.library() is not None and hasattr(mmap, "MADV_HUGEPAGE")

    def is_in_file(weight):
        return weight.as_in_file[0] == weight.data_ptr()

    first = answer(model, ids)
    assert is_in_file(kept) == (not settles)
    written.data[0, 0] += 1
    changed = answer(model, ids)
    model.set_budget(memory=1)
    assert model.language_model.model.streams and is_in_file(kept) and is_in_file(written) == (not settles)
    assert answer(model, ids) == changed
    bounded = load(tiny_checkpoint, dtype="bfloat16", max_memory={"cpu": 1})
    assert answer(bounded, ids) == first and all(map(is_in_file, (p for p in bounded.parameters() if hasattr(p, "as_in_file"))))
