"""A conversation of several turns: `python examples/chat.py [FOLDER] [QUESTION ...]`."""

import argparse
from pathlib import Path

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
parser.add_argument("questions", nargs="*", help="each is one turn")
args = parser.parse_args()

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

messages = []
for question in args.questions or ["Who are you?", "What can you do?"]:
    messages.append({"role": "user", "content": question})
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=2048)
    reply = processor.parse_response(output[0, inputs["input_ids"].shape[1] :])
    # The reasoning goes into the history too; the template decides what of it the model sees again.
    messages.append({"role": "assistant", **reply})
    print(f"> {question}\n(thinks: {reply['reasoning']})\n{reply['content']}\n")
