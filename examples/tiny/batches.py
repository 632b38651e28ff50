"""Dialogues as tensors.

The batches of a step are a function of (seed, step, rank, world) alone, so a resumed run sees the same data.
"""

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import tiktoken
import torch

from .case import GRID, STEP, Case, film_clips, render, tokens_of
from .dialogues import random_sight
from .drawing import COLOURS, MOVES, SHAPES, Film, draw, draw_frame
from .mixes import MIX, Mix, draw_case

PATCH = 14
IGNORED = -100
LENGTH_STEP = 16  # lengths come in few sizes: a size met for the first time is slow
ROWS_STEP = 4  # so do their rows
PATCH_WORK = 0.4  # what a patch costs, in tokens of text


@dataclass
class Batch:
    """Dialogues of similar length, padded on the right.

    ids, labels `(rows, length)` int64 (`labels` stands one to the left: what follows each token, or -100);
    clips: by grid, the patches of all clips of that size, `(clips, patches, 588)` uint8, and the place of each clip's
    first token among the batch's media tokens; sights `(media tokens, 4)`: what stands there, see `sights_of`.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    skills: list[str]
    clips: dict[tuple[int, int, int], tuple[torch.Tensor, list[int]]]
    sights: torch.Tensor


def cut_patches(frame: np.ndarray) -> np.ndarray:
    """`(height, width, 3)` uint8 → `(patches, 588)`: padded with zeros to whole tokens, channels first in a patch."""
    height, width, _ = frame.shape
    frame = np.pad(frame, ((0, -height % GRID), (0, -width % GRID), (0, 0)))
    rows, columns = frame.shape[0] // PATCH, frame.shape[1] // PATCH
    frame = frame.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return frame.reshape(rows * columns, 3 * PATCH * PATCH)


def media_clips(item) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """Grid and patches of a picture, or of each clip of a film."""
    scene = item.scene if isinstance(item, Film) else item
    rows, columns = (-(-side // GRID) * GRID // PATCH for side in (scene.height, scene.width))
    if not isinstance(item, Film):
        return [((1, rows, columns), cut_patches(np.asarray(draw(item))))]
    clips = []
    for _, indices in film_clips(item):
        frames = [cut_patches(np.asarray(draw_frame(item, index))) for index in indices]
        clips.append(((len(frames), rows, columns), np.concatenate(frames)))
    return clips


# What a media token shows, each a class or -100: which figure covers it (0: none), how many figures have their centre in
# it (2: two or more), which way the figure moves (0: it rests), in which frame of the clip it is first seen.
SIGHTS = (1 + len(COLOURS) * len(SHAPES), 3, 1 + len(MOVES), STEP)


def sights_of(item) -> np.ndarray:
    """`(media tokens, 4)` int64: the classes above for every token of a picture, or of all clips of a film."""
    if isinstance(item, Film):
        clips = [[index / item.fps for index in indices] for _, indices in film_clips(item)]
        return np.concatenate([_sights(item.scene, item, times) for times in clips])
    return _sights(item, None, None)


def _sights(scene, film: Film | None, times: list[float] | None) -> np.ndarray:
    rows, columns = -(-scene.height // GRID), -(-scene.width // GRID)
    left, top = np.meshgrid(np.arange(columns) * GRID, np.arange(rows) * GRID)
    sights = np.zeros((rows, columns, len(SIGHTS)), np.int64)
    sights[..., 2:] = IGNORED
    nearest = np.full((rows, columns), np.inf)
    for at, figure in enumerate(scene.figures):
        x, y, way, entrance = figure.x, figure.y, IGNORED, IGNORED
        if film is not None:
            seen = [k for k, time in enumerate(times) if time >= film.start[at] - 1e-6]
            if not seen:
                continue
            (dx, dy), entrance = film.speed[at], seen[0]
            middle = times[seen[len(seen) // 2]]
            x, y = x + dx * middle, y + dy * middle
            way = [(np.sign(dx), np.sign(dy)) == move for move in [(0, 0), *MOVES.values()]].index(True)
        away = np.hypot(x - np.clip(x, left, left + GRID), y - np.clip(y, top, top + GRID))
        covered = (away < 0.7 * figure.radius) & (away < nearest)
        nearest[covered] = away[covered]
        kind = 1 + COLOURS.index(figure.colour) * len(SHAPES) + SHAPES.index(figure.shape)
        sights[covered, 0], sights[covered, 2], sights[covered, 3] = kind, way, entrance
        row, column = min(max(int(y // GRID), 0), rows - 1), min(max(int(x // GRID), 0), columns - 1)
        sights[row, column, 1] = min(2, sights[row, column, 1] + 1)
    return sights.reshape(rows * columns, -1)


def encode(encoding: tiktoken.Encoding, case: Case) -> tuple[list[int], list[int]]:
    """Ids of a dialogue, and the labels of the tokens that follow."""
    ids: list[int] = []
    labels: list[int] = []
    for text, target in render(case):
        piece = encoding.encode(text, allowed_special="all")
        ids += piece
        labels += piece if target else [IGNORED] * len(piece)
    return ids[:-1], labels[1:]


def make_batches(
    encoding: tiktoken.Encoding,
    seed: int,
    step: int,
    rank: int,
    world: int,
    rows: int,
    parts: int,
    mix: Mix = MIX,
) -> list[Batch]:
    """What process `rank` of `world` gets of a step: of `rows * world` dialogues, cut by length into `parts * world`
    batches, about its share of the work."""
    rng = Random(f"{seed}/{step}")
    coded = [(case, *encode(encoding, case)) for case in (draw_case(rng, mix) for _ in range(rows * world))]
    coded.sort(key=lambda item: len(item[1]))
    lengths = [padded(len(ids)) for _, ids, _ in coded]
    cuts = best_cuts(lengths, parts * world)
    owners = shared_out([work_of(coded[a:b], lengths[b - 1]) for a, b in cuts], world)
    return [collate(coded[a:b], encoding) for (a, b), owner in zip(cuts, owners) if owner == rank]


def shared_out(works: list[float], world: int) -> list[int]:
    """Which of `world` processes does each of these: the longest come first, and go to the one that has least so far."""
    loads, owners = [0.0] * world, [0] * len(works)
    for at in sorted(range(len(works)), key=lambda at: -works[at]):
        owners[at] = loads.index(min(loads))
        loads[owners[at]] += works[at]
    return owners


def padded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def best_cuts(lengths: list[int], parts: int) -> list[tuple[int, int]]:
    """Where to cut rows of rising lengths into `parts` batches (one row each, if there are less), for the least padding."""
    count = len(lengths)
    step = ROWS_STEP if parts * ROWS_STEP <= count else 1
    parts = min(parts, count)
    fewest = [[0.0] + [math.inf] * count]  # by parts, by rows in them
    begins = []
    for _ in range(parts):
        ways = [(math.inf, 0)] * (count + 1)
        for b in (*range(step, count, step), count):
            ways[b] = min((fewest[-1][a] + (b - a) * lengths[b - 1], a) for a in range(0, b, step))
        fewest.append([tokens for tokens, _ in ways])
        begins.append([begin for _, begin in ways])
    cuts, b = [], count
    for begin in reversed(begins):
        cuts.append((begin[b], b))
        b = begin[b]
    return cuts[::-1]


def work_of(coded: list[tuple[Case, list[int], list[int]]], length: int) -> float:
    """About what a batch costs, in tokens of text."""
    patches = sum(patches_of(item) for case, _, _ in coded for item in case.media)
    return len(coded) * length + PATCH_WORK * patches


def patches_of(item) -> int:
    if isinstance(item, Film):
        return 4 * tokens_of(item.scene.width, item.scene.height) * sum(len(indices) for _, indices in film_clips(item))
    return 4 * tokens_of(item.width, item.height)


def collate(coded: list[tuple[Case, list[int], list[int]]], encoding: tiktoken.Encoding) -> Batch:
    length = padded(max(len(ids) for _, ids, _ in coded))
    pad = encoding.encode_single_token("[PAD]")
    ids = torch.full((len(coded), length), pad)
    labels = torch.full((len(coded), length), IGNORED)
    for row, (_, one, label) in enumerate(coded):
        ids[row, : len(one)] = torch.tensor(one)
        labels[row, : len(label)] = torch.tensor(label)
    clips, sights = collate_media([item for case, _, _ in coded for item in case.media])
    return Batch(ids, labels, [case.skill for case, _, _ in coded], clips, sights)


def collate_media(items: list) -> tuple[dict, torch.Tensor]:
    """`clips` and `sights` of a batch with these pictures and films."""
    groups: dict[tuple, tuple[list, list]] = {}
    sights = [np.zeros((0, len(SIGHTS)), np.int64)]
    start = 0
    for item in items:
        sights.append(sights_of(item))
        for grid, patches in media_clips(item):
            pixels, starts = groups.setdefault(grid, ([], []))
            pixels.append(patches)
            starts.append(start)
            start += grid[1] * grid[2] // 4
    clips = {grid: (torch.from_numpy(np.stack(pixels)), starts) for grid, (pixels, starts) in groups.items()}
    return clips, torch.from_numpy(np.concatenate(sights))


def make_sights(seed: int, step: int, rank: int, count: int) -> Batch:
    """Pictures and films that nobody talks about, to learn seeing from: a batch without dialogues."""
    rng = Random(f"sights {seed}/{step}/{rank}")
    clips, sights = collate_media([random_sight(rng) for _ in range(count)])
    return Batch(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64), [], clips, sights)
