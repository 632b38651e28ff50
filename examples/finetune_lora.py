"""LoRA on the INT4 base: the small Kimi, which speaks English and Chinese, learns to say in German what it sees.

    python examples/finetune_lora.py [FOLDER] --out ADAPTER

The experts stay packed and frozen; adapters of `peft` go on everything else in the text layers, and gradients pass
through the experts on their way. Takes the extra `train`: `pip install -e .[train]`.
"""

import argparse
import time
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor
from tiny.dialogues import ordered, random_kinds
from tiny.drawing import draw, random_scene

# All that text layers multiply by: attention, the dense layer and the shared experts, but no routed expert.
TARGETS = r"language_model\.model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+_proj(_with_mqa)?"
QUESTIONS = ("Was siehst du?", "Was ist auf dem Bild?", "Welche Figuren siehst du?", "Beschreibe das Bild.")
# What is seen → the German word; shapes with their article, and the ending of the colour between the two.
COLOURS = {"red": "rot", "yellow": "gelb", "green": "grün", "blue": "blau", "black": "schwarz"}
COLOURS_WITHOUT_ENDING = {"orange": "orange", "purple": "lila"}
SHAPES = {
    "circle": ("einen", "en", "Kreis"),
    "square": ("ein", "es", "Quadrat"),
    "triangle": ("ein", "es", "Dreieck"),
    "star": ("einen", "en", "Stern"),
    "cross": ("ein", "es", "Kreuz"),
}


def in_german(colour: str, shape: str) -> str:
    article, ending, noun = SHAPES[shape]
    word = COLOURS_WITHOUT_ENDING.get(colour) or COLOURS[colour] + ending
    return f"{article} {word} {noun}"


def random_dialogue(rng: Random) -> list[dict]:
    """A picture of one or two figures, a question, and the answer."""
    kinds = ordered(random_kinds(rng, rng.choice((1, 2))))
    picture = draw(random_scene(rng, rng.sample(kinds, len(kinds)), (rng.randint(56, 112), rng.randint(56, 112))))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": rng.choice(QUESTIONS)}]
    answer = f"Ich sehe {' und '.join(in_german(*kind) for kind in kinds)}."
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def training_batch(processor, dialogues: list) -> dict:
    """Whole dialogues, and labels on what the assistant said."""
    batch = processor.apply_chat_template(
        dialogues,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding=True,
        padding_side="right",
    )
    spoken = batch.pop("assistant_masks")
    return {**batch, "labels": batch["input_ids"].masked_fill(spoken == 0, -100)}


@torch.no_grad()
def score(model, processor, dialogues: list, rows: int = 32) -> tuple[float, str]:
    """Percent of answers that are right to the letter, and the first of them."""
    model.eval()
    said = []
    for start in range(0, len(dialogues), rows):
        inputs = processor.apply_chat_template(
            [dialogue[:-1] for dialogue in dialogues[start : start + rows]],
            thinking=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        said += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(text.strip() == dialogue[-1]["content"] for text, dialogue in zip(said, dialogues))
    return 100 * right / len(dialogues), said[0]


def load(folder) -> KimiK26ForConditionalGeneration:
    # What is not packed is so small here that float32 costs nothing; for the big one leave `dtype` out.
    return KimiK26ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("demo-output/lora-german"), help="the adapter (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training (%(default)s)")
    parser.add_argument("--minutes", type=float, default=3.75, help="of training at most, with fewer steps (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="dialogues a step (%(default)s)")
    parser.add_argument("--cases", type=int, default=100, help="held out for the score (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapter and pictures (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="more only slow down products this small (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()

    processor = KimiK26Processor.from_pretrained(args.folder)
    held_out = [random_dialogue(Random(f"held out {args.seed} {k}")) for k in range(args.cases)]
    torch.manual_seed(args.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load(args.folder), config)
    model.print_trainable_parameters()
    before, example = score(model, processor, held_out)
    print(f"before: {before:.0f} % right, such as {example!r}")

    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, betas=(0.9, 0.98), weight_decay=0.0)
    rng = Random(f"training {args.seed}")
    model.train()
    begun = time.perf_counter()
    bar = tqdm(range(args.steps), desc="training")
    for step in bar:
        # The rate falls with the steps taken, or with the time where that runs out first.
        done = max(step / args.steps, (time.perf_counter() - begun) / (60 * args.minutes))
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - done)
        batch = training_batch(processor, [random_dialogue(rng) for _ in range(args.rows)])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    after, example = score(model, processor, held_out)
    print(f"after:  {after:.0f} % right, such as {example!r}")
    model.save_pretrained(args.out)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"adapter: {args.out}, {size / 1e6:.1f} MB")

    again = PeftModel.from_pretrained(load(args.folder), args.out)
    loaded, _ = score(again, processor, held_out)
    batch = training_batch(processor, held_out[:8])
    with torch.no_grad():
        apart = (again(**batch).logits - model(**batch).logits).abs().max()
    print(f"loaded on a fresh base: {loaded:.0f} % right, logits apart by {apart:.0e} at most")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
