"""A tool is called and its result told: `python examples/tools.py [FOLDER] [QUESTION]`."""

import argparse
import json
from pathlib import Path

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor


def get_weather(city: str) -> str:
    """Get the weather for a city

    Args:
        city: The city
    """
    return json.dumps({"weather": "sunny", "temperature": 21})


TOOLS = {"get_weather": get_weather}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default=Path(__file__).with_name("kimi-k26-tiny"), help="a checkpoint")
parser.add_argument("question", nargs="?", default="What is the weather in Beijing?")
args = parser.parse_args()

processor = KimiK26Processor.from_pretrained(args.folder)
model = KimiK26ForConditionalGeneration.from_pretrained(args.folder, device_map="auto")

messages = [{"role": "user", "content": args.question}]
for _ in range(5):  # a model may call again when it has seen a result, but not forever
    inputs = processor.apply_chat_template(
        messages, tools=list(TOOLS.values()), tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=2048)
    reply = processor.parse_response(output[0, inputs["input_ids"].shape[1] :])
    print(f"(thinks: {reply['reasoning']})\n{reply['content']}")
    messages.append({"role": "assistant", **reply})
    for call in reply["tool_calls"]:
        print(call["id"], call["function"]["arguments"])
        try:
            result = TOOLS[call["function"]["name"]](**json.loads(call["function"]["arguments"]))
        except (KeyError, TypeError, ValueError) as error:  # no such tool, or wrong arguments: the model is told
            result = f"{type(error).__name__}: {error}"
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    if not reply["tool_calls"]:
        break
