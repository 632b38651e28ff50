"""What a checkpoint can do: greedy answers to generated cases it was not trained on, through the real processor."""

import json
import re
from random import Random
from typing import Callable

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .case import Case
from .dialogues import (
    CHINESE,
    count_figures,
    describe_film,
    kept_thinking,
    name_figures,
    second_question,
    use_tool,
    which_is_bigger,
    which_picture,
    which_second,
    which_way,
)
from .drawing import COLOURS, SHAPES, Film, draw, draw_frame

NEW_TOKENS = 160
ENGLISH_FIGURE = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
_COLOUR_OF = {CHINESE[colour]: colour for colour in COLOURS}
_SHAPE_OF = {CHINESE[shape]: shape for shape in SHAPES}
CHINESE_FIGURE = re.compile(f"({'|'.join(_COLOUR_OF)})的?({'|'.join(_SHAPE_OF)})")
CALL = re.compile(
    r"<\|tool_calls_section_begin\|><\|tool_call_begin\|>(functions\.(.*?):\d+)<\|tool_call_argument_begin\|>(.*?)"
    r"<\|tool_call_end\|><\|tool_calls_section_end\|>",
    re.DOTALL,
)


def _only(make: Callable[[Random], Case], want: Callable[[Case], bool], thinking: bool | None):
    """A maker of cases that keeps those wanted, and sets the mode."""

    def maker(rng: Random) -> Case:
        while True:
            case = make(rng)
            if want(case):
                if thinking is not None:
                    case.thinking = thinking
                return case

    return maker


def _cases(thinking: bool) -> dict[str, Callable[[Random], Case]]:
    return {
        "figures, English": _only(name_figures, lambda c: "en" in c.tags, thinking),
        "figures, Chinese": _only(name_figures, lambda c: "zh" in c.tags, thinking),
        "count, 1 to 5": _only(count_figures, lambda c: True, thinking),
        "video: which way": _only(which_way, lambda c: True, thinking),
        "video: which second": _only(which_second, lambda c: True, thinking),
        "video: describe": _only(describe_film, lambda c: True, thinking),
        "which is bigger": _only(which_is_bigger, lambda c: True, thinking),
        "which of two pictures": _only(which_picture, lambda c: True, thinking),
        "tool call and answer": _only(use_tool, lambda c: True, thinking),
    }


# Skill → maker of its cases; the bars of the table stand in `BARS`.
SKILLS = {
    **_cases(True),
    "kept thinking: names both": _only(kept_thinking, lambda c: "on" in c.tags and _like_the_card(c), None),
    "not kept: names both": _only(kept_thinking, lambda c: "off" in c.tags and _like_the_card(c), None),
    "second question": _only(second_question, lambda c: True, True),
    **{f"{name} (instant)": maker for name, maker in _cases(False).items()},
}
BARS = {
    "figures, English": 95, "figures, Chinese": 95, "count, 1 to 5": 90, "video: which way": 90,
    "video: which second": 90, "which is bigger": 95, "which is bigger (instant)": 90, "which of two pictures": 90,
    "tool call and answer": 90, "kept thinking: names both": 95,
}  # fmt: skip


def _like_the_card(case: Case) -> bool:
    return len(case.expect["told"]) == 3 and len(case.expect["hidden"]) == 2


def for_processor(case: Case) -> list[dict]:
    """The messages with their pictures drawn, as a user would hand them in."""
    drawn = []
    for message in case.messages[: case.targets[0]]:
        message = dict(message)
        if isinstance(message["content"], list):
            message["content"] = [_drawn(part) for part in message["content"]]
        drawn.append(message)
    return drawn


def _drawn(part: dict) -> dict:
    if part["type"] == "image":
        return {"type": "image", "image": draw(part["image"])}
    if part["type"] == "video":
        film: Film = part["video"]
        frames = [draw_frame(film, index) for index in range(film.total)]
        return {"type": "video", "video": frames, "fps": film.fps}
    return part


def prompt(processor, messages: list[dict], case: Case):
    return processor.apply_chat_template(
        messages,
        tools=case.tools,
        thinking=case.thinking,
        preserve_thinking=case.preserve,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def generate(model, processor, prompts: list) -> list[str]:
    """Greedy replies to several prompts at once, markers included, up to the end of the turn."""
    length = max(p["input_ids"].shape[1] for p in prompts)
    pad = processor.tokenizer.pad_token_id

    def left(name, value):
        return torch.cat([F.pad(p[name], (length - p[name].shape[1], 0), value=value) for p in prompts])

    inputs = {"input_ids": left("input_ids", pad), "attention_mask": left("attention_mask", 0)}
    seen = [p for p in prompts if "pixel_values" in p]
    if seen:
        inputs["pixel_values"] = torch.cat([p["pixel_values"] for p in seen])
        inputs["grid_thws"] = torch.cat([p["grid_thws"] for p in seen])
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    texts = processor.tokenizer.batch_decode(out[:, length:])
    return [text.split("<|im_end|>")[0].replace("[PAD]", "") for text in texts]


def split_reply(text: str, thinking: bool) -> tuple[str, str]:
    """Reasoning and content. Thinking that never closes has no content."""
    if not thinking:
        return "", text
    reasoning, closed, content = text.partition("</think>")
    return reasoning, content if closed else ""


def figures_in(text: str) -> set[tuple[str, str]]:
    found = set(ENGLISH_FIGURE.findall(text))
    return found | {(_COLOUR_OF[c], _SHAPE_OF[s]) for c, s in CHINESE_FIGURE.findall(text)}


def judge(case: Case, content: str) -> bool:
    """Whether the content of a reply is right, whatever words it uses."""
    expect, lower = case.expect, content.lower()
    numbers = re.findall(r"\d+(?:\.\d+)?", content)
    right = True
    if "figures" in expect:
        right &= figures_in(lower) == set(expect["figures"])
    if "number" in expect:
        right &= numbers == [str(expect["number"])]
    if "way" in expect:
        ways = [way for way in ("left", "right", "up", "down") if re.search(rf"\b{way}\b|向{CHINESE[way]}", lower)]
        right &= ways == [expect["way"]]
    if "side" in expect:
        sides = [k for k, words in enumerate((("first", "第一"), ("second", "第二"))) if any(w in lower for w in words)]
        right &= sides == [expect["side"]]
    if "bigger" in expect:
        right &= numbers[:1] == [expect["bigger"]] if expect["bigger"] else not numbers
    if "hidden" in expect:
        right &= all(number in numbers for number in expect["hidden"])
    if "words" in expect:
        right &= all(word.lower() in lower for word in expect["words"])
    return right


def _call_in(content: str):
    """The one call of a reply as (id, name, arguments), or None."""
    calls = CALL.findall(content)
    if len(calls) != 1:
        return None
    try:
        return calls[0][0], calls[0][1], json.loads(calls[0][2])
    except ValueError:
        return None


def answer(model, processor, cases: list[Case]) -> list[tuple[bool, str]]:
    """For each case whether the model is right, and all that it said."""
    prompts = [prompt(processor, for_processor(case), case) for case in cases]
    replies = generate(model, processor, prompts)
    results = []
    followed: list[tuple[int, list[dict]]] = []
    for at, (case, reply) in enumerate(zip(cases, replies)):
        reasoning, content = split_reply(reply, case.thinking)
        if case.tools is None or "name" not in case.expect:
            results.append((judge(case, content), reply))
            continue
        call = _call_in(content)
        right = call is not None and call[1:] == (case.expect["name"], case.expect["arguments"])
        results.append((right, reply))
        if right:  # the tool answers the call that the model made
            made = {"type": "function", "id": call[0]}
            made["function"] = {"name": call[1], "arguments": json.dumps(call[2], ensure_ascii=False)}
            said = {"role": "assistant", "content": "", "reasoning": reasoning, "tool_calls": [made]}
            result = {**case.messages[case.targets[-1] - 1], "tool_call_id": call[0]}
            followed.append((at, [*for_processor(case), said, result]))
    if followed:
        second = generate(model, processor, [prompt(processor, talk, cases[at]) for at, talk in followed])
        for (at, _), reply in zip(followed, second):
            content = split_reply(reply, cases[at].thinking)[1]
            right = all(value in content for value in cases[at].expect["values"])
            results[at] = (right, results[at][1] + "\n" + reply)
    return results


def evaluate(
    model, processor, count: int, seed: int, skills: list[str] | None = None, batch: int = 50
) -> tuple[dict[str, float], dict[str, list]]:
    """Share of right answers per skill in percent, and per skill what was said where it was wrong."""
    table, wrong = {}, {}
    bar = tqdm(skills or list(SKILLS), desc="evaluation")
    for skill in bar:
        bar.set_postfix_str(skill)
        cases = [SKILLS[skill](Random(f"evaluation {seed} {skill} {k}")) for k in range(count)]
        results = []
        for start in range(0, count, batch):
            results += answer(model, processor, cases[start : start + batch])
        table[skill] = 100 * sum(right for right, _ in results) / count
        wrong[skill] = [(case, said) for case, (right, said) in zip(cases, results) if not right]
    return table, wrong
