"""An answer shown while it is being written: `python examples/streaming.py [FOLDER] [QUESTION]`."""

import argparse
from pathlib import Path
from threading import Thread

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor, ResponseStreamer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
parser.add_argument("question", nargs="?", default="Which is bigger, 12.5 or 12.45?")
args = parser.parse_args()

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

messages = [{"role": "user", "content": args.question}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt").to(model.device)
streamer = ResponseStreamer(processor.tokenizer)
writing = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 2048, "streamer": streamer})
writing.start()
print("(thinks: ", end="")
thinks = True
for delta in streamer:  # pieces of "reasoning", then of "content"; with tools, parts of "tool_calls" too
    if thinks and "reasoning" not in delta:
        thinks = False
        print(")")
    print(delta.get("reasoning") or delta.get("content", ""), end="", flush=True)
writing.join()
print()
