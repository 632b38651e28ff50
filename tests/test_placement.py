"""Which device holds and computes what: the plan by sizes and memory, and models that are carried out by it."""

import copy
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.experts_kimi_k26 import KimiK26MoE, Routing
from kimi_k26.loading_kimi_k26 import built_on_meta
from kimi_k26.placement_kimi_k26 import OF_AN_EXPERT, OFFLOADED, Placement, Sizes, check_map, deal, memory, plan
from kimi_k26.store_kimi_k26 import DeviceExpert, held_bytes
from kimi_k26.tests.pretended_devices import PretendedDevices, accelerator, move
from kimi_k26.tests.tiny_models import config_dict, fill, make_model, media_prompt, words


CPU = torch.device("cpu")
GB, TEXT = 10**9, "language_model.model"


def random_moe(**text) -> KimiK26MoE:
    return fill(KimiK26MoE(KimiK26Config(**config_dict(vision=False, **text)).text_config))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 30])
@pytest.mark.parametrize(
    "shares",
    [
        [(CPU, range(4)), (CPU, range(4, 8))],
        [(CPU, (7, 0, 3)), (None, (1, 2)), (CPU, (4, 5, 6))],
        [(CPU, ()), (None, range(8))],
        [(CPU, (number,)) for number in range(8)],
    ],
    ids=["halves", "mixed", "nothing", "one each"],
)
@torch.no_grad()
def test_shares_add_up_to_the_whole(shares, tokens, quantized):
    moe = random_moe(quantized=quantized)
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens))
    expected, _ = moe(x)
    moe.experts.shares = shares
    out, _ = moe(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_share_is_the_part_of_its_experts():
    moe = random_moe()
    x, weights = torch.randn(5, 32), torch.rand(5, 3)
    chosen = torch.tensor([[0, 1, 2], [3, 4, 5], [7, 6, 5], [2, 1, 0], [4, 2, 0]])
    for rows in (slice(0, 5), slice(2, 3)):
        routing = Routing(weights[rows], chosen[rows], 8)
        got = moe.experts.share((5, 2), x[rows], routing)
        by_hand = torch.zeros_like(x[rows])
        for row, (factors, numbers) in enumerate(zip(weights[rows], chosen[rows])):
            for factor, number in zip(factors, numbers.tolist()):
                if number in (5, 2):
                    by_hand[row] += factor * moe.experts[number](x[rows][row])
        torch.testing.assert_close(got, by_hand)


def test_routing_asks_its_device_once():
    class Counting(torch.Tensor):
        asked = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            Counting.asked += func is torch.Tensor.tolist
            return super().__torch_function__(func, types, args, kwargs or {})

    chosen = torch.tensor([[0, 1], [3, 1]]).as_subclass(Counting)
    routing = Routing(torch.rand(2, 2), chosen, 4)
    there = routing.to(torch.device("meta"))
    assert there.chosen.device.type == there.weights.device.type == "meta"
    assert there.counts == routing.counts == [1, 2, 0, 1] and Counting.asked == 1
    assert there.picked == routing.picked == [[0, 1], [3, 1]] and Counting.asked == 2
    assert routing.to(torch.device("cpu")) is routing


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_an_expert_in_one_piece_of_memory(quantized):
    expert, x = random_moe(quantized=quantized).experts[3], torch.randn(4, 32)
    sent = DeviceExpert(expert, CPU)
    assert torch.equal(sent(x), expert(x))
    stored = sum(p.nbytes for n, p in expert.named_parameters() if not n.endswith("weight_shape"))
    assert stored <= sent.nbytes < stored + 2**9 + 6 * 16
    assert len({part.untyped_storage().data_ptr() for each in sent.weights for part in each}) == 1


def test_memory_on_an_accelerator_comes_in_units():
    assert [held_bytes(n) for n in (0, 1, 512, 513, 2**20, 24_772_608)] == [0, 512, 512, 1024, 2**21, 12 * 2**21]


# The plan


def small(layers=4, experts=12, size=100, block=1000, **fields) -> Sizes:
    """A model of one dense layer and others with experts; every block outside them is of one size."""
    blocks = {f"{TEXT}.layers.0": {f"{TEXT}.layers.0": block}}
    each = {}
    for index in range(1, layers):
        name = f"{TEXT}.layers.{index}"
        blocks[name] = {f"{name}.self_attn": block - 10, f"{name}.mlp.gate": 10}
        each[f"{name}.mlp.experts"] = [size] * experts
    return Sizes(blocks, each, **fields)


def counted(device_map, part=""):
    """How many experts each device has, of the whole model or a layer."""
    return Counter(place for name, place in device_map.items() if OF_AN_EXPERT.search(name) and part in name)


def trunk(device_map):
    return Counter(place for name, place in device_map.items() if not OF_AN_EXPERT.search(name))


def bytes_on(sizes, device_map):
    """What the plan puts on each device; experts as accelerators hold them."""
    held = Counter()
    for parts in sizes.blocks.values():
        for name, size in parts.items():
            held[device_map[name]] += size
    for layer, each in sizes.experts.items():
        for number, size in enumerate(each):
            place = device_map[f"{layer}.{number}"]
            held[place] += size if place in OFFLOADED else held_bytes(size)
    return held


def test_one_device_with_room_gets_all():
    device_map = plan(small(), {0: 10**6, "cpu": 10**6})
    assert set(device_map.values()) == {0}


def test_every_device_works_on_every_layer():
    sizes = small()
    device_map = plan(sizes, {0: 10**5, 1: 10**5, 2: 10**5})
    assert trunk(device_map) == {0: 7} and counted(device_map) == {0: 12, 1: 12, 2: 12}
    for layer in sizes.experts:
        assert set(counted(device_map, layer + ".").values()) == {4}


def test_what_the_first_device_reads_beside_counts():
    """A shared expert as large as two routed ones of the four chosen: two of four more for the first device."""
    sizes = small(layers=11, experts=60, beside=2.0, chosen=4)
    counts = counted(plan(sizes, {0: 10**6, 1: 10**6, 2: 10**6}))
    assert sum(counts.values()) == 600 and counts[1] == counts[2]
    assert counts[1] == counts[0] + 300 == 300  # 600 * 2 / 4 ahead, and nothing left to even that out
    counts = counted(plan(sizes, {0: 10**6, 1: 10**6}))
    assert counts == {0: 150, 1: 450}


def test_full_devices_leave_more_to_the_others():
    sizes = small()
    held = held_bytes(100)
    device_map = plan(sizes, {0: 4000 + 3 * held, 1: 5 * held, 2: 10**6})
    assert trunk(device_map) == {0: 7} and counted(device_map) == {0: 3, 1: 5, 2: 28}
    for layer in sizes.experts:
        assert sorted(counted(device_map, layer + ".").values())[2] in (9, 10)


def test_strategies():
    sizes, amounts = small(), {0: 10**5, 1: 20 * held_bytes(100), 2: 10**5}
    assert plan(sizes, amounts, "balanced") == plan(sizes, amounts, "auto")
    assert counted(plan(sizes, amounts, "balanced_low_0")) == {1: 18, 2: 18}
    assert counted(plan(sizes, amounts, "sequential")) == {0: 36}
    little = {0: 4000 + 10 * held_bytes(100)} | {1: 20 * held_bytes(100), 2: 10**5}
    assert counted(plan(sizes, little, "sequential")) == {0: 10, 1: 20, 2: 6}
    assert counted(plan(sizes, {0: 10**5, 1: 20 * held_bytes(100)}, "balanced_low_0")) == {0: 16, 1: 20}
    with pytest.raises(ValueError, match="one of auto, balanced, balanced_low_0, sequential or a dict, got 'fastest'"):
        plan(sizes, amounts, "fastest")
    with pytest.raises(ValueError, match=r"max_memory\[1\] must be a number of bytes from 0 on, got -5"):
        plan(sizes, {0: 10**5, 1: -5})


def test_too_little_room_goes_to_main_memory_then_disk():
    sizes, held = small(), held_bytes(100)
    device_map = plan(sizes, {0: 4000 + 12 * held, 1: 12 * held, "cpu": 7 * 100})
    # room for two experts each stays free for those that are fetched
    assert trunk(device_map) == {0: 7} and counted(device_map) == {0: 10, 1: 10, "cpu": 7, "disk": 9}
    for layer in sizes.experts:  # a mix in every layer
        assert counted(device_map, layer + ".")[0] in (3, 4) and counted(device_map, layer + ".")[1] in (3, 4)
    nowhere = plan(sizes, {0: 4000, "cpu": 0})
    assert counted(nowhere) == {"disk": 36} and trunk(nowhere) == {0: 7}
    assert counted(plan(sizes, {0: 4000})) == {"disk": 36}


def test_without_accelerators_main_memory_and_disk():
    device_map = plan(small(), {"cpu": 4000 + 500})
    assert trunk(device_map) == {"cpu": 7} and counted(device_map) == {"cpu": 5, "disk": 31}
    assert set(plan(small(), {}).values()) == {"disk"}


def test_layers_are_laid_out_over_devices_only_where_none_has_room_for_all():
    sizes = small()
    assert trunk(plan(sizes, {0: 3999, 1: 4000})) == {1: 7}
    device_map = plan(sizes, {0: 2100, 1: 1000, 2: 10**5})
    assert trunk(device_map) == {2: 7}
    device_map = plan(sizes, {0: 2100, 1: 1000, 2: 1500})
    assert [device_map[f"{TEXT}.layers.{i}.self_attn"] for i in (1, 2, 3)] == [0, 1, 2]
    assert device_map[f"{TEXT}.layers.0"] == 0


def test_layers_that_no_device_has_room_for():
    """They pass through the first device, which keeps room for one of them."""
    device_map = plan(small(), {0: 2100, 1: 1000, "cpu": 1500})
    assert device_map[f"{TEXT}.layers.0"] == 0
    assert [device_map[f"{TEXT}.layers.{i}.self_attn"] for i in (1, 2, 3)] == [1, "cpu", "disk"]
    assert counted(device_map) == {"cpu": 5, "disk": 31}


@pytest.mark.parametrize("quotas", [{"a": 5, "b": 5}, {"a": 1, "b": 9, None: 90}, {"a": 0, "b": 7}, {"a": 3}])
def test_dealing_is_even(quotas):
    total = sum(quotas.values())
    dealt = list(deal(quotas, total))
    assert Counter(dealt) == Counter({device: count for device, count in quotas.items() if count})
    for device, count in quotas.items():
        for end in range(total + 1):
            assert abs(dealt[:end].count(device) - count * end / total) < len(quotas)


@pytest.fixture(scope="module")
def published(golden) -> Sizes:
    """Of the published model, built on `meta`: its first layers, of which the others are copies."""
    config = KimiK26Config(**json.loads((golden / "vocab" / "config.json").read_text()))
    layers, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 2
    with built_on_meta(torch.bfloat16):
        sizes = Sizes.of(KimiK26ForConditionalGeneration(config))
    blocks, experts = {}, {}
    for name, parts in sizes.blocks.items():
        blocks[name] = parts
        if name.endswith("layers.1"):
            for index in range(2, layers):
                other = f"{TEXT}.layers.{index}"
                blocks[other] = {part.replace(name, other): size for part, size in parts.items()}
    for index in range(1, layers):
        experts[f"{TEXT}.layers.{index}.mlp.experts"] = sizes.experts[f"{TEXT}.layers.1.mlp.experts"]
    return Sizes(blocks, experts, sizes.beside, sizes.chosen)


def test_the_published_model_is_as_large_as_its_files(published, golden):
    manifest = json.loads((golden / "checkpoint_manifest.json").read_text())
    experts = sum(sum(each) for each in published.experts.values())
    others = sum(sum(parts.values()) for parts in published.blocks.values())
    assert len(published.experts) == 60 and {len(each) for each in published.experts.values()} == {384}
    words, scales = 2048 * 7168 // 2, 2048 * 7168 // 32 * 2
    assert {size for each in published.experts.values() for size in each} == {3 * (words + scales + 8)}
    assert experts + others == manifest["total_bytes"]
    assert published.chosen == 8 and 3.5 < published.beside < 3.6  # bfloat16 beside INT4 with its scales


@pytest.mark.once
@pytest.mark.parametrize(
    ("amounts", "experts"),
    [
        # 570.8 GB of experts, held in units of 2 MiB, and 24.4 GB of all else.
        ({0: 700 * GB, "cpu": 100 * GB}, {0: 23040}),
        ({0: 700 * GB, 1: 700 * GB}, {0: 6401, 1: 16639}),
        ({i: 80 * GB for i in range(8)}, {0: 794} | {i: 3178 for i in range(1, 8)}),
        ({i: 141 * GB for i in range(8)}, {1: 3292, 2: 3292, 3: 3292} | {i: 3291 for i in range(4, 8)}),
        ({i: 80 * GB for i in range(4)} | {"cpu": 200 * GB}, {0: 2207, 1: 3176, 2: 3176, 3: 3176, "cpu": 8073, "disk": 3232}),
    ],
    ids=["1", "2 with room", "8 x 80 GB", "8 x 141 GB", "4 x 80 GB and 200 GB"],
)
def test_the_published_model_on_real_machines(published, amounts, experts):
    device_map = plan(published, amounts)
    assert counted(device_map) == experts and set(trunk(device_map)) == {0}
    assert all(held <= amounts.get(place, 0) for place, held in bytes_on(published, device_map).items() if place != "disk")
    for layer in published.experts:
        counts = counted(device_map, layer + ".")
        assert sum(counts.values()) == 384
        for place, count in experts.items():  # every layer gets the same mix, the last ones of the disk
            assert place in OFFLOADED or abs(counts[place] - count / 60) <= 2


def test_the_published_model_on_one_small_device(published):
    device_map = plan(published, {0: 24 * GB, "cpu": 100 * GB})
    assert trunk(device_map)[0] > 280 and trunk(device_map)["cpu"] > 0 and counted(device_map)["disk"] > 19000
    assert all(held <= {0: 24 * GB, "cpu": 100 * GB}.get(place, 10**12) for place, held in bytes_on(published, device_map).items())


# Maps


def test_a_map_gives_every_part_its_place():
    sizes = small(layers=3, experts=2)
    last = f"{TEXT}.layers.2"
    places = check_map({"": "cpu", last: 1, f"{last}.mlp.experts.1": 0, f"{last}.mlp.gate": 2}, sizes)
    assert places == {
        f"{TEXT}.layers.0": "cpu",
        f"{TEXT}.layers.1.self_attn": "cpu",
        f"{TEXT}.layers.1.mlp.gate": "cpu",
        f"{TEXT}.layers.1.mlp.experts.0": "cpu",
        f"{TEXT}.layers.1.mlp.experts.1": "cpu",
        f"{last}.self_attn": 1,
        f"{last}.mlp.gate": 2,
        f"{last}.mlp.experts.0": 1,
        f"{last}.mlp.experts.1": 0,
    }
    with pytest.raises(ValueError, match=r"no place for language_model.model.layers.0 and 4 other parts"):
        check_map({last: 1}, sizes)
    with pytest.raises(ValueError, match=r"device_map has 'language_model.model.layers.7', which is no part"):
        check_map({"": "cpu", f"{TEXT}.layers.7": 1}, sizes)
    assert check_map(plan(sizes, {0: 10**5, 1: 10**5}), sizes) == plan(sizes, {0: 10**5, 1: 10**5})


def test_shares_and_budgets_follow_from_a_map():
    sizes = small(layers=3, experts=6)
    first, second = sizes.experts
    device_map = {"": "maia:1", **{f"{first}.{number}": "maia:0" for number in (1, 4)}}
    device_map |= {f"{second}.{number}": place for number, place in enumerate(["disk", "cpu", "disk", "cpu", "maia:0", "cpu"])}
    placement = Placement.of(device_map, sizes, {"maia:0": 4000, "maia:1": 10000, "cpu": 0})
    one, two = accelerator(0), accelerator(1)
    assert placement.main == two
    shares = {layer: [(device, tuple(numbers)) for device, numbers in each] for layer, each in placement.shares.items()}
    assert shares[first] == [(one, (1, 4)), (two, (0, 2, 3, 5))]  # the one with the tokens last
    # Those that none holds are dealt by what each holds, 3 and 4.
    assert [device for device, _ in shares[second]] == [one, two]
    assert sorted(shares[second][0][1] + shares[second][1][1]) == list(range(6)) and 4 in shares[second][0][1]
    assert [len(numbers) for _, numbers in shares[second]] == [3, 3]
    aside = 2 * held_bytes(100)
    assert placement.budgets == {one: 4000 - aside, two: 10000 - 3000 - aside}
    assert set(Placement.of({"": "disk"}, sizes, {"maia:0": 50, "maia:1": 50}).budgets.values()) == {0}
    assert Placement.of(device_map, sizes, {}).budgets == {one: 3 * held_bytes(100), two: 4 * held_bytes(100)}
    assert set(Placement.of(device_map, sizes, {}, expert_budget=7).budgets.values()) == {7}
    assert placement.device_of(f"{first}.1.gate_proj") is None and placement.device_of(f"{second}.0") is None
    assert placement.device_of(f"{TEXT}.layers.1.self_attn.q_a_proj") == two


def test_memory_that_is_given_and_memory_that_is_free():
    model = make_model(vision=False)
    assert memory(model, {"cpu": "2GiB"}) == {"cpu": 2 * 2**30}
    assert 0 < memory(model)["cpu"] < 10**15
    with pytest.raises(ValueError, match="gpu0"):
        memory(model, {"gpu0": "1GiB"})


# Models carried out on devices that keep the rules of real ones


def by_share(model, *shares):
    """The sizes of a model's trunk and experts, and amounts of memory by shares of them."""
    sizes = Sizes.of(model)
    others = sum(sum(parts.values()) for parts in sizes.blocks.values())
    experts = sum(held_bytes(size) for each in sizes.experts.values() for size in each)
    return sizes, {f"maia:{k}": int(others * a + experts * b) for k, (a, b) in enumerate(shares)}


ROOM = {
    "all fits": [(1, 0.4), (0, 0.4), (0, 0.5)],
    "half fits": [(1, 0.25), (0, 0.25)],
    "little fits": [(1, 0.1), (0, 0.1), (0, 0.1), (0, 0)],
    "one": [(1, 0.3)],
    "layers over two": [(0.6, 0), (0.6, 0.5)],
    "layers in main memory": [(0.7, 0), (0.2, 0.3)],
    "next to nothing fits": [(0.5, 0), (0, 0)],
}


def device_map_of(model, shares, cpu=10**6):
    sizes, amounts = by_share(model, *shares)
    return plan(sizes, amounts | {"cpu": cpu})


@pytest.mark.parametrize(
    ("name", "room"), [("tiny-int4", room) for room in ROOM] + [("tiny-fp32", "all fits"), ("tiny-fp32", "layers in main memory")]
)
@torch.no_grad()
def test_loaded_onto_devices(golden, name, room):
    alone = KimiK26ForConditionalGeneration.from_pretrained(golden / name)
    device_map = device_map_of(alone, ROOM[room])
    ids = words(2, 9)
    cache = alone(input_ids=ids).past_key_values
    expected = alone(input_ids=ids).logits, alone(input_ids=ids[:, :1], past_key_values=cache).logits
    greedy = alone.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with PretendedDevices() as devices:
        model = KimiK26ForConditionalGeneration.from_pretrained(golden / name, device_map=device_map)
        assert model.hf_device_map == device_map
        devices.log.clear()
        first = model(input_ids=ids)
        waits = devices.waits()
        second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        for got, wanted in zip((first.logits, second.logits), expected):
            assert got.device == CPU  # the inputs' device
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert waits <= 2 + 1  # one question to each layer with experts, and the logits
        on_device = ids.to(model.device)
        assert on_device.device.type == "maia"
        assert torch.equal(model.generate(input_ids=on_device, max_new_tokens=3, do_sample=False, eos_token_id=None).cpu(), greedy)
        for store in model.expert_store.elsewhere.values():
            assert store.bytes_held <= store.budget


@torch.no_grad()
def test_experts_that_fit_are_there_from_the_start_and_stay(golden):
    alone = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4")
    device_map = device_map_of(alone, ROOM["all fits"])
    with PretendedDevices() as devices:
        model = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4", device_map=device_map)
        stores = model.expert_store.elsewhere
        assert set(stores) == {accelerator(0), accelerator(1), accelerator(2)}
        misses = {device: store.misses for device, store in stores.items()}
        assert sum(misses.values()) == 32 and misses == {accelerator(k): counted(device_map)[f"maia:{k}"] for k in range(3)}
        devices.log.clear()
        model(input_ids=words(1, 30))
        assert {device: store.misses for device, store in stores.items()} == misses
        assert all(store.hits > 0 for store in stores.values())
        # Nothing but the tokens and the partial sums moves, and each device computes in each layer.
        moved = Counter(place for _, place in devices.log if ">" in place)
        assert set(moved) <= {f"{a}>{b}" for a in ("cpu", "maia:0") for b in ("maia:0", "maia:1", "maia:2", "cpu")} | {
            "maia:1>maia:0", "maia:2>maia:0",
        }
        assert moved["maia:0>maia:1"] == moved["maia:0>maia:2"] == 2 * 3 and moved["maia:1>maia:0"] == 2
        # Parameters stay in their files: saving needs no accelerator, and a copy of the model makes its own layouts.
        assert next(model.get_submodule(f"{TEXT}.layers.1.mlp.experts.0").parameters()).device == CPU
        assert all(s.bytes_held == 0 < s.budget for s in copy.deepcopy(model.expert_store).elsewhere.values())


@torch.no_grad()
def test_all_is_sent_before_anything_is_computed():
    """Else a device waits for its tokens until another has done its share; and the host waits once, before all."""
    moe = random_moe()
    expected, _ = moe(x := torch.randn(1, 6, 32))
    with PretendedDevices() as devices:
        for part in (moe.gate, moe.shared_experts):
            move(part, accelerator(0))
        moe.experts.shares = [(accelerator(1), (0, 1, 2)), (accelerator(2), (3, 4)), (accelerator(0), (5, 6, 7))]
        moe(x.to(accelerator(0)))  # experts are fetched
        devices.log.clear()
        out, _ = moe(x.to(accelerator(0)))
        log = devices.log.copy()
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-6)
    sent = [k for k, (_, place) in enumerate(log) if place in ("maia:0>maia:1", "maia:0>maia:2")]
    computed = [k for k, (name, place) in enumerate(log) if name == "silu"]
    waited = [k for k, (_, place) in enumerate(log) if place.endswith(">cpu")]
    back = [k for k, (_, place) in enumerate(log) if place in ("maia:1>maia:0", "maia:2>maia:0")]
    assert max(sent) < min(computed) and max(computed) < min(back) and len(back) == 2
    assert len(waited) == 1 and waited[0] < min(computed)


@torch.no_grad()
def test_the_hottest_experts_stay(golden):
    alone = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4")
    device_map = device_map_of(alone, ROOM["half fits"])
    with PretendedDevices():
        model = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4", device_map=device_map, expert_budget="20KiB")
        stores = model.expert_store.elsewhere.values()
        assert all(store.budget == 20 * 2**10 and store.bytes_held <= store.budget for store in stores)
        ids = words(1, 1)
        for _ in range(4):  # one token again and again: its experts drive the others out
            model(input_ids=ids)
        misses, hits = sum(s.misses for s in stores), sum(s.hits for s in stores)
        model(input_ids=ids)
        assert sum(s.misses for s in stores) - misses <= 8 - 2 and sum(s.hits for s in stores) > hits
        size = DeviceExpert(alone.get_submodule(f"{TEXT}.layers.1.mlp.experts.0"), CPU).nbytes
        assert sum(s.bytes_moved for s in stores) == size * sum(s.misses for s in stores)


@torch.no_grad()
def test_pictures_and_generation_on_devices():
    alone = make_model(quantized=True)
    ids, pixels, grids = media_prompt()
    inputs = {"input_ids": ids, "pixel_values": pixels, "grid_thws": grids}
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    expected, logits = alone.generate(**inputs, **options), alone(**inputs).logits
    sizes, amounts = by_share(alone, (0.5, 0), (0.7, 0.5), (0, 0.6))
    placement = Placement.of(plan(sizes, amounts), sizes, amounts)
    assert len(set(placement.places.values())) == 3 and len(set(trunk(placement.places))) == 2
    with PretendedDevices():
        for name, module in alone.named_modules():
            device = placement.device_of(name)
            if device is not None and module._parameters:
                move(module, device) if not list(module.children()) else None
        placement.carry_out(alone)
        torch.testing.assert_close(alone(**inputs).logits, logits, rtol=0, atol=1e-5)
        there = {name: value.to(alone.device) for name, value in inputs.items()}
        assert torch.equal(alone.generate(**there, **options).cpu(), expected)


def test_gradients_reach_experts_in_main_memory():
    moe, x = random_moe(), torch.randn(1, 5, 32)
    moe(x)[0].sum().backward()
    wanted = {name: p.grad.clone() for name, p in moe.experts.named_parameters() if p.grad is not None}
    assert wanted
    moe.zero_grad()
    with PretendedDevices():
        for part in (moe.gate, moe.shared_experts):
            move(part, accelerator(0))
        moe.experts.shares = [(accelerator(1), (0, 1, 2, 3)), (accelerator(0), (4, 5, 6, 7))]
        moe(x.to(accelerator(0)))[0].sum().backward()
        # What is trained is not kept in copies.
        assert not any(store.misses for store in moe.experts.store.elsewhere.values())
    got = {name: p.grad for name, p in moe.experts.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name])


@torch.no_grad()
def test_experts_are_read_from_their_files_together(golden, monkeypatch):
    """All that a layer asks for and nobody holds, before the first of them is waited for."""
    alone = KimiK26ForConditionalGeneration.from_pretrained(golden / "tiny-int4")
    events, module = [], sys.modules[type(alone.get_submodule(f"{TEXT}.layers.1.mlp.experts")).__module__]
    number_of = {id(expert): n for n, expert in enumerate(alone.get_submodule(f"{TEXT}.layers.1.mlp.experts"))}
    monkeypatch.setattr(module, "read_ahead", lambda expert: events.append(("ahead", number_of[id(expert)])))
    monkeypatch.setattr(module, "DeviceExpert", lambda expert, device: events.append(("sent", number_of[id(expert)])) or DeviceExpert(expert, device))
    experts = alone.get_submodule(f"{TEXT}.layers.1.mlp.experts")
    with PretendedDevices():
        there = accelerator(0)
        for tokens in (1, 3):
            experts.store.on(there).clear()
            events.clear()
            chosen = torch.tensor([[5, 2, 9], [2, 7, 5], [1, 2, 5]])[:tokens]
            given = torch.randn(tokens, 128), torch.rand(tokens, 3), chosen
            experts(*(part.to(there) for part in given))
            count = len(events) // 2
            assert [kind for kind, _ in events] == ["ahead"] * count + ["sent"] * count
            assert {number for _, number in events} == set(chosen.flatten().tolist())
            events.clear()
            experts(*(part.to(there) for part in given))
            assert not events  # they are held


# The library's own hooks, at the same grain


@pytest.mark.parametrize("name", ["tiny-int4", "tiny-fp32"])
@torch.no_grad()
def test_the_library_offloads_experts(golden, name, tmp_path):
    layer = f"{TEXT}.layers.1.mlp"
    device_map = {"vision_tower": "cpu", "mm_projector": "cpu", f"{TEXT}.embed_tokens": "cpu", f"{TEXT}.norm": "cpu"}
    device_map |= {"language_model.lm_head": "cpu", f"{TEXT}.layers.0": "cpu", f"{TEXT}.layers.2": "disk"}
    device_map |= {f"{TEXT}.layers.1.{part}": "cpu" for part in ("self_attn", "input_layernorm", "post_attention_layernorm")}
    device_map |= {f"{layer}.gate": "cpu", f"{layer}.shared_experts": "disk"}
    device_map |= {f"{layer}.experts.{number}": "cpu" if number % 3 else "disk" for number in range(16)}
    model = KimiK26ForConditionalGeneration.from_pretrained(golden / name)
    placed = KimiK26ForConditionalGeneration.from_pretrained(golden / name, device_map=device_map, offload_folder=tmp_path)
    assert {p.device.type for p in placed.get_submodule(f"{layer}.experts").parameters()} == {"cpu", "meta"}
    ids = words(1, 11)
    torch.testing.assert_close(placed(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_the_script_for_several_gpus(golden, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[1] / "examples" / "several_gpus.py"
    monkeypatch.setattr(sys, "argv", [script.name, str(golden / "tiny-int4"), "--check", "--context", "9", "--tokens", "3"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "modules" in printed and float(printed.partition("one CPU's: ")[2].split()[0]) <= 1e-4
    assert ("ms a token" in printed) == torch.accelerator.is_available() == ("not measured" not in printed)
