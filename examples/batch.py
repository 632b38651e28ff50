"""Several conversations at once, with and without pictures: `python examples/batch.py [FOLDER]`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
args = parser.parse_args()

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

small, wide = Image.new("RGB", (70, 70), "white"), Image.new("RGB", (140, 84), "white")
ImageDraw.Draw(small).rectangle((15, 15, 52, 52), fill="green")
for x, colour in ((12, "red"), (54, "blue"), (96, "red")):
    ImageDraw.Draw(wide).ellipse((x, 25, x + 32, 57), fill=colour)

contents = [
    [{"type": "image", "image": small}, {"type": "text", "text": "图里有什么？"}],
    [{"type": "image", "image": wide}, {"type": "text", "text": "How many figures are there?"}],
    [{"type": "text", "text": "Which is bigger, 3.7 or 3.65?"}],
]
conversations = [[{"role": "user", "content": content}] for content in contents]
# Answers go on where prompts end, so shorter prompts are filled up on the left. thinking=False: answers alone.
inputs = processor.apply_chat_template(
    conversations,
    thinking=False,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    padding=True,
    padding_side="left",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=2048)
for content, row in zip(contents, output[:, inputs["input_ids"].shape[1] :]):
    print(">", content[-1]["text"])
    print(processor.decode(row, skip_special_tokens=True), "\n")
