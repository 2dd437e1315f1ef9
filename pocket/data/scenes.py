"""Synthetic images: scenes of shapes on a background, and dead leaves.

Dead leaves, shapes that occlude one another, have edges, flat areas and scales in about the proportions of natural
images (Lee, Mumford and Huang, "Occlusion models for natural images", 2001), which a handful of photos cannot teach.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pocket.data.operations import COLORS, SHAPES, Source, draw_shape

__all__ = ["dead_leaves", "scene"]


def scene(rng: np.random.Generator, height: int, width: int) -> Source:
    """One to four shapes on a smooth background; the shapes are the foreground."""
    image = _background(rng, height, width)
    foreground = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        radius = rng.uniform(0.1, 0.28) * min(height, width)
        center = (rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height)
        shape = str(rng.choice(SHAPES))
        image = draw_shape(image, shape, _color(rng), center, radius)
        white = draw_shape(np.zeros((height, width, 3), np.uint8), shape, (255, 255, 255), center, radius)
        foreground |= white[..., 0] > 127
    return Source(image=image, foreground=foreground)


def dead_leaves(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Overlapping ellipses, polygons and strokes of all sizes, some with grain, uint8 [height, width, 3]."""
    supersampling = 2
    image = Image.new("RGB", (width * supersampling, height * supersampling), _color(rng))
    draw = ImageDraw.Draw(image)
    base = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(20, 160))):
        radius = min(supersampling * 3 * rng.pareto(1.2) + 2, supersampling * height / 2)
        x, y = rng.uniform(0, width * supersampling), rng.uniform(0, height * supersampling)
        color = tuple(int(c) for c in np.clip(base * 0.4 + rng.integers(0, 256, 3) * 0.6 + rng.normal(0, 20), 0, 255))
        box = (x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius)
        match rng.integers(3):
            case 0:
                draw.ellipse(box, fill=color)
            case 1:
                angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
                draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=color)
            case _:
                end = (x + rng.normal(0, radius * 2), y + rng.normal(0, radius * 2))
                draw.line([(x, y), end], fill=color, width=int(rng.integers(1, 8)))
    leaves = np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32)
    light = _smooth(rng, height, width, 3)[..., :1]
    grain = rng.normal(0, rng.choice([0.0, 4.0, 10.0]), (height, width, 1))
    return np.clip(leaves * (0.6 + 0.8 * light) + grain, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """One color, or a gradient between two."""
    share = _smooth(rng, height, width, 2)[..., :1] if rng.random() < 0.6 else np.zeros((height, width, 1))
    ends = np.array([_color(rng), _color(rng)], np.float32)
    return (ends[0] * (1 - share) + ends[1] * share).astype(np.uint8)


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    """A color close to a named one, or any color."""
    near = np.array(list(COLORS.values())[rng.integers(len(COLORS))]) + rng.normal(0, 12, 3)
    red, green, blue = np.clip(near if rng.random() < 0.6 else rng.integers(0, 256, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> NDArray[np.float32]:
    """Low-frequency noise in 0 .. 1, float32 [height, width, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
