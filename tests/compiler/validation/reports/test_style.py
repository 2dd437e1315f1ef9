"""The colors of the page: text that is readable (WCAG 2.2, 1.4.3), in light, dark and print."""

import re
from pathlib import Path

import pytest

from qie.compiler.validation.reports.html import page

STYLE = Path(page.__file__).with_name(page.STYLE).read_text(encoding="utf-8")

PAIRS = [
    *((text, back) for text in ("text", "muted", "link", "passed", "failed", "not-run") for back in ("page", "panel")),
    *((result, f"{result}-soft") for result in ("passed", "failed", "not-run")),
    *(("text", f"{result}-soft") for result in ("passed", "failed", "not-run")),
]
"""Each text and what it is on."""

SHAPES = [("passed", "track"), ("failed", "track"), ("curve", "panel"), ("failed", "panel"), ("text", "track")]
"""Bars, curves and marks (1.4.11)."""


def palettes() -> dict[str, dict[str, str]]:
    """The colors of each mode by name."""
    light, dark, paper = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    )
    return {"light": light, "dark": light | dark, "print": light | paper}


def luminance(color: str) -> float:
    """Relative luminance, 0 to 1 (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_text_is_readable(mode: str) -> None:
    colors = palettes()[mode]
    faint = {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in PAIRS}
    assert {pair: ratio for pair, ratio in faint.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_shapes_are_visible(mode: str) -> None:
    colors = palettes()[mode]
    faint = {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in SHAPES}
    assert {pair: ratio for pair, ratio in faint.items() if ratio < 3} == {}


def test_every_mode_has_every_color() -> None:
    light, dark, paper = palettes().values()
    assert light.keys() == dark.keys() == paper.keys()
    assert len(light) == 15
    assert dark["page"] != light["page"]
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) == light.keys()


def test_the_measure_of_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
