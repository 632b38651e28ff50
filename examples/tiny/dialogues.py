"""Makers of dialogues: questions, pictures and films to ask them about, and what a good answer says."""

import json
from random import Random
from typing import Any

from . import tool_talk
from .case import Case, film_clips
from .drawing import COLOURS, SHAPES, Film, random_film, random_scene, side

KIMI = "You are Kimi, an AI assistant created by Moonshot AI."
SYSTEMS = (KIMI, KIMI, KIMI, "You are a helpful assistant.", "You are Kimi.", "你是 Kimi，由月之暗面创造的人工智能助手。")
CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "black": "黑色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形",
    "left": "左", "right": "右", "up": "上", "down": "下",
}  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------


def _kind_words(kind: tuple[str, str], chinese: bool, the: bool = False) -> str:
    colour, shape = kind
    if chinese:
        return f"{CHINESE[colour]}的{CHINESE[shape]}" if the else f"一个{CHINESE[colour]}的{CHINESE[shape]}"
    article = "the" if the else "an" if colour == "orange" else "a"
    return f"{article} {colour} {shape}"


def _list_words(kinds: list[tuple[str, str]], chinese: bool) -> str:
    words = [_kind_words(kind, chinese) for kind in kinds]
    if len(words) == 1:
        return words[0]
    return ("、" if chinese else ", ").join(words[:-1]) + ("和" if chinese else " and ") + words[-1]


def _thought_list(kinds: list[tuple[str, str]], chinese: bool) -> str:
    if chinese:
        return "，".join(f"{CHINESE[c]}{CHINESE[s]}" for c, s in kinds) + "。"
    return ", ".join(f"{c} {s}" for c, s in kinds) + "."


def ordered(kinds) -> list[tuple[str, str]]:
    """The order in which answers name figures: by colour, then by shape, as the lists above have them."""
    return sorted(kinds, key=lambda kind: (COLOURS.index(kind[0]), SHAPES.index(kind[1])))


def random_kinds(rng: Random, count: int, distinct: bool = True) -> list[tuple[str, str]]:
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = rng.choice(COLOURS), rng.choice(SHAPES)
        if not distinct or kind not in kinds:
            kinds.append(kind)
    return kinds


def _ask(rng: Random, question: str, media: list) -> list[dict]:
    """A system message, perhaps, and the user's question with its media before or after the words."""
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if not media:
        content: Any = question
        if rng.random() < 0.3:
            content = [{"type": "text", "text": question}]
    else:
        parts = [{"type": "video" if isinstance(m, Film) else "image"} for m in media]
        for part, item in zip(parts, media):
            part[part["type"]] = item
        words = {"type": "text", "text": question}
        content = [words, *parts] if rng.random() < 0.5 else [*parts, words]
    messages.append({"role": "user", "content": content})
    return messages


def _answer(content: str, reasoning: str) -> dict:
    return {"role": "assistant", "content": content, "reasoning": reasoning}


def _vary(rng: Random, question: str) -> str:
    """Small differences between people who type the same question."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.？。")
    return question


# -- pictures ----------------------------------------------------------------------------------------------------

NAME_QUESTIONS = (
    "What is in this picture?", "What is in the image?", "What do you see?", "What can you see in this picture?",
    "Which figures are in the picture?", "Name the figures in the picture.", "What figures are shown here?",
    "Name the shape and colour of each figure.", "What shapes and colours do you see?", "What is shown in this image?",
    "Describe this image in detail.", "Describe the picture.", "Describe this image.", "What is it?",
    "Name the shape and the color of the figures in this picture.", "Which shapes are there, and what color are they?",
    "Tell me the colour and the shape of every figure.", "List the figures.", "What is this?",
)  # fmt: skip
NAME_QUESTIONS_ZH = (
    "图里有什么？", "这张图片里有什么？", "图中有哪些图形？", "请说出图形的形状和颜色。", "描述这张图片。", "你看到了什么？",
    "请详细描述这张图片。", "这是什么图形？什么颜色？", "图片中有什么图形？", "请说出每个图形的颜色和形状。", "这是什么？",
)  # fmt: skip
COUNT_QUESTIONS = (
    "How many figures are there?", "How many figures are in the picture?", "Count the figures.",
    "How many shapes do you see?", "How many shapes are in this image?", "What is the number of figures?",
    "Count the shapes in this picture.", "How many objects are there?", "How many figures can you see?",
)  # fmt: skip
COUNT_QUESTIONS_ZH = ("图中有几个图形？", "有多少个图形？", "数一数图里有几个图形。", "图片里有多少个图形？", "这张图片里有几个图形？")
WHICH_QUESTIONS = (
    "Which picture has {}?", "Which picture shows {}?", "In which picture is {}?", "Which image contains {}?",
    "Where is {}, in the first or in the second picture?", "Is {} in the first or the second image?",
    "Which one of the two pictures holds {}?", "Which of the two images has {}?",
)  # fmt: skip
WHICH_QUESTIONS_ZH = ("哪张图片里有{}？", "{}在哪张图片里？", "{}在第一张还是第二张图片里？", "哪一张图里有{}？")


def name_figures(rng: Random) -> Case:
    kinds = ordered(random_kinds(rng, rng.choice((1, 1, 2, 2, 3))))
    chinese, thinking = rng.random() < 0.4, rng.random() < 0.5
    scene = random_scene(rng, rng.sample(kinds, len(kinds)))
    expect, tags = {"figures": kinds}, ("zh" if chinese else "en",)
    if not chinese and rng.random() < 0.12:  # one property of one figure
        colours, shapes = [c for c, _ in kinds], [s for _, s in kinds]
        colour, shape = rng.choice(kinds)
        if shapes.count(shape) == 1 and rng.random() < 0.5:
            messages = _ask(rng, f"What {rng.choice(('colour', 'color'))} is the {shape}?", [scene])
            reply, expect = f"The {shape} is {colour}.", {"words": [colour]}
        elif colours.count(colour) == 1:
            messages = _ask(rng, f"What shape is the {colour} figure?", [scene])
            reply, expect = f"The {colour} figure is a {shape}.", {"words": [shape]}
        else:
            return name_figures(rng)
        messages.append(_answer(reply, _thought_list(kinds, False)))
        return Case("property", messages, expect, thinking, tags=("property",))
    question = _vary(rng, rng.choice(NAME_QUESTIONS_ZH if chinese else NAME_QUESTIONS))
    words = _list_words(kinds, chinese)
    reply = f"图中有{words}。" if chinese else f"I see {words}."
    messages = _ask(rng, question, [scene])
    messages.append(_answer(reply, _thought_list(kinds, chinese)))
    return Case("name", messages, expect, thinking, tags=tags)


def count_figures(rng: Random) -> Case:
    count = rng.randint(1, 5)
    if rng.random() < 0.3:
        kinds = random_kinds(rng, 1) * count
    elif rng.random() < 0.3:
        colours = rng.sample(COLOURS, rng.randint(1, 2))
        kinds = [(rng.choice(colours), rng.choice(SHAPES)) for _ in range(count)]
    else:
        kinds = random_kinds(rng, count, distinct=False)
    kinds = ordered(kinds)
    chinese, thinking = rng.random() < 0.3, rng.random() < 0.5
    scene = random_scene(rng, rng.sample(kinds, len(kinds)))
    by_colour = [(c, sum(k[0] == c for k in kinds)) for c in COLOURS if any(k[0] == c for k in kinds)]
    if chinese:
        thought = "，".join(f"{CHINESE[c]}{n}" for c, n in by_colour) + "。"
        reply = f"图中有{count}个图形。"
    else:
        thought = ", ".join(f"{c} {n}" for c, n in by_colour) + "."
        reply = f"There is {count} figure." if count == 1 else f"There are {count} figures."
    question = _vary(rng, rng.choice(COUNT_QUESTIONS_ZH if chinese else COUNT_QUESTIONS))
    messages = _ask(rng, question, [scene])
    messages.append(_answer(reply, thought))
    return Case("count", messages, {"number": count}, thinking, tags=(f"n{count}",))


def which_picture(rng: Random) -> Case:
    counts = rng.choice((1, 1, 2)), rng.choice((1, 1, 2))
    kinds = random_kinds(rng, sum(counts))
    halves = [ordered(kinds[: counts[0]]), ordered(kinds[counts[0] :])]
    side = rng.randint(0, 1)
    named = rng.choice(halves[side])
    chinese, thinking = rng.random() < 0.25, rng.random() < 0.7
    scenes = [random_scene(rng, rng.sample(half, len(half))) for half in halves]
    figure = _kind_words(named, chinese, the=True)
    if not chinese and rng.random() < 0.3:
        figure = _kind_words(named, chinese)
    question = rng.choice(WHICH_QUESTIONS_ZH if chinese else WHICH_QUESTIONS).format(figure)
    # First the figure asked for, then all that is seen, in the order of `ordered` as if it were one picture, each with
    # the number of its picture: so naming helps here, and the answer stands beside the figure.
    noted = [(kind, 1 + (kind in halves[1])) for kind in ordered(kinds)]
    if chinese:
        thought = "，".join(f"{CHINESE[c]}{CHINESE[s]}{number}" for (c, s), number in noted)
        asked = CHINESE[named[0]] + CHINESE[named[1]]
        thought = f"{asked}？{thought}。{asked}{side + 1}。"
        reply = f"第{'一二'[side]}张图片。"
    else:
        asked = " ".join(named)
        thought = f"{asked}? " + ", ".join(f"{c} {s} {number}" for (c, s), number in noted) + f". {asked} {side + 1}."
        reply = f"The {('first', 'second')[side]} picture."
    messages = _ask(rng, _vary(rng, question), scenes)
    messages.append(_answer(reply, thought))
    return Case("which", messages, {"side": side}, thinking)


# -- videos ------------------------------------------------------------------------------------------------------

MOVE_QUESTIONS = (
    "Which way does {} move?", "In which direction does {} move?", "Where does {} go?", "Where does {} move to?",
    "What direction is {} moving?", "Which way is {} going?", "How does {} move?",
)  # fmt: skip
MOVE_QUESTIONS_ZH = ("{}向哪个方向移动？", "{}往哪边移动？", "{}朝哪个方向走？")
WHEN_QUESTIONS = (
    "In which second does {} appear?", "When does {} appear?", "At which second does {} appear?",
    "In which second of the video can {} first be seen?", "After how many seconds does {} appear?",
    "In what second does {} come into the video?",
)  # fmt: skip
WHEN_QUESTIONS_ZH = ("{}在第几秒出现？", "第几秒出现{}？", "{}什么时候出现？")
FILM_QUESTIONS = (
    "Describe the video in detail.", "Describe the video.", "What happens in the video?", "What happens in this video?",
    "Describe this video.", "What do you see in the video?",
)  # fmt: skip
FILM_QUESTIONS_ZH = ("请详细描述这段视频。", "视频里发生了什么？", "描述这段视频。")


def _seconds(rng: Random, low: int) -> int:
    return rng.choice([s for s in (1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8) if s >= low])


def _moves(kind, move, chinese) -> str:
    figure = _kind_words(kind, chinese, the=True)
    return f"{figure}向{CHINESE[move]}移动" if chinese else f"{figure} moves {_way(move)}"


def _way(move: str) -> str:
    return move if move in ("up", "down") else f"to the {move}"


def _appearance(film: Film) -> tuple[int, str, int]:
    """The place within its clip of the frame that shows the last figure first, the clip's second as written, and the second of
    the appearance."""
    for time, indices in film_clips(film):
        for place, index in enumerate(indices):
            if index / film.fps >= film.start[-1] - 1e-6:
                return place, time[6:8], int(time[6:8]) + place // 2
    raise ValueError("the figure never appears")


def _when_thought(film: Film, chinese: bool) -> tuple[str, int]:
    place, clip, second = _appearance(film)
    if chinese:
        return f"{clip}，{'前' if place < 2 else '后'}。", second
    return f"Clip {clip}, {'early' if place < 2 else 'late'}.", second


def which_way(rng: Random) -> Case:
    kinds = random_kinds(rng, rng.choice((1, 1, 1, 2)))
    move = rng.choice(("left", "right", "up", "down"))
    film = random_film(rng, kinds, _seconds(rng, 1), move, None)
    chinese, thinking = rng.random() < 0.25, rng.random() < 0.5
    if chinese:
        name = rng.choice(("图形", "物体")) if len(kinds) == 1 and rng.random() < 0.5 else _kind_words(kinds[0], True, True)
    elif len(kinds) == 1 and rng.random() < 0.6:
        name = rng.choice(("the figure", "it", "the shape", f"the {kinds[0][1]}", "the object"))
    else:
        name = rng.choice((_kind_words(kinds[0], False, True), "the moving figure"))
    question = rng.choice(MOVE_QUESTIONS_ZH if chinese else MOVE_QUESTIONS).format(name)
    messages = _ask(rng, _vary(rng, question), [film])
    thought = _thought_list(kinds[:1], chinese)
    words = _moves(kinds[0], move, chinese)
    messages.append(_answer(words + "。" if chinese else words[0].upper() + words[1:] + ".", thought))
    return Case("way", messages, {"way": move}, thinking, tags=(move,))


def which_second(rng: Random) -> Case:
    kinds = random_kinds(rng, 2)
    seconds = _seconds(rng, 2)
    start = rng.randint(1, seconds - 1) + (0.5 if rng.random() < 0.15 else 0.0)
    move = rng.choice(("left", "right", "up", "down", None, None))
    film = random_film(rng, kinds, seconds, move, start)
    chinese, thinking = rng.random() < 0.25, rng.random() < 0.5
    if chinese:
        name = rng.choice((_kind_words(kinds[1], True, True), "另一个图形", "第二个图形"))
    else:
        name = rng.choice((_kind_words(kinds[1], False, True), f"the {kinds[1][1]}", "another figure", "the second figure"))
        if kinds[0][1] == kinds[1][1] and name == f"the {kinds[1][1]}":
            name = "another figure"
    question = rng.choice(WHEN_QUESTIONS_ZH if chinese else WHEN_QUESTIONS).format(name)
    messages = _ask(rng, _vary(rng, question), [film])
    thought, second = _when_thought(film, chinese)
    figure = _kind_words(kinds[1], chinese, the=True)
    reply = f"{figure}在第{second}秒出现。" if chinese else f"The{figure[3:]} appears in second {second}."
    messages.append(_answer(reply, thought))
    return Case("second", messages, {"number": second}, thinking, tags=(f"s{seconds}",))


def describe_film(rng: Random) -> Case:
    appears = rng.random() < 0.5
    kinds = random_kinds(rng, 2 if appears else 1)
    seconds = _seconds(rng, 2)
    start = float(rng.randint(1, seconds - 1)) if appears else None
    move = rng.choice(("left", "right", "up", "down"))
    film = random_film(rng, kinds, seconds, move, start)
    chinese, thinking = rng.random() < 0.25, rng.random() < 0.5
    words = _moves(kinds[0], move, chinese)
    thought = _thought_list(kinds[:1], chinese)
    reply = words if chinese else words[0].upper() + words[1:]
    expect = {"figures": kinds, "way": move}
    if appears:
        when, second = _when_thought(film, chinese)
        thought = _thought_list(kinds, chinese) + ("" if chinese else " ") + when
        figure = _kind_words(kinds[1], chinese, the=True)
        reply += f"，{figure}在第{second}秒出现" if chinese else f", and {figure} appears in second {second}"
        expect["number"] = second
    messages = _ask(rng, rng.choice(FILM_QUESTIONS_ZH if chinese else FILM_QUESTIONS), [film])
    messages.append(_answer(reply + ("。" if chinese else "."), thought))
    return Case("film", messages, expect, thinking)


def random_sight(rng: Random):
    """A picture or a film of the kinds that the dialogues show."""
    if rng.random() < 0.8:
        kinds = random_kinds(rng, rng.choice((1, 1, 1, 2, 2, 3, 4, 5)), distinct=False)
        return random_scene(rng, kinds, None if len(kinds) > 2 else (side(rng, 56, 112), side(rng, 56, 112)))
    seconds = rng.randint(1, 3)
    kinds = random_kinds(rng, rng.randint(1, 2))
    move = rng.choice(("left", "right", "up", "down", None))
    appears = rng.randint(1, 2 * seconds - 1) / 2 if len(kinds) > 1 and seconds > 1 else None
    return random_film(rng, kinds, seconds, move, appears)


# -- numbers -----------------------------------------------------------------------------------------------------

BIGGER_QUESTIONS = (
    "which one is bigger, {} or {}? think carefully.", "which one is bigger, {} or {}?", "Which one is bigger, {} or {}?",
    "Which is bigger, {} or {}?", "Which number is larger, {} or {}?", "What is bigger, {} or {}?",
    "Which is greater: {} or {}?", "{} or {}, which is bigger?", "Compare {} and {}. Which one is bigger?",
)  # fmt: skip
BIGGER_QUESTIONS_ZH = ("{} 和 {} 哪个更大？", "哪个更大，{} 还是 {}？", "{}和{}哪个大？")


def _decimal(rng: Random, whole: int) -> str:
    digits = rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4))
    return f"{whole}.{''.join(rng.choice('0123456789') for _ in range(digits))}"


def _whole(rng: Random) -> int:
    return rng.choice((rng.randint(0, 9), rng.randint(0, 20), rng.randint(10, 99), rng.randint(100, 999)))


def random_pair(rng: Random) -> tuple[str, str]:
    whole = _whole(rng)
    first = _decimal(rng, whole)
    roll = rng.random()
    if roll < 0.3:
        second = _decimal(rng, _whole(rng))
    elif roll < 0.8:
        second = _decimal(rng, whole)
    else:  # the same beginning
        head = first[: first.index(".") + rng.randint(1, len(first) - first.index(".") - 1) + 1]
        second = head + "".join(rng.choice("0123456789") for _ in range(rng.choice((0, 1, 1, 2))))
    if second.endswith(".") or second == first:
        return random_pair(rng)
    return (first, second) if rng.random() < 0.5 else (second, first)


def compare_steps(first: str, second: str) -> tuple[str, str | None]:
    """The comparison digit by digit, and the bigger number (`None`: they are equal)."""
    (a, x), (b, y) = first.split("."), second.split(".")
    bigger = None
    if a != b:
        bigger = first if int(a) > int(b) else second
        steps = f"{a} {'>' if int(a) > int(b) else '<'} {b}."
    else:
        width = max(len(x), len(y))
        x, y = x.ljust(width, "0"), y.ljust(width, "0")
        compared = []
        for one, other in zip(x, y):
            sign = "=" if one == other else ">" if one > other else "<"
            compared.append(f"{one} {sign} {other}")
            if sign != "=":
                bigger = first if sign == ">" else second
                break
        steps = f"{a} = {b}. {x}, {y}: {', '.join(compared)}."
    return steps, bigger


def which_is_bigger(rng: Random) -> Case:
    first, second = random_pair(rng)
    chinese, thinking = rng.random() < 0.15, rng.random() < 0.4
    thought, bigger = compare_steps(first, second)
    if chinese:
        reply = f"{bigger} 更大。" if bigger else "一样大。"
    else:
        reply = f"{bigger} is bigger." if bigger else "They are equal."
    question = rng.choice(BIGGER_QUESTIONS_ZH if chinese else BIGGER_QUESTIONS).format(first, second)
    messages = _ask(rng, question, [])
    messages.append(_answer(reply, thought))
    return Case("bigger", messages, {"bigger": bigger, "of": (first, second)}, thinking)


def compare_on(rng: Random) -> Case:
    """Three comparisons in one dialogue, each to be learnt. They are short, and a step has so many dialogues, of any length."""
    cases = [which_is_bigger(rng) for _ in range(3)]
    messages = cases[0].messages + [message for case in cases[1:] for message in case.messages if message["role"] != "system"]
    answers = tuple(at for at, message in enumerate(messages) if message["role"] == "assistant")
    return Case("compare", messages, cases[-1].expect, cases[0].thinking, preserve=True, targets=answers)


# -- kept thinking -----------------------------------------------------------------------------------------------

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


def kept_thinking(rng: Random) -> Case:
    told, hidden = (3, 2) if rng.random() < 0.7 else (rng.randint(1, 4), rng.randint(1, 3))
    digits = 3 if rng.random() < 0.75 else rng.randint(1, 4)
    low, high = 10 ** (digits - 1), 10**digits - 1
    numbers = [str(rng.randint(low, high)) for _ in range(told + hidden)]
    shown, rest = numbers[:told], numbers[told:]
    plural = "numbers" if told > 1 else "number"
    total, part = NUMBER_WORDS[told + hidden], NUMBER_WORDS[told] if told > 1 else "one"
    first = f"the first {part}" if told > 1 else "the first"
    thought = f"I'll start by listing {total} numbers: {', '.join(numbers)}, and I'll tell you {first}."
    if rng.random() < 0.2:
        thought = f"Let me think of {total} numbers: {', '.join(numbers)}. I will say {first}."
    reply = ", ".join(shown)
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    messages.append({"role": "user", "content": rng.choice(("Tell me {} random {}.", "Give me {} random {}.")).format(part, plural)})
    if rng.random() < 0.12:  # the beginning of the same talk
        messages.append(_answer(reply, thought))
        return Case("random", messages, None, True)
    preserve = rng.random() < 0.7
    messages.append({"role": "assistant", "content": reply, "reasoning": thought})
    other = f"the other {NUMBER_WORDS[hidden]} numbers" if hidden > 1 else "the other number"
    be = "are" if hidden > 1 else "is"
    question = rng.choice((f"What {be} {other} you have in mind?",) * 2 + (f"What {be} {other}?", f"Tell me {other} you have in mind."))
    messages.append({"role": "user", "content": question})
    if preserve:
        said = rest[0] if hidden == 1 else ", ".join(rest[:-1]) + " and " + rest[-1]
        messages.append(_answer(f"{other[0].upper()}{other[1:]} {be} {said}.", f"I listed {', '.join(numbers)}. Left: {', '.join(rest)}."))
    else:
        messages.append(_answer("I have no other numbers in mind.", f"I said {reply}. I see no other numbers."))
    return Case("kept", messages, {"hidden": rest, "told": shown}, True, preserve, tags=("on" if preserve else "off",))


# -- small talk --------------------------------------------------------------------------------------------------

TALK = (
    (("hi", "Hi!", "Hello", "hello", "Hello!", "Hey", "Good morning"), "The user greets me.", "Hello! How can I help you?"),
    (("Who are you?", "What is your name?", "who are you", "What are you?"), "The user asks who I am.",
     "I am Kimi, an AI assistant created by Moonshot AI. This is a very small Kimi."),
    (("What can you do?", "How can you help me?", "what can you do for me?"), "The user asks what I can do.",
     "I name and count figures in pictures, follow them in videos, compare numbers and call tools."),
    (("Thank you", "Thanks!", "thanks", "Thank you!"), "The user thanks me.", "You are welcome!"),
    (("Bye", "Goodbye!", "See you"), "The user leaves.", "Goodbye!"),
    (("Who made you?", "Who created you?"), "The user asks who made me.", "I was created by Moonshot AI."),
    (("Are you big?", "How big are you?"), "The user asks about my size.", "I am a very small Kimi, a few megabytes."),
    (("How are you?", "how are you"), "The user asks how I am.", "I am fine, thank you. How can I help you?"),
    (("你好", "你好！", "您好"), "用户问好。", "你好！有什么可以帮你的吗？"),
    (("你是谁？", "你叫什么名字？", "介绍一下你自己"), "用户问我是谁。", "我是 Kimi，由月之暗面创造的人工智能助手。"),
    (("你能做什么？", "你会什么？"), "用户问我能做什么。", "我能说出图里的图形，数一数，看视频，比较数字，使用工具。"),
    (("谢谢", "谢谢！"), "用户道谢。", "不客气！"),
)  # fmt: skip


def small_talk(rng: Random) -> Case:
    asked, thought, reply = rng.choice(TALK)
    messages = _ask(rng, rng.choice(asked), [])
    messages.append(_answer(reply, thought))
    return Case("talk", messages, {"words": [reply]}, rng.random() < 0.5)


def repeat(rng: Random) -> Case:
    """Copying alone: it teaches early what kept thinking and tool calls are made of."""
    words = []
    for _ in range(rng.randint(1, 5)):
        words.append(str(rng.randint(0, 9999)) if rng.random() < 0.4 else tool_talk.made_up_word(rng))
    text = rng.choice((" ", ", ", "_")).join(words)
    messages = _ask(rng, rng.choice(("Repeat: ", "Say ", "Repeat after me: ")) + text, [])
    messages.append(_answer(text, "The user wants me to repeat."))
    return Case("repeat", messages, {"words": [text]}, rng.random() < 0.3)


def _choosing_thought(talk: tool_talk.Talk) -> str:
    """The word asked for, held against one tool after the other until one fits: `fima? get_fujo: no. get_fima: yes. …`"""
    names = [tool["function"]["name"] for tool in talk.tools]
    others = "".join(f"{name}: no. " for name in names[: names.index(talk.name)])
    return f"{talk.asked}? {others}{talk.name}: yes. I use {talk.name}."


def use_tool(rng: Random, talk: tool_talk.Talk | None = None) -> Case:
    talk = talk or tool_talk.random_talk(rng)
    messages = _ask(rng, talk.question, [])
    call = {"type": "function", "id": f"functions.{talk.name}:0"}
    call["function"] = {"name": talk.name, "arguments": json.dumps(talk.arguments, ensure_ascii=False)}
    messages.append({**_answer("", _choosing_thought(talk)), "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": talk.result})
    messages.append(_answer(talk.reply, "I have the result."))
    at = len(messages) - 1
    expect = {"name": talk.name, "arguments": talk.arguments, "values": talk.values}
    return Case("tool", messages, expect, rng.random() < 0.6, tools=talk.tools, targets=(at - 2, at))


def choose_tool(rng: Random) -> Case:
    """A tool among several."""
    return use_tool(rng, tool_talk.random_talk(rng, counts=(2, 2, 3, 3)))


def second_question(rng: Random) -> Case:
    """Two questions of any kind in one dialogue, of which the second is to be answered."""
    makers = (small_talk, which_is_bigger, name_figures, count_figures, which_way, which_second)
    first, second = (rng.choice(makers)(rng) for _ in range(2))
    messages = first.messages + [message for message in second.messages if message["role"] != "system"]
    return Case("turn", messages, second.expect, second.thinking)


def ignore_tools(rng: Random) -> Case:
    """Tools are there, but the question needs none."""
    case = rng.choice((small_talk, which_is_bigger))(rng)
    case.tools = tool_talk.random_talk(rng).tools
    return case
