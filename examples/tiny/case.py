"""A dialogue, and how the chat template and the processor write it."""

from dataclasses import dataclass, field
from typing import Any

from kimi_k26.image_processing_kimi_k26 import choose_frames, timestamp
from kimi_k26.tool_declaration_kimi import encode_tools_to_typescript

from .drawing import Film

GRID, STEP = 28, 4  # pixels of a side of one media token; frames of a clip
SAMPLE_FPS = 2.0


@dataclass
class Case:
    """One dialogue. `targets` are the indices of the assistant messages to learn; the last message is always one.

    `expect` says what a right answer holds: see `evaluation.judge`.
    """

    skill: str
    messages: list[dict]
    expect: Any
    thinking: bool = True
    preserve: bool = False
    tools: list[dict] | None = None
    targets: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()
    media: list = field(default_factory=list)

    def __post_init__(self):
        self.targets = self.targets or (len(self.messages) - 1,)
        for message in self.messages:
            if isinstance(message["content"], list):
                self.media += [p[p["type"]] for p in message["content"] if p["type"] != "text"]


def tokens_of(width: int, height: int) -> int:
    return -(-width // GRID) * -(-height // GRID)


def film_clips(film: Film) -> list[tuple[str, list[int]]]:
    """The clips the processor cuts a film into: timestamp, and indices of the frames."""
    indices = choose_frames(film.total, film.fps, SAMPLE_FPS)
    starts = range(0, len(indices), STEP)
    return [(timestamp(indices[s] / film.fps, "hh:mm:ss.fff"), indices[s : s + STEP]) for s in starts]


def _content_text(content) -> str:
    if isinstance(content, str):
        return content
    text = ""
    for part in content:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image":
            scene = part["image"]
            pads = "<|media_pad|>" * tokens_of(scene.width, scene.height)
            text += f"<|media_begin|>image<|media_content|>{pads}<|media_end|>\n"
        else:
            film = part["video"]
            pads = "<|media_pad|>" * tokens_of(film.scene.width, film.scene.height)
            for time, _ in film_clips(film):
                text += f"{time}<|media_begin|>video<|media_content|>{pads}<|media_end|>"
            text += "\n"
    return text


def render(case: Case) -> list[tuple[str, bool]]:
    """The dialogue as the chat template and the processor write it, in pieces of (text, is the assistant's)."""
    pieces: list[tuple[str, bool]] = []
    text, calls = "", 0
    if case.tools:
        text += f"<|im_system|>tool_declare<|im_middle|>{encode_tools_to_typescript(case.tools)}<|im_end|>"
    for index, message in enumerate(case.messages):
        role, words = message["role"], _content_text(message["content"])
        opening = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(role, "<|im_system|>")
        text += f"{opening}{role}<|im_middle|>"
        if role == "tool":
            text += f"## Return of {message['tool_call_id']}\n"
        if role != "assistant":
            text += f"{words}<|im_end|>"
            continue
        for call in message.get("tool_calls", ()):
            function = call["function"]
            words += (
                f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{function['name']}:{calls}"
                f"<|tool_call_argument_begin|>{function['arguments']}<|tool_call_end|><|tool_calls_section_end|>"
            )
            calls += 1
        target = index in case.targets
        reasoning = message.get("reasoning", "") if case.thinking and (target or case.preserve) else ""
        words += "<|im_end|>"
        if not target:
            text += f"<think>{reasoning}</think>{words}"
        elif case.thinking:
            pieces += [(text + "<think>", False), (f"{reasoning}</think>{words}", True)]
            text = ""
        else:
            pieces += [(text + "<think></think>", False), (words, True)]
            text = ""
    return pieces
