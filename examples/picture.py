"""A question about a picture: `python examples/picture.py [FOLDER] [PICTURE] [QUESTION]`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
parser.add_argument("picture", nargs="?", help="a file; two figures are drawn where none is given")
parser.add_argument("question", nargs="?", default="What is in this picture?")
args = parser.parse_args()

picture = args.picture
if picture is None:
    picture = Image.new("RGB", (140, 98), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((16, 26, 60, 70), fill="red")
    pen.rectangle((82, 34, 118, 70), fill="blue")

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

# "image" takes a path, a URL, bytes, an array or a PIL picture; "image_url" parts as in OpenAI's API work as well.
content = [{"type": "image", "image": picture}, {"type": "text", "text": args.question}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=2048)
reply = processor.parse_response(output[0, inputs["input_ids"].shape[1] :])
print(f"> {args.question}\n(thinks: {reply['reasoning']})\n{reply['content']}")
