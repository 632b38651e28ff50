"""What the small trained checkpoint can do: a short conversation for each skill, judged, and a sheet of what it saw.

Every conversation is made on the spot from a seed: figures are drawn, films are recorded, numbers are thrown.
"""

import io
import json
import math
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import av
import torch
from PIL import Image, ImageDraw, ImageFont

from .loading import load_checkpoint

NEW_TOKENS = 1024
WIDTH = 96  # characters of a line

COLOURS = {
    "red": ("#e02020", "红色"),
    "orange": ("#ff9010", "橙色"),
    "yellow": ("#f5e020", "黄色"),
    "green": ("#20a040", "绿色"),
    "blue": ("#2050e0", "蓝色"),
    "purple": ("#9020b0", "紫色"),
    "black": ("#101010", "黑色"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形"}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RATE = 12  # frames a second of the films


# -- drawing ---------------------------------------------------------------------------------------------------------


def _turn(count: int, *radii: float) -> list[tuple[float, float]]:
    """`count` points around the centre, the first above it, at these distances in turn."""
    steps = [(k * 2 * math.pi / count, radii[k % len(radii)]) for k in range(count)]
    return [(distance * math.sin(angle), -distance * math.cos(angle)) for angle, distance in steps]


_QUARTER = [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32)]
CORNERS = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _turn(3, 1.0),
    "star": _turn(10, 1.0, 0.45),
    "cross": [
        point
        for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for point in ((c * x - s * y, s * x + c * y) for x, y in _QUARTER)
    ],
}


def draw_figure(image: Image.Image, kind: tuple[str, str], x: float, y: float, radius: float) -> None:
    """One (colour, shape) around `x, y`, in pixels."""
    (colour, shape), pen = kind, ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour][0])
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in CORNERS[shape]], fill=COLOURS[colour][0])


def draw_picture(rng: Random, kinds: list[tuple[str, str]]) -> Image.Image:
    """Figures in the cells of a grid, none in its exact middle."""
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    cell = rng.randint(38, 46)
    width, height = (max(cell * count, 48) + rng.randint(8, 24) for count in (columns, rows))
    image = Image.new("RGB", (width, height), "white")
    for place, kind in zip(rng.sample(range(rows * columns), len(kinds)), kinds):
        x, y = (place % columns + 0.5) * cell + rng.uniform(0, 6), (place // columns + 0.5) * cell + rng.uniform(0, 6)
        draw_figure(image, kind, x + 2, y + 2, rng.uniform(11, 14))
    return image


def record_film(rng: Random, kinds: list, seconds: int, move: str | None = None, appears: int = 0) -> bytes:
    """An mp4 file: the first figure crosses the picture or rests, the last one is there from second `appears` on."""
    width, height, radius = 84, 84, rng.uniform(10, 12)
    dx, dy = MOVES.get(move, (0, 0))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        for number in range(seconds * RATE):
            image, way = Image.new("RGB", (width, height), "white"), number / (seconds * RATE - 1) - 0.5
            x, y = width / 2 + dx * way * 54, height / 2 + dy * way * 54 - (0 if move else 16)
            draw_figure(image, kinds[0], x, y, radius)
            if len(kinds) > 1 and number >= appears * RATE:
                draw_figure(image, kinds[1], width / 2, height / 2 + 18, radius)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


# -- conversations ---------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """What is asked and how, a good answer, and which answers are right, whatever their words.

    `tools`, `call` and `result`: the tools declared, the call wanted as (name, arguments), what the tool gives back.
    """

    title: str
    messages: list[dict]
    wanted: str
    right: Callable[[str], bool]
    flags: dict = field(default_factory=dict)
    tools: list[dict] | None = None
    call: tuple[str, dict] | None = None
    result: str = ""


def _ask(text: str, *media) -> list[dict]:
    parts = [{"type": "video" if isinstance(one, bytes) else "image"} for one in media]
    for part, one in zip(parts, media):
        part[part["type"]] = one
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _kinds(rng: Random, count: int) -> list[tuple[str, str]]:
    return list(zip(rng.sample(list(COLOURS), count), rng.sample(list(SHAPES), count)))


def _article(kind: tuple[str, str]) -> str:
    return f"{'an' if kind[0] == 'orange' else 'a'} {' '.join(kind)}"


def _chinese(kind: tuple[str, str]) -> str:
    return f"{COLOURS[kind[0]][1]}的{SHAPES[kind[1]]}"


def _way(move: str) -> str:
    return move if move in ("up", "down") else f"to the {move}"


def _names(kinds: list, chinese: bool = False) -> Callable[[str], bool]:
    """Whether a text names these figures and no other colour or shape."""

    def right(text: str) -> bool:
        wanted = [_chinese(kind) if chinese else " ".join(kind) for kind in kinds]
        words = [z for _, z in COLOURS.values()] if chinese else list(COLOURS)
        named = sum(len(re.findall(word if chinese else rf"\b{word}\b", text.lower())) for word in words)
        return all(one in text.lower() for one in wanted) and named == len(kinds)

    return right


def _says(*wanted: str, never: tuple[str, ...] = ()) -> Callable[[str], bool]:
    """Whether a text holds all these words and numbers, and none of the others."""

    def has(text: str, word: str) -> bool:
        return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w|\.\d)", text, re.IGNORECASE) is not None

    def right(text: str) -> bool:
        return bool(text) and all(has(text, word) for word in wanted) and not any(has(text, word) for word in never)

    return right


def _tool(name: str, noun: str, parameter: str) -> dict:
    properties = {parameter: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"Get the {noun}", "parameters": parameters}}


def conversations(seed: int) -> list[Conversation]:
    """One for each skill, the same for the same seed."""
    rng = Random(seed)
    made = []

    def add(title: str, messages: list[dict], wanted: str, right: Callable[[str], bool], **more) -> None:
        made.append(Conversation(title, messages, wanted, right, **more))

    kinds = _kinds(rng, 2)
    wanted = f"I see {_article(kinds[0])} and {_article(kinds[1])}."
    add("What is in a picture", _ask("What is in this picture?", draw_picture(rng, kinds)), wanted, _names(kinds))
    kinds = _kinds(rng, 2)
    wanted = f"图中有{'和'.join(f'一个{_chinese(kind)}' for kind in kinds)}。"
    asked = _ask("图里有什么？", draw_picture(rng, kinds))
    add("The same in Chinese, at once", asked, wanted, _names(kinds, True), flags={"thinking": False})
    count = rng.randint(3, 5)
    kinds = [(rng.choice(list(COLOURS)), rng.choice(list(SHAPES))) for _ in range(count)]
    asked = _ask("How many figures are there?", draw_picture(rng, kinds))
    add("Counting", asked, f"There are {count} figures.", _says(str(count)))
    kinds = _kinds(rng, 2)
    side, (colour, shape) = rng.choice(list(enumerate(kinds)))
    one, other = ("first", "second") if side == 0 else ("second", "first")
    asked = _ask(f"Which picture has the {colour} {shape}?", *(draw_picture(rng, [kind]) for kind in kinds))
    add("Two pictures", asked, f"The {one} picture.", _says(one, never=(other,)))

    kinds, move = _kinds(rng, 1), rng.choice(list(MOVES))
    asked = _ask(f"Which way does the {kinds[0][1]} move?", record_film(rng, kinds, 3, move))
    right = _says(move, never=tuple(way for way in MOVES if way != move))
    add("Which way, in a video", asked, f"The {' '.join(kinds[0])} moves {_way(move)}.", right)
    kinds, second = _kinds(rng, 2), rng.randint(1, 3)
    name = " ".join(kinds[1])
    asked = _ask(f"In which second does the {name} appear?", record_film(rng, kinds, 4, None, second))
    add("Which second, in a video", asked, f"The {name} appears in second {second}.", _says(str(second)))

    asked = _ask("which one is bigger, 9.11 or 9.9? think carefully.")

    def right(text: str) -> bool:
        return re.findall(r"\d+\.\d+", text)[:1] == ["9.9"]

    add("Thinking", asked, "9.9 is bigger.", right)
    add("The same without thinking", asked, "9.9 is bigger.", right, flags={"thinking": False})

    numbers = [str(number) for number in rng.sample(range(100, 1000), 5)]
    listed = f"I'll start by listing five numbers: {', '.join(numbers)}, and I'll tell you the first three."
    talk = [
        {"role": "user", "content": "Tell me three random numbers."},
        {"role": "assistant", "reasoning": listed, "content": ", ".join(numbers[:3])},
        {"role": "user", "content": "What are the other two numbers you have in mind?"},
    ]
    wanted = f"The other two numbers are {numbers[3]} and {numbers[4]}."
    add("Thinking kept: preserve_thinking=True", talk, wanted, _says(*numbers[3:]), flags={"preserve_thinking": True})
    wanted = "I have no other numbers in mind."
    add("Thinking not kept: it cannot know them", talk, wanted, _says(never=tuple(numbers[3:])))

    city, weather = rng.choice(("Beijing", "Paris", "Oslo")), rng.choice(("sunny", "rainy", "windy"))
    degrees = rng.randint(2, 30)
    add(
        "A tool, and an answer from its result",
        _ask(f"What is the weather in {city}?"),
        f"The weather is {weather} and the temperature is {degrees}.",
        _says(weather, str(degrees)),
        tools=[_tool("get_weather", "weather for a city", "city"), _tool("find_price", "price of an item", "item")],
        call=("get_weather", {"city": city}),
        result=json.dumps({"weather": weather, "temperature": degrees}),
    )
    return made


# -- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One reply: what the model thought, said and called, and how long it took; the frames it was shown."""

    thought: str
    content: str
    calls: list[tuple[str, str]]  # id and arguments
    tokens: int
    seconds: float
    seen: list[Image.Image]


class Speaker:
    """A checkpoint that is asked.

    Args:
        folder: in the published layout, with or without code attached.
    """

    def __init__(self, folder: Path):
        self.processor, self.model = load_checkpoint(folder)

    def reply(self, messages: list[dict], tools: list[dict] | None, **flags) -> Turn:
        start = time.perf_counter()
        inputs = self.processor.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_tensors="pt", **flags
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        reply = self.processor.parse_response(new, flags.get("thinking", True))
        seconds = time.perf_counter() - start
        calls = [(call["id"], call["function"]["arguments"]) for call in reply["tool_calls"]]
        return Turn(reply["reasoning"], reply["content"], calls, len(new), seconds, frames_of(inputs))


def frames_of(inputs) -> list[Image.Image]:
    """The pictures and frames that a model is given, back from their patches."""
    if "pixel_values" not in inputs:
        return []
    frames, start = [], 0
    for count, rows, columns in inputs["grid_thws"].tolist():
        clip = inputs["pixel_values"][start : start + count * rows * columns].float().cpu()
        start += count * rows * columns
        size = clip.shape[-1]
        clip = clip.unflatten(0, (count, rows, columns)).permute(0, 1, 4, 2, 5, 3)  # frame, row, y, column, x, channel
        clip = ((clip * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
        frames += [Image.fromarray(frame.numpy()) for frame in clip.reshape(count, rows * size, columns * size, 3)]
    return frames


def _row(name: str, text: str) -> None:
    lines = textwrap.wrap(text, WIDTH) or [""]
    print(f"  {name:<9} {lines[0]}" + "".join(f"\n{' ' * 12}{line}" for line in lines[1:]))


def _show_reply(turn: Turn) -> None:
    if turn.thought:
        _row("thinks", turn.thought)
    if turn.content or not turn.calls:
        _row("answers", turn.content)
    for call_id, arguments in turn.calls:
        _row("calls", f"{call_id} {arguments}")


def hold(conversation: Conversation, speaker: Speaker, number: int) -> tuple[bool, list[Image.Image], str]:
    """One conversation, printed: whether it went right, what was seen, and the last answer."""
    print(f"\n{number}. {conversation.title}")
    for message in conversation.messages:
        content = message["content"]
        if isinstance(content, list):
            content = " ".join(part.get("text", f"[{part['type']}]") for part in content)
        if message["role"] == "assistant":
            _row("thought", message["reasoning"])
        _row("user" if message["role"] == "user" else "answered", content)
    turn = speaker.reply(conversation.messages, conversation.tools, **conversation.flags)
    _show_reply(turn)
    right, seconds, seen, tokens = True, turn.seconds, turn.seen, turn.tokens
    if conversation.call is not None:
        right, messages = _answer_call(conversation, turn)
        if right:
            _row("tool", conversation.result)
            turn = speaker.reply(messages, conversation.tools, **conversation.flags)
            _show_reply(turn)
            seconds, tokens = seconds + turn.seconds, tokens + turn.tokens
    right = right and conversation.right(turn.content)
    spent = f"{tokens} tokens in {seconds:.2f} s"
    _row("right" if right else "WRONG", spent if right else f"{spent}; wanted: {conversation.wanted}")
    return right, seen, turn.content


def _answer_call(conversation: Conversation, turn: Turn) -> tuple[bool, list[dict]]:
    """Whether the model called what it should, and the messages with the tool's result."""
    if len(turn.calls) != 1:
        return False, []
    (call_id, arguments), (name, wanted) = turn.calls[0], conversation.call
    try:
        right = call_id == f"functions.{name}:0" and json.loads(arguments) == wanted
    except ValueError:
        right = False
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    said = {"role": "assistant", "content": turn.content, "reasoning": turn.thought, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call_id, "content": conversation.result}
    return right, [*conversation.messages, said, result]


def contact_sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Captions, and under each its pictures beside each other at twice their size."""
    font, line, gap = ImageFont.load_default(16), 24, 10
    rows = [(caption, [one.resize((one.width * 2, one.height * 2)) for one in seen]) for caption, seen in rows]
    width = max(sum(one.width + gap for one in seen) for _, seen in rows) + gap
    width = max(width, *(int(font.getlength(caption)) + 2 * gap for caption, _ in rows))
    height = sum(line + max(one.height for one in seen) + 2 * gap for _, seen in rows) + gap
    sheet = Image.new("RGB", (width, height), "#d8d8d8")
    y = gap
    for caption, seen in rows:
        ImageDraw.Draw(sheet).text((gap, y), caption, fill="black", font=font)
        x, y = gap, y + line
        for one in seen:
            sheet.paste(one, (x, y))
            x += one.width + gap
        y += max(one.height for one in seen) + 2 * gap
    return sheet


def show(folder: Path, out: Path, seed: int) -> None:
    """All conversations with the checkpoint in `folder`; what it saw goes to `out/seen.png`."""
    import transformers

    start = time.perf_counter()
    speaker = Speaker(folder)
    loaded = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"Kimi-K2.6 in small: {folder}")
    print(f"{size / 1e6:.1f} MB, experts as INT4 words, loaded in {loaded:.1f} s")
    print(f"with transformers {transformers.__version__} and torch {torch.__version__}; greedy; cases of seed {seed}")
    rows, rights = [], []
    for number, conversation in enumerate(conversations(seed), 1):
        right, seen, answer = hold(conversation, speaker, number)
        rights.append(right)
        if seen:
            heard = answer if answer.isascii() else "(in Chinese)"  # the font at hand has Latin letters only
            rows.append((f"{number}. {conversation.title}: {heard:.80}" + ("" if right else "  WRONG"), seen))
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(out / "seen.png")
    print(f"\n{sum(rights)} of {len(rights)} right, in {time.perf_counter() - start:.0f} s.")
    print(f"What it saw is in {out / 'seen.png'}, as the model is given it: black edges fill up to whole tokens.")
