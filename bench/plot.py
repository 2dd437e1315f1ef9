"""A line plot as an SVG file, for curves of a few points."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["line_plot"]

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 16, 44


def line_plot(path: Path, points: Mapping[int, float], *, x_label: str, y_label: str) -> None:
    """Write ``points`` (x -> y), with x at equal distances and a margin of 0.5 above and below the y values."""
    low, high = min(points.values()) - 0.5, max(points.values()) + 0.5

    def place(number: int, y: float) -> tuple[float, float]:
        across = (WIDTH - LEFT - RIGHT) * (number + 0.5) / len(points)
        return LEFT + across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    places = [place(number, y) for number, y in enumerate(points.values())]
    axis = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{axis}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>',
        '<polyline fill="none" stroke="#2060c0" stroke-width="2" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        + '"/>',
    ]
    for (x, y), (steps, value) in zip(places, points.items(), strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2060c0"/>')
        parts.append(f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{value:.2f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{axis + 17}" text-anchor="middle">{steps}</text>')
    middle = (TOP + axis) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{y_label}</text></svg>'
    )
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
