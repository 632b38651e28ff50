"""A question about a video: `python examples/video.py [FOLDER] [VIDEO] [QUESTION]`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
parser.add_argument("video", nargs="?", help="a file; a moving circle is drawn where none is given")
parser.add_argument("question", nargs="?", default="Which way does the circle move?")
args = parser.parse_args()

if args.video is not None:
    part = {"type": "video", "path": args.video}
else:  # decoded frames, with how many of them make a second
    frames = [Image.new("RGB", (84, 56), "white") for _ in range(24)]
    for number, frame in enumerate(frames):
        ImageDraw.Draw(frame).ellipse((6 + 2 * number, 16, 30 + 2 * number, 40), fill="red")
    part = {"type": "video", "video": frames, "fps": 8}

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

messages = [{"role": "user", "content": [part, {"type": "text", "text": args.question}]}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=2048)
reply = processor.parse_response(output[0, inputs["input_ids"].shape[1] :])
print(f"> {args.question}\n(thinks: {reply['reasoning']})\n{reply['content']}")
