"""Pictures that the script makes: simple scenes of shapes before a background, and layers of random leaves.

Leaves that cover one another have edges, flat parts and scales in about the proportions of photographs (the dead leaves
model: Lee, Mumford and Huang, 2001), which a handful of photographs cannot teach.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pocket.edits import COLOURS, SHAPES, Picture, draw_shape

__all__ = ["leaves", "scene"]


def scene(rng: np.random.Generator, height: int, width: int) -> Picture:
    """One to four shapes before a smooth background; the shapes are the foreground."""
    image = _background(rng, height, width)
    seen = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        radius = rng.uniform(0.1, 0.28) * min(height, width)
        middle = (rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height)
        shape = str(rng.choice(SHAPES))
        image = draw_shape(image, shape, _colour(rng), middle, radius)
        white = draw_shape(np.zeros((height, width, 3), np.uint8), shape, (255, 255, 255), middle, radius)
        seen |= white[..., 0] > 127
    return Picture(image=image, foreground=seen)


def leaves(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Discs, boxes and strokes of all sizes over one another, some with texture, uint8 [height, width, 3]."""
    fine = 2
    image = Image.new("RGB", (width * fine, height * fine), _colour(rng))
    pen = ImageDraw.Draw(image)
    base = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(20, 160))):
        radius = min(fine * 3 * rng.pareto(1.2) + 2, fine * height / 2)
        x, y = rng.uniform(0, width * fine), rng.uniform(0, height * fine)
        colour = tuple(int(c) for c in np.clip(base * 0.4 + rng.integers(0, 256, 3) * 0.6 + rng.normal(0, 20), 0, 255))
        box = (x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius)
        match rng.integers(3):
            case 0:
                pen.ellipse(box, fill=colour)
            case 1:
                angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
                pen.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)
            case _:
                end = (x + rng.normal(0, radius * 2), y + rng.normal(0, radius * 2))
                pen.line([(x, y), end], fill=colour, width=int(rng.integers(1, 8)))
    made = np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32)
    light = _smooth(rng, height, width, 3)[..., :1]
    grain = rng.normal(0, rng.choice([0.0, 4.0, 10.0]), (height, width, 1))
    return np.clip(made * (0.6 + 0.8 * light) + grain, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """One colour, or two that run into each other."""
    share = _smooth(rng, height, width, 2)[..., :1] if rng.random() < 0.6 else np.zeros((height, width, 1))
    ends = np.array([_colour(rng), _colour(rng)], np.float32)
    return (ends[0] * (1 - share) + ends[1] * share).astype(np.uint8)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A named colour nearly as it is, or any."""
    near = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) + rng.normal(0, 12, 3)
    red, green, blue = np.clip(near if rng.random() < 0.6 else rng.integers(0, 256, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> NDArray[np.float32]:
    """Soft clouds in 0 .. 1, [height, width, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
