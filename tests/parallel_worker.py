"""One of the processes of tests/test_parallel.py: `python -m kimi_k26.tests.parallel_worker GOLDEN OUT`.

Started as `torchrun` starts it, with `RANK`, `WORLD_SIZE` and the like in its environment. Writes what it computed.
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.experts_kimi_k26 import KimiK26Router
from kimi_k26.parallel_kimi_k26 import local
from kimi_k26.tests.tiny_models import media_prompt, words


NAMES = ("tiny-int4", "tiny-fp32")
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}


def pictures(config):
    """A prompt with pictures for a golden checkpoint."""
    ids, pixels, grids = media_prompt(seed=3)
    ids[ids == 97] = config.media_placeholder_token_id
    return {"input_ids": ids, "pixel_values": pixels, "grid_thws": grids}


@torch.no_grad()
def answers(model) -> dict[str, torch.Tensor]:
    """What a model says to several kinds of input."""
    ids = words(2, 9)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])}
    first = model(**padded)
    mask = torch.cat((padded["attention_mask"], torch.ones(2, 1, dtype=torch.int64)), dim=1)
    media = pictures(model.config)
    return {
        "text": model(input_ids=words(1, 40)).logits,
        "padded": first.logits,
        "cached": model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=first.past_key_values).logits,
        "pictures": model(**media).logits,
        "greedy": model.generate(**padded, **GREEDY),
        "greedy about pictures": model.generate(**media, **GREEDY),
    }


def gradients(model, few_experts: bool = False) -> dict[str, torch.Tensor]:
    """Of a loss, for what every process has whole, and for the experts that it has; `few_experts`: all words go to the first ones, which
    one process has."""
    ids = words(2, 7, seed=5)
    routers = [module for module in model.modules() if isinstance(module, KimiK26Router)]
    biases = [router.e_score_correction_bias.clone() for router in routers]
    for router in routers:
        router.e_score_correction_bias[: router.top_k * few_experts] += 100
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.eval()
    for router, bias in zip(routers, biases):
        router.e_score_correction_bias.copy_(bias)
    return found


def main(golden: Path, out: Path):
    written = {}
    for name in NAMES:
        model = KimiK26ForConditionalGeneration.from_pretrained(golden / name, tp_plan="auto")
        written[name] = answers(model)
        written[f"{name} gradients"] = gradients(model)
        written[f"{name} gradients of few experts"] = gradients(model, few_experts=True)
        written[f"{name} shapes"] = {n: tuple(local(p).shape) for n, p in model.named_parameters()}
        written[f"{name} plan"] = dict(model.tp_plan)
        model.save_pretrained(out / name, max_shard_size="1MB")
    low = KimiK26ForConditionalGeneration.from_pretrained(golden / NAMES[0], tp_plan="auto", dtype=torch.bfloat16)
    options = {"return_dict_in_generate": True, "output_logits": True}
    written["bfloat16"] = low.generate(input_ids=words(1, 9, seed=3), **GREEDY, **options).logits
    torch.save(written, out / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
