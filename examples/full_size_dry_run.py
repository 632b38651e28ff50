"""Load a checkpoint of any size in main memory and let it answer a question about a picture, a line of progress a layer.

    python examples/full_size_dry_run.py FOLDER [--memory 12GiB] [--tokens 2]

The weights stay in their files and are read when a layer uses them, so the 554 GiB of the full model pass through a
machine with 24 GiB, slowly. FOLDER needs config.json and the shards. Where it has the tokenizer's files too, the prompt
is real; without them (a folder made to try the machine) it is made of token ids.
"""

import argparse
import resource
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26ImageProcessor, KimiK26Processor


def draw():
    image = Image.new("RGB", (112, 84), "white")
    ImageDraw.Draw(image).ellipse((20, 14, 70, 64), fill="crimson")
    return image


def prompt(folder, config):
    """Inputs of the model: `input_ids` (1, length), `pixel_values`, `grid_thws`."""
    if (folder / "tiktoken.model").exists():
        content = [{"type": "image", "image": draw()}, {"type": "text", "text": "What colour is the circle?"}]
        messages = [{"role": "user", "content": content}]
        processor = KimiK26Processor.from_pretrained(folder)
        return processor, processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = KimiK26ImageProcessor().preprocess(draw(), return_tensors="pt")
    frames, rows, columns = inputs["grid_thws"][0].tolist()
    row_step, column_step = config.vision_config.merge_kernel_size
    media = [config.media_placeholder_token_id] * (rows // row_step * (columns // column_step))
    ids = torch.tensor([[100, 101, *media, 102, 103]])
    return None, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def report_layers(model, start):
    layers = model.language_model.model.layers

    def after(index):
        def hook(*_):
            store, held = model.expert_store, model.expert_store.bytes_held / 2**30
            print(
                f"  layer {index + 1:2d} of {len(layers)}  {time.perf_counter() - start:7.1f} s  "
                f"experts: {store.hits} found, {store.misses} made, {held:.1f} GiB held  {peak()}",
                flush=True,
            )

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(after(index))


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", default=None, help="bound of all weights in memory, such as 12GiB (70 %% of the free)")
    parser.add_argument("--tokens", type=int, default=2)
    args = parser.parse_args()
    start = time.perf_counter()
    memory = {"cpu": args.memory} if args.memory else None
    model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, max_memory=memory)
    print(f"loaded in {time.perf_counter() - start:.1f} s, {peak()}")
    processor, inputs = prompt(args.folder, model.config)
    print(f"prompt of {inputs['input_ids'].shape[1]} tokens, picture of {inputs['pixel_values'].shape[0]} patches")
    report_layers(model, start)
    ids = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{len(ids)} tokens after {time.perf_counter() - start:.1f} s, {peak()}: {ids.tolist()}")
    if processor is not None:
        print(processor.decode(ids))


if __name__ == "__main__":
    main()
