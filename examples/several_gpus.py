"""A checkpoint over all GPUs of a machine: where its parts are, whether it says what one CPU says, and how fast.

    python examples/several_gpus.py FOLDER [--max-memory 70GiB] [--expert-budget 40GiB]    # one process, all GPUs
    torchrun --nproc-per-node 8 examples/several_gpus.py FOLDER                            # one process for each GPU

In one process the experts of every layer are dealt to all GPUs; what they have no room for is fetched from main memory
or disk. In several, each has its share of the heads and of the experts. `--check` loads the checkpoint on the CPU too
and compares (in float32, for checkpoints that main memory holds). Times are taken on GPUs alone.
"""

import argparse
import os
import time
from collections import Counter

import torch

from kimi_k26 import KimiK26ForConditionalGeneration


def device_map_in_words(device_map) -> str:
    experts = Counter(str(place) for name, place in device_map.items() if ".experts." in name)
    others = Counter(str(place) for name, place in device_map.items() if ".experts." not in name)
    return "\n".join(f"  {place:>8}: {experts[place]:6d} experts, {others[place]:4d} other modules" for place in experts | others)


def stores_in_words(model) -> str:
    lines = []
    for device, store in model.expert_store.elsewhere.items():
        held, moved = store.bytes_held / 2**30, store.bytes_moved / 2**30
        lines.append(f"  {device}: {store.hits} found, {store.misses} fetched, {moved:.1f} GiB moved, {held:.1f} GiB held")
    return "\n".join(lines)


@torch.no_grad()
def seconds_per_token(model, ids, tokens: int) -> float:
    """Of greedy decoding; the first token, which reads the prompt, does not count."""
    options = {"do_sample": False, "eos_token_id": None}
    times = []
    for count in (1, tokens + 1):
        torch.accelerator.synchronize()
        start = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, **options)
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint")
    parser.add_argument("--max-memory", help="weights on each GPU, such as 70GiB; nine tenths of what is free by default")
    parser.add_argument("--expert-budget", help="experts on each GPU, such as 40GiB; what --max-memory leaves by default")
    parser.add_argument("--locked", default="0GiB", help="with --max-memory: experts in locked main memory, not in files")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=50, help="tokens to generate")
    parser.add_argument("--check", action="store_true", help="compare with the CPU, in float32")
    args = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    first = os.environ.get("RANK", "0") == "0"
    options = {"dtype": torch.float32} if args.check else {}
    gpus = torch.accelerator.device_count()
    start = time.perf_counter()
    if processes > 1:
        model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, tp_plan="auto", **options)
    else:
        memory = {gpu: args.max_memory for gpu in range(gpus)} | {"cpu": args.locked} if args.max_memory and gpus else None
        model = KimiK26ForConditionalGeneration.from_pretrained(
            args.folder, device_map="auto", max_memory=memory, expert_budget=args.expert_budget, **options
        )
    say = print if first else lambda *_: None
    say(f"{processes} process(es), {gpus} GPU(s) here, loaded in {time.perf_counter() - start:.1f} s")
    if processes == 1:
        say(device_map_in_words(model.hf_device_map))

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size // 2, (1, args.context), generator=generator)
    if args.check:
        alone = KimiK26ForConditionalGeneration.from_pretrained(args.folder, **options)
        with torch.no_grad():
            expected, logits = alone(input_ids=ids).logits, model(input_ids=ids.to(model.device)).logits.cpu()
        say(f"largest difference of a logit from one CPU's: {(logits - expected).abs().max():.1e}")
    if not gpus:
        say("speed: not measured, there is no GPU here")
        return
    speed = seconds_per_token(model, ids.to(model.device), args.tokens)
    say(f"decoding at {args.context} tokens of context: {speed * 1000:.2f} ms a token")
    if processes == 1:
        say(stores_in_words(model))


if __name__ == "__main__":
    main()
