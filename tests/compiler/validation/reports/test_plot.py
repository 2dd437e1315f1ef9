"""Plots: where values lie, gaps and what is outside the gate."""

import math
from xml.etree.ElementTree import Element

import pytest

from qie.compiler.validation.reports.html.plot import HEIGHT, HUGE, WIDTH, axis, plot

NAN, INF = math.nan, math.inf

ODD = [[], [NAN], [0.0], [-3.0, 5.0], [INF, -INF], [1e-300, 1e300], [-2.0], [7.0], [1e308], [5e-324]]
"""Values that an axis is easily too small for."""


def drawn(values: list[float], bound: float, sense: str = "at most") -> Element:
    scale = axis([*values, bound])
    return plot(values, [bound] * len(values), title="one", unit="relative L2", along="step", sense=sense, scale=scale)


def curve(figure: Element) -> str:
    return next(path.attrib["d"] for path in figure.iter("path") if path.attrib["class"] == "curve")


def test_an_axis_is_linear_from_zero_where_values_are_alike() -> None:
    scale = axis([0.01, 0.03, 0.05])
    assert not scale.logarithmic
    assert scale.low == 0
    assert scale.high >= 0.05
    assert scale.ticks == (0, 0.02, 0.04, 0.06)
    assert scale.height(0.03) == pytest.approx(0.5)


def test_an_axis_is_logarithmic_between_decades_where_they_are_not() -> None:
    scale = axis([2e-5, 0.03])
    assert scale.logarithmic
    assert (scale.low, scale.high) == (pytest.approx(1e-5), pytest.approx(0.1))
    assert scale.height(1e-3) == pytest.approx(0.5)
    assert (scale.height(0), scale.height(INF)) == (0, 1)


@pytest.mark.parametrize(
    "values", [[], [NAN], [0.0], [-3.0, 5.0], [INF, -INF], [1e-300, 1e300], [-2.0], [7.0], [1e308], [5e-324]]
)
def test_an_axis_has_room_for_anything(values: list[float]) -> None:
    scale = axis(values)
    assert scale.low < scale.high
    assert 2 <= len(scale.ticks) <= 8
    assert all(0 <= scale.height(value) <= 1 for value in values if not math.isnan(value))
    assert all(scale.low <= value <= scale.high for value in values if abs(value) <= HUGE)


def test_ticks_are_small_where_values_are() -> None:
    assert axis([1e-14, 3e-14]).ticks == (0, 1e-14, 2e-14, 3e-14, 4e-14)


def test_what_is_not_a_number_is_a_gap() -> None:
    assert curve(drawn([0.01, 0.02, NAN, 0.02, 0.01], 0.05)).count("M") == 2
    assert curve(drawn([0.01, 0.02, 0.02, 0.02, 0.01], 0.05)).count("M") == 1
    assert curve(drawn([NAN], 0.05)) == ""


def test_values_outside_the_gate_are_diamonds() -> None:
    figure = drawn([0.01, 0.09, 0.05, INF], 0.05)
    kinds = [(mark.tag, mark.findtext("title")) for mark in figure if "dot" in mark.attrib.get("class", "")]
    assert kinds == [
        ("circle", "step 1: 0.01"),
        ("path", "step 2: 0.09"),
        ("circle", "step 3: 0.05"),
        ("path", "step 4: inf"),
    ]
    assert "2 outside it" in str(figure.findtext("desc"))


def test_a_floor_is_a_gate_too() -> None:
    assert "1 outside it" in str(drawn([30.0, 20.0, 28.0], 28, "at least").findtext("desc"))


def test_who_cannot_see_a_plot_is_told() -> None:
    figure = drawn([0.01, 0.04], 0.05)
    assert figure.attrib["role"] == "img"
    told = "relative L2 of 2 steps, from 0.01 to 0.04; gate at most 0.05; 0 outside it."
    assert figure.findtext("title") == "one"
    assert figure.findtext("desc") == told
    assert figure.attrib["aria-label"] == f"one: {told}"


@pytest.mark.parametrize("values", [[0.5], [0.1, INF, -INF, NAN, 0.0], [float(k) for k in range(1500)]])
def test_everything_is_inside_the_drawing(values: list[float]) -> None:
    words = curve(drawn(values, 0.3)).replace("M", " ").replace("L", " ").split()
    numbers = list(map(float, words))
    assert all(0 <= x <= WIDTH for x in numbers[::2])
    assert all(0 <= y <= HEIGHT for y in numbers[1::2])
    assert len(numbers) >= 2
