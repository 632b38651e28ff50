"""Where experts compute: shares of several devices add up to what one device gives."""

import pytest
import torch

from kimi_k26 import KimiK26Config
from kimi_k26.experts_kimi_k26 import DeviceExpert, KimiK26MoE, Routing, held_bytes
from kimi_k26.tests.tiny_models import config_dict, fill


CPU = torch.device("cpu")


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
