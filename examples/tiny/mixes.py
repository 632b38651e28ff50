"""What training draws its dialogues from: at the beginning, in most of its time, at the end."""

from random import Random
from typing import Callable

from .case import Case
from .dialogues import (
    choose_tool,
    compare_on,
    count_figures,
    describe_film,
    ignore_tools,
    kept_thinking,
    name_figures,
    repeat,
    second_question,
    small_talk,
    use_tool,
    which_is_bigger,
    which_picture,
    which_second,
    which_way,
)

Mix = tuple[tuple[Callable[[Random], Case], float], ...]

# Maker of a dialogue, and its share of the training data. What asks for most learning has most.
MIX: Mix = (
    (name_figures, 15),
    (count_figures, 10),
    (which_picture, 16),
    (which_way, 5),
    (which_second, 8),
    (describe_film, 2),
    (which_is_bigger, 18),
    (kept_thinking, 5),
    (use_tool, 22),
    (ignore_tools, 1),
    (repeat, 1),
    (small_talk, 1.5),
)


# The beginning of training: short dialogues, most of them about seeing and copying, which all the rest is made of.
EASY_MIX: Mix = (
    (name_figures, 22),
    (count_figures, 6),
    (which_picture, 8),
    (which_way, 4),
    (which_second, 4),
    (which_is_bigger, 14),
    (kept_thinking, 6),
    (repeat, 18),
    (small_talk, 3),
)


# The end of training: two fifths of it are what was hardest, tools; and dialogues go on after an answer.
LAST_MIX: Mix = (
    (use_tool, 10),
    (choose_tool, 31),
    (second_question, 6),
    (name_figures, 12),
    (count_figures, 7),
    (which_picture, 10),
    (which_way, 2),
    (which_second, 4),
    (describe_film, 1),
    (which_is_bigger, 4),
    (compare_on, 10),
    (kept_thinking, 2),
    (ignore_tools, 1),
    (repeat, 0.5),
    (small_talk, 1.5),
)


def draw_case(rng: Random, mix: Mix = MIX) -> Case:
    makers, shares = zip(*mix)
    return rng.choices(makers, shares)[0](rng)
