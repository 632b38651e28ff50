"""What the model card shows, against a server: `kimi-k26 serve FOLDER`, then `python examples/model_card.py`.

Thinking and instant answers, a picture, a video, thinking that is kept, and tools called step by step with thinking in
between. The functions take any OpenAI client, so they serve Moonshot's own API and other engines just as well.
"""

import argparse
import base64
import io
import json

import openai
from PIL import Image, ImageDraw

INSTANT = {"thinking": {"type": "disabled"}}  # vLLM and SGLang: {"chat_template_kwargs": {"thinking": False}}
# vLLM and SGLang: {"chat_template_kwargs": {"thinking": True, "preserve_thinking": True}}
KEEP_THINKING = {"thinking": {"type": "enabled", "keep": "all"}}


def simple_chat(client: openai.OpenAI, model_name: str) -> str:
    """A question, answered after thinking and at once."""
    messages = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {"role": "user", "content": "which one is bigger, 9.11 or 9.9? think carefully."},
    ]
    return think_and_answer(client, model_name, messages)


def chat_with_image(client: openai.OpenAI, model_name: str, image: bytes, question="What is in this picture?") -> str:
    """A picture, sent as a data URI. `image`: a file in any format that Pillow reads."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return think_and_answer(client, model_name, [{"role": "user", "content": content}])


def chat_with_video(
    client: openai.OpenAI, model_name: str, video: bytes, question="Which way does the circle move?"
) -> str:
    """A video, sent as a data URI. `video`: a file in any format that PyAV reads."""
    url = "data:video/mp4;base64," + base64.b64encode(video).decode()
    content = [{"type": "text", "text": question}, {"type": "video_url", "video_url": {"url": url}}]
    return think_and_answer(client, model_name, [{"role": "user", "content": content}])


def chat_with_preserve_thinking(client: openai.OpenAI, model_name: str) -> str:
    """Two of five numbers were thought of and never said: with kept thinking the model knows them."""
    messages = [
        {"role": "user", "content": "Tell me three random numbers."},
        {
            "role": "assistant",
            "reasoning_content": "I'll start by listing five numbers: 473, 921, 235, 215, 222, "
            "and I'll tell you the first three.",
            "content": "473, 921, 235",
        },
        {"role": "user", "content": "What are the other two numbers you have in mind?"},
    ]
    answer = client.chat.completions.create(
        model=model_name, messages=messages, max_tokens=4096, extra_body=KEEP_THINKING
    )
    return show(answer.choices[0].message)


def call_tools(client: openai.OpenAI, model_name: str, question: str, tools: dict, steps: int = 10) -> str:
    """Thinks, calls, reads the results, thinks again, until there is an answer.

    Args:
        tools: by name a Python function and the JSON schema of its arguments, `(function, description, schema)`.
        steps: calls of the model at most.
    """
    declared = [
        {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
        for name, (_, description, schema) in tools.items()
    ]
    messages = [{"role": "user", "content": question}]
    for _ in range(steps):
        answer = client.chat.completions.create(model=model_name, messages=messages, tools=declared, max_tokens=4096)
        message = answer.choices[0].message
        show(message)
        # The thinking goes back too: until the answer the model goes on from what it thought before its calls.
        messages.append(message.model_dump(exclude_none=True))
        if answer.choices[0].finish_reason != "tool_calls":
            return message.content
        for call in message.tool_calls:
            try:
                function, _, _ = tools[call.function.name]
                result = json.dumps(function(**json.loads(call.function.arguments)))
            except (KeyError, TypeError, ValueError) as error:  # no such tool, or wrong arguments: the model is told
                result = f"{type(error).__name__}: {error}"
            print(f"{call.id} {call.function.arguments} -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def think_and_answer(client: openai.OpenAI, model_name: str, messages: list[dict]) -> str:
    """The same question twice, thinking and instant; the instant answer."""
    thought = client.chat.completions.create(model=model_name, messages=messages, max_tokens=8192)
    show(thought.choices[0].message)
    instant = client.chat.completions.create(model=model_name, messages=messages, max_tokens=4096, extra_body=INSTANT)
    return show(instant.choices[0].message)


def show(message) -> str:
    if message.reasoning:
        print(f"(thinks: {message.reasoning})")
    print(message.content or "")
    return message.content


def draw_picture() -> bytes:
    """A red circle and a blue square, as a PNG file."""
    picture, file = Image.new("RGB", (140, 98), "white"), io.BytesIO()
    pen = ImageDraw.Draw(picture)
    pen.ellipse((16, 26, 60, 70), fill="red")
    pen.rectangle((82, 34, 118, 70), fill="blue")
    picture.save(file, "PNG")
    return file.getvalue()


def record_video() -> bytes:
    """A red circle that moves to the right for three seconds, as an mp4 file."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 84, 56, "yuv420p", 2_000_000
        for number in range(24):
            frame = Image.new("RGB", (84, 56), "white")
            ImageDraw.Draw(frame).ellipse((6 + 2 * number, 16, 30 + 2 * number, 40), fill="red")
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {
    "get_weather": (lambda city: {"weather": "sunny", "temperature": 21}, "Get the weather for a city", CITY),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (%(default)s)")
    parser.add_argument("--model", help="its name; the server's first by default")
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.url, api_key=args.api_key)
    name = args.model or client.models.list().data[0].id
    simple_chat(client, name)
    chat_with_image(client, name, draw_picture())
    chat_with_video(client, name, record_video())
    chat_with_preserve_thinking(client, name)
    call_tools(client, name, "What is the weather in Beijing?", TOOLS)
