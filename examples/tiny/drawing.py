"""Pictures and videos of coloured figures, drawn with Pillow; every choice comes from the random generator given."""

import colorsys
import io
import math
from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}

# Hue in degrees, saturation, value: wide enough that any shade a person would call so is inside.
_SHADES = {
    "red": ((-12, 8), (0.75, 1.0), (0.65, 1.0)),
    "orange": ((22, 40), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((50, 62), (0.75, 1.0), (0.9, 1.0)),
    "green": ((95, 150), (0.6, 1.0), (0.45, 0.85)),
    "blue": ((205, 245), (0.65, 1.0), (0.5, 1.0)),
    "purple": ((268, 302), (0.5, 1.0), (0.45, 0.9)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.14)),
}
MIN_RADIUS = 6.0  # pixels: smaller figures are not told apart by a person either


@dataclass
class Figure:
    """One figure: what it is, and where (centre and radius in pixels, angle in degrees)."""

    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 10.0
    angle: float = 0.0
    stretch: float = 1.0
    rgb: tuple = (0, 0, 0)
    outline: tuple | None = None
    wing: float = 0.45  # how deep a star is cut, how wide a cross's arms are


@dataclass
class Scene:
    """A picture before it is drawn."""

    width: int
    height: int
    figures: list[Figure]
    background: tuple = (255, 255, 255)
    fade: tuple | None = None  # the background's colour at the far edge
    smooth: bool = True
    noise: float = 0.0
    blur: float = 0.0
    quality: int = 0  # of JPEG; 0: none
    seed: int = 0


@dataclass
class Film:
    """A video before it is drawn: `scene.figures[k]` stands at `x + t·dx, y + t·dy` pixels from second `start[k]` on."""

    scene: Scene
    fps: float
    total: int  # frames of the file
    speed: list[tuple[float, float]] = field(default_factory=list)  # pixels a second
    start: list[float] = field(default_factory=list)  # seconds


def shade(rng: Random, colour: str) -> tuple[int, int, int]:
    hue, saturation, value = (rng.uniform(*span) for span in _SHADES[colour])
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def _paper(rng: Random, dark: bool) -> tuple[int, int, int]:
    if dark:
        base = rng.randint(0, 70)
        return tuple(min(90, max(0, base + rng.randint(-12, 12))) for _ in range(3))
    if rng.random() < 0.4:
        return (255, 255, 255)
    base = rng.randint(190, 250)
    return tuple(min(255, base + rng.randint(-14, 14)) for _ in range(3))


def side(rng: Random, low: int = 56, high: int = 140) -> int:
    """A side in pixels, small ones more often: they cost less and teach the same."""
    return round(low * (high / low) ** rng.random())


def picture_size(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.12:
        return side(rng, 112, 280), side(rng, 112, 224)
    return side(rng), side(rng)


def random_scene(rng: Random, kinds: list[tuple[str, str]], size: tuple[int, int] | None = None) -> Scene:
    """Figures of these (colour, shape), apart from each other, on a background that none of them melts into."""
    width, height = size or picture_size(rng)
    dark = rng.random() < 0.2 and all(colour != "black" for colour, _ in kinds)
    background = _paper(rng, dark)
    scene = Scene(width, height, [], background, seed=rng.getrandbits(32))
    if rng.random() < 0.15:
        scene.fade = _paper(rng, dark)
    scene.smooth = rng.random() < 0.6
    scene.noise = rng.choice((0, 0, 0, 0, 3, 6, 10))
    scene.blur = rng.choice((0, 0, 0, 0, 0, 0.4, 0.7))
    scene.quality = rng.choice((0, 0, 0, 0, 60, 75, 90))
    outlined = rng.random() < 0.2
    for (x, y, radius), (colour, shape) in zip(_places(rng, width, height, len(kinds)), kinds):
        figure = Figure(colour, shape, x, y, radius, rgb=shade(rng, colour), wing=rng.uniform(0.38, 0.52))
        if rng.random() < 0.4:
            figure.angle = rng.uniform(-18, 18) if shape != "star" else rng.uniform(-36, 36)
            figure.stretch = rng.uniform(0.85, 1.0)
        if outlined:
            darker = rng.uniform(0.3, 0.7)
            figure.outline = tuple(int(c * darker) for c in figure.rgb)
        scene.figures.append(figure)
    return scene


def _places(rng: Random, width: int, height: int, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of circles that fit and do not touch."""
    room = math.sqrt(width * height / count)
    low, high = max(MIN_RADIUS, 0.13 * room), max(MIN_RADIUS + 1, min(0.42 * room, 0.45 * min(width, height)))
    if count == 1:
        low = max(MIN_RADIUS, 0.12 * room)
    alike = rng.uniform(low, high * 0.85) if rng.random() < 0.35 else None
    gap = rng.uniform(1.5, 5.0)
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60 * count):
            radius = alike or rng.uniform(low, high)
            x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
            if all(math.hypot(x - a, y - b) > radius + r + gap for a, b, r in placed):
                placed.append((x, y, radius))
                if len(placed) == count:
                    return placed
        high, alike = max(low, high * 0.9), None
        if high == low:
            low = max(4.0, low * 0.95)


def _outline(figure: Figure, scale: float) -> list[tuple[float, float]]:
    """Corners of a figure that is not a circle, in pixels of the canvas."""
    if figure.shape == "square":
        corners = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif figure.shape == "triangle":
        corners = [(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        corners = [(x, y + 0.1) for x, y in corners]
    elif figure.shape == "star":
        turns = [(k * math.pi / 5, 1.0 if k % 2 == 0 else figure.wing) for k in range(10)]
        corners = [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]
    else:
        w = figure.wing * 0.72
        quarter = [(w, -1.0), (w, -w), (1.0, -w)]
        corners = []
        for turn in range(4):
            for x, y in quarter:
                for _ in range(turn):
                    x, y = -y, x
                corners.append((x, y))
    sin, cos = math.sin(math.radians(figure.angle)), math.cos(math.radians(figure.angle))
    corners = [(x * figure.stretch, y) for x, y in corners]
    corners = [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]
    return [((figure.x + figure.radius * x) * scale, (figure.y + figure.radius * y) * scale) for x, y in corners]


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    scale = 2 if scene.smooth else 1
    size = (scene.width * scale, scene.height * scale)
    image = Image.new("RGB", size, scene.background)
    if scene.fade is not None:
        mask = Image.linear_gradient("L").resize(size)
        image = Image.composite(Image.new("RGB", size, scene.fade), image, mask)
    pen = ImageDraw.Draw(image)
    for figure in scene.figures:
        line = {"fill": figure.rgb, "outline": figure.outline, "width": scale if figure.outline else 0}
        if figure.shape == "circle":
            r, x, y = figure.radius * 0.92 * scale, figure.x * scale, figure.y * scale
            pen.ellipse((x - r * figure.stretch, y - r, x + r * figure.stretch, y + r), **line)
        else:
            pen.polygon(_outline(figure, scale), **line)
    if scale > 1:
        image = image.resize((scene.width, scene.height), Image.Resampling.BOX)
    if scene.blur:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur))
    if scene.noise:
        noise = np.random.default_rng(scene.seed).normal(0, scene.noise, (scene.height, scene.width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if scene.quality:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=scene.quality)
        image = Image.open(file).convert("RGB")
    return image


def random_film(
    rng: Random, kinds: list[tuple[str, str]], seconds: int, move: str | None, appears: float | None
) -> Film:
    """A film: the first figure moves (or rests), the last one appears at second `appears` (or is there all along)."""
    if rng.random() < 0.1:
        size = side(rng, 84, 224), side(rng, 84, 168)
    else:
        size = rng.choice((56, side(rng, 56, 84))), rng.choice((56, side(rng, 56, 84)))
    scene = random_scene(rng, kinds, size)
    rate = rng.choice((2, 2, 4, 5, 8, 10, 12, 15, 24, 25, 30))
    film = Film(scene, rate, seconds * rate, [(0.0, 0.0)] * len(kinds), [0.0] * len(kinds))
    if appears is not None:
        film.start[-1] = appears
    if move is None:
        return film
    # The mover crosses a part of the picture; it may pass in front of what stands in its way.
    mover, (dx, dy) = scene.figures[0], MOVES[move]
    mover.radius = min(mover.radius, 0.3 * min(size))
    length = scene.width if dx else scene.height
    low, high = mover.radius + 1, length - mover.radius - 1
    travel = (high - low) * rng.uniform(0.55, 1.0)
    begin = rng.uniform(low, high - travel)
    begin, end = (begin, begin + travel) if dx + dy > 0 else (begin + travel, begin)
    speed = (end - begin) / max(seconds - 1 / rate, 0.5)
    if dx:
        mover.x, film.speed[0] = begin, (speed, 0.0)
    else:
        mover.y, film.speed[0] = begin, (0.0, speed)
    if len(kinds) > 1:  # keep the others out of the lane
        across = 1 if dx else 0
        for other in scene.figures[1:]:
            room = (scene.height, scene.width)[1 - across]
            lane, own = (mover.y, other.y) if dx else (mover.x, other.x)
            if abs(lane - own) < mover.radius + other.radius + 1:
                other.radius = min(other.radius, max(MIN_RADIUS, 0.2 * room))
                mover.radius = min(mover.radius, max(MIN_RADIUS, 0.2 * room))
                edge = rng.choice((0, 1))
                lane = mover.radius + 1 if edge else room - mover.radius - 1
                own = room - other.radius - 1 if edge else other.radius + 1
                if dx:
                    mover.y, other.y = lane, own
                else:
                    mover.x, other.x = lane, own
    return film


def draw_frame(film: Film, index: int) -> Image.Image:
    """Frame `index` of the file, RGB."""
    time, scene = index / film.fps, film.scene
    shown = []
    for figure, (dx, dy), start in zip(scene.figures, film.speed, film.start):
        if time >= start - 1e-6:
            moved = Figure(**{**figure.__dict__, "x": figure.x + dx * time, "y": figure.y + dy * time})
            shown.append(moved)
    # The one that moves is drawn last, in front.
    frame = Scene(**{**scene.__dict__, "figures": shown[::-1], "seed": scene.seed + index})
    return draw(frame)
