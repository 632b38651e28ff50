"""One model in two processes: what they say together, beside what one says alone."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration
from kimi_k26.parallel_kimi_k26 import Peers, check_split, split_plan
from kimi_k26.tests.parallel_worker import GREEDY, NAMES, answers, gradients
from kimi_k26.tests.tiny_models import config_dict, words


PROCESSES = 2


@pytest.fixture(scope="module")
def together(golden, tmp_path_factory):
    """What each process wrote, and the folder that they saved to."""
    out = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kimi_k26.tests.parallel_worker", str(golden), str(out)]
    environment = {**os.environ, "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(PROCESSES):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = open(out / f"{rank}.log", "w")
        started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, text=True))
    try:
        codes = [process.wait(timeout=1200) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(out / f"{rank}.log").read_text() for rank in range(PROCESSES)]
    assert codes == [0] * PROCESSES, "\n\n".join(logs)
    return SimpleNamespace(
        written=[torch.load(out / f"{rank}.pt") for rank in range(PROCESSES)], folder=out, logs=logs
    )


@pytest.fixture(scope="module")
def alone(golden):
    return {name: KimiK26ForConditionalGeneration.from_pretrained(golden / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_say_what_one_says(together, alone, name):
    expected = answers(alone[name])
    for written in together.written:
        assert written[name].keys() == expected.keys()
        for kind, wanted in expected.items():
            if kind.startswith("greedy"):
                assert torch.equal(written[name][kind], wanted), kind
            else:
                torch.testing.assert_close(written[name][kind], wanted, rtol=0, atol=1e-4, msg=lambda m: f"{kind}: {m}")
    for kind in expected:  # to the last bit, so that sampled tokens are the same in all
        assert torch.equal(together.written[0][name][kind], together.written[1][name][kind])


@pytest.mark.parametrize("few_experts", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_processes(together, alone, name, few_experts):
    expected = gradients(alone[name], few_experts)
    seen = set()
    for written in together.written:
        for parameter, gradient in written[f"{name} gradients" + " of few experts" * few_experts].items():
            wanted = expected[parameter]
            if gradient.shape == wanted.shape:  # else a part of it
                torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=lambda m: f"{parameter}: {m}")
                seen.add(parameter)
    whole = {n for n in expected if any(part in n for part in ("layernorm", "_a_proj", "kv_a", "gate.weight", "embed", "norm"))}
    assert whole <= seen
    if name == "tiny-fp32":
        assert {n for n in expected if ".experts." in n} <= seen


@pytest.mark.parametrize("name", NAMES)
def test_what_each_process_holds(together, alone, name):
    text, shapes = alone[name].config.text_config, [written[f"{name} shapes"] for written in together.written]
    whole = {n: tuple(p.shape) for n, p in alone[name].named_parameters()}
    experts = [{n for n in own if ".experts." in n} for own in shapes]
    assert not experts[0] & experts[1] and experts[0] | experts[1] == {n for n in whole if ".experts." in n}
    assert len(experts[0]) == len(experts[1])
    layer = "language_model.model.layers.1"
    for own in shapes:
        assert own[f"{layer}.self_attn.q_b_proj.weight"] == (text.num_attention_heads // 2 * 48, text.q_lora_rank)
        assert own[f"{layer}.self_attn.kv_b_proj.weight"] == (text.num_attention_heads // 2 * 64, text.kv_lora_rank)
        assert own[f"{layer}.self_attn.o_proj.weight"] == (text.hidden_size, text.num_attention_heads // 2 * 32)
        assert own["language_model.lm_head.weight"] == (text.vocab_size // 2, text.hidden_size)
        split = {n for n in own if own[n] != whole[n]}
        assert all("_b_proj" in n or "o_proj" in n or "lm_head" in n or ".mlp." in n for n in split)
        networks = [f"{layer}.mlp.shared_experts", "language_model.model.layers.0.mlp"]
        assert {f"{n}.{part}_proj.weight" for n in networks for part in ("gate", "up", "down")} <= split
        assert all(own[n] == whole[n] for n in own if ".experts." in n)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_model_is_saved_whole(together, golden, name):
    def tensors(folder):
        return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}

    saved, original = tensors(together.folder / name), tensors(golden / name)
    original = {n: t for n, t in original.items() if not n.startswith("expected")}
    assert len(list((together.folder / name).glob("model-*.safetensors"))) > 1
    wanted = {n for n in original if n.startswith(("language_model", "vision_tower", "mm_projector"))}
    assert saved.keys() == wanted
    assert all(torch.equal(saved[n], original[n]) for n in wanted)
    again = KimiK26ForConditionalGeneration.from_pretrained(together.folder / name)
    assert again.config.text_config.to_dict() == KimiK26Config.from_pretrained(golden / name).text_config.to_dict()


def test_nothing_is_complained_of(together):
    for log in together.logs:
        assert "experts" not in log and "not sharded" not in log and "deprecated" not in log, log


def test_low_precision_is_near(together, alone):
    """As near as one process is, for a text of which rounding changes no expert."""
    with torch.no_grad():
        expected = alone[NAMES[0]](input_ids=words(1, 9, seed=3)).logits[:, -1]
    for written in together.written:
        assert written["bfloat16"][0].dtype in (torch.bfloat16, torch.float32)
        assert (written["bfloat16"][0].float() - expected).norm() < 0.04 * expected.norm()
        assert len(written["bfloat16"]) == GREEDY["max_new_tokens"]


class Mesh:
    """The library's, of which no process is started."""

    def __init__(self, size, rank):
        self.size, self.get_local_rank, self.get_group = lambda: size, lambda: rank, lambda: None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("count", [8, 16, 384, 385])
def test_every_thing_has_one_owner(size, count):
    shares = [list(Peers(Mesh(size, rank)).mine(count)) for rank in range(size)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, share in enumerate(shares):
        assert all(Peers(Mesh(size, 0)).owner(number, count) == rank for number in share)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, r"num_attention_heads \(4\) cannot be shared by 3 processes"),
        ({"intermediate_size": 50}, 4, r"intermediate_size \(50\)"),
        ({"vocab_size": 102}, 4, r"vocab_size \(102\)"),
        ({"n_routed_experts": 2, "num_experts_per_tok": 1}, 4, r"n_routed_experts \(2\)"),
        ({"moe_intermediate_size": 18, "n_shared_experts": 1}, 4, r"moe_intermediate_size times n_shared_experts \(18\)"),
    ],
)
def test_widths_that_cannot_be_shared(changes, size, message):
    with pytest.raises(ValueError, match=message):
        check_split(KimiK26Config(**config_dict(**changes)).text_config, size)


def test_the_plan_names_what_the_model_has():
    for changes in ({}, {"q_lora_rank": None}, {"n_routed_experts": None}, {"n_shared_experts": None}, {"first_k_dense_replace": 0}):
        config = KimiK26Config(**config_dict(vision=False, **changes))
        model = KimiK26ForConditionalGeneration(config)
        names = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()}
        assert split_plan(config).keys() <= names
        assert model.tp_plan == split_plan(config) and model.supports_tp_plan
    check_split(KimiK26Config(**config_dict(n_shared_experts=None)).text_config, 4)
