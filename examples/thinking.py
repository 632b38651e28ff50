"""Thinking on, off, and kept over several turns: `python examples/thinking.py [FOLDER]`."""

import argparse
from pathlib import Path

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
args = parser.parse_args()

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")


def answer(messages, **flags):
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **flags)
    output = model.generate(**inputs.to(model.device), max_new_tokens=2048)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


question = [{"role": "user", "content": "which one is bigger, 9.11 or 9.9? think carefully."}]
print("on:  ", answer(question))  # reasoning</think>answer
print("off: ", answer(question, thinking=False))  # the answer alone

# Two of five numbers were thought of, but never said. Reasoning of earlier turns is dropped unless it is asked to stay.
numbers = "I'll start by listing five numbers: 473, 921, 235, 215, 222, and I'll tell you the first three."
talk = [
    {"role": "user", "content": "Tell me three random numbers."},
    {"role": "assistant", "content": "473, 921, 235", "reasoning": numbers},
    {"role": "user", "content": "What are the other two numbers you have in mind?"},
]
print("kept:", answer(talk, preserve_thinking=True))
print("lost:", answer(talk))
