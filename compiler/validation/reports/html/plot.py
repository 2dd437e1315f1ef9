"""Values over steps or operations, with the line of their gate, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge, le
from xml.etree.ElementTree import Element

from qie.compiler.validation.reports.html.markup import element
from qie.compiler.validation.reports.words import number

__all__ = ["WIDE", "Axis", "axis", "plot"]

WIDTH, WIDE, HEIGHT = 360, 1080, 200
"""Units of the drawing: of a plot, of one over a whole line, and of both."""

LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 34
"""Space in the drawing around the plot, in its units."""

MANY = 100
"""Points from which only the first that is outside the gate gets a dot."""

LOG_RATIO = 20
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""


HUGE = 1e300
"""What values count as that are larger, so that their quotients are numbers; what is below its inverse is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The vertical axis.

    Attributes:
        low, high: values at the bottom and at the top.
        logarithmic: otherwise linear.
        ticks: values that are labeled.
    """

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def height(self, value: float) -> float:
        """Where ``value`` is, from 0 at the bottom to 1 at the top; outside the axis it is at the nearer end."""
        if self.logarithmic:
            low, high = math.log(self.low), math.log(self.high)
            share = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


def axis(values: Sequence[float]) -> Axis:
    """The axis for ``values``: logarithmic from the decade below to the one above where they differ much, else linear.

    Values that are not finite do not count; a logarithmic axis does not count those that are not positive either.
    """
    finite = [min(max(value, -HUGE), HUGE) for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 1 / HUGE]
    if positive and min(finite) >= 0 and max(positive) / min(positive) > LOG_RATIO:
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        every = math.ceil((last - first) / 6)
        return Axis(
            low=10.0**first,
            high=10.0**last,
            logarithmic=True,
            ticks=tuple(10.0**power for power in range(first, last + 1, every)),
        )
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if high - low <= 1 / HUGE:
        high = low + 1.0
    rough = (high - low) * 1.05 / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high * 1.05 / step if high > 0 else high / step)
    ticks = tuple(float(f"{step * k:.10g}") for k in range(first, last + 1))
    return Axis(low=step * first, high=step * last, logarithmic=False, ticks=ticks)


def plot(
    values: Sequence[float],
    bounds: Sequence[float],
    *,
    title: str,
    unit: str,
    along: str,
    sense: str,
    scale: Axis,
    width: int = WIDTH,
    numbers: Sequence[int] = (),
) -> Element:
    """The curve of ``values`` with a dot at each, those outside ``bounds`` in another color and shape.

    Args:
        values: at least one; what is not a number leaves a gap.
        bounds: of each value.
        title: for who cannot see it, too.
        unit: what the values are.
        along: what the horizontal axis counts.
        sense: ``at most`` or ``at least``.
        scale: vertical axis.
        width: units of the drawing, which is ``HEIGHT`` high.
        numbers: of each value on the horizontal axis; none for 1, 2, 3 and so on.
    """
    count = len(values)
    numbers = numbers or range(1, count + 1)
    across = (width - LEFT - RIGHT) / max(count - 1, 1)

    def x(place: float) -> float:
        return round(LEFT + place * across if count > 1 else LEFT + (width - LEFT - RIGHT) / 2, 1)

    def y(value: float) -> float:
        return round(TOP + (1 - scale.height(value)) * (HEIGHT - TOP - BOTTOM), 1)

    within = le if sense == "at most" else ge
    bad = [not within(value, bound) for value, bound in zip(values, bounds, strict=True)]
    first = bad.index(True) if True in bad else None
    finite = [value for value in values if math.isfinite(value)]
    span = f", from {number(min(finite))} to {number(max(finite))}" if finite else ""
    told = f"{unit} of {count} {along}s{span}; gate {sense} {number(bounds[0])}; {sum(bad)} outside it."
    grid = [
        [
            element("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=y(tick), y2=y(tick)),
            element("text", number(tick), class_="tick", x=LEFT - 6, y=y(tick) + 4, text_anchor="end"),
        ]
        for tick in scale.ticks
    ]
    shown = sorted({0, count - 1, *(count * k // 4 for k in range(1, 4))} if count > 5 else range(count))
    names = [
        element("text", str(numbers[place]), class_="tick", x=x(place), y=HEIGHT - BOTTOM + 16, text_anchor="middle")
        for place in shown
    ]
    dots = [
        _dot(x(place), y(value), f"{along} {numbers[place]}: {number(value)}", wrong)
        for place, (value, wrong) in enumerate(zip(values, bad, strict=True))
        if not math.isnan(value) and (count <= MANY or place == first)
    ]
    edge = [LEFT, width - RIGHT] if count == 1 else [x(place) for place in range(count)]
    gate = _path(edge, [y(bound) for bound in (bounds if count > 1 else [bounds[0]] * 2)])
    return element(
        "svg",
        element("title", title),
        element("desc", told),
        grid,
        names,
        element("text", along, class_="tick", x=width - RIGHT, y=HEIGHT - 4, text_anchor="end"),
        element("path", class_="gate", d=gate),
        element("path", class_="curve", d=_path([x(p) for p in range(count)], [_gap(v, y(v)) for v in values])),
        dots,
        viewBox=f"0 0 {width} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {told}",
        class_="plot",
    )


def _gap(value: float, height: float) -> float:
    return math.nan if math.isnan(value) else height


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A line through all points; it begins anew behind one whose height is not a number."""
    words, draw = [], False
    for x, y in zip(xs, ys, strict=True):
        if not math.isnan(y):
            words.append(f"{'L' if draw else 'M'}{x:g} {y:g}")
        draw = not math.isnan(y)
    return "".join(words)


def _dot(x: float, y: float, text: str, wrong: bool) -> Element:
    """A circle, or a diamond where the value is outside its gate, which names its value under a mouse."""
    if wrong:
        return element("path", element("title", text), class_="dot bad", d=f"M{x:g} {y - 5:g}l5 5l-5 5l-5-5z")
    return element("circle", element("title", text), class_="dot", cx=x, cy=y, r=3)
