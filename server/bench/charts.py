"""Line charts as SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 34, 40
"""Pixels around the plot; a legend with long names or many of them makes the chart larger."""
NAME_LEFT, CHARACTER, LINE = 42, 6.2, 18
"""Pixels from the plot to a name of the legend, of a character at most on average, and from name to name."""
COLORS = "#4363d8 #e6194b #3cb44b #f58231 #911eb4 #008080 #9a6324 #808000".split()
MAX_POINTS = 400
NUM_TICKS = 5


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "minutes") -> str:
    """A chart of all `series`, whose y axis begins at 0; each has a name and points from left to right.

    Colors come again, with dashes, when there are more series than colors.
    """
    max_x = max((x for points in series.values() for x, _ in points), default=0.0) or 1.0
    x_step = nice_step(max_x)
    step = nice_step(max((y for points in series.values() for _, y in points), default=0.0) or 1.0)
    max_y = step * NUM_TICKS

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / max_x * (WIDTH - LEFT - RIGHT), y / max_y * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [text(LEFT, 18, title, "start", bold=True), text(place(max_x, 0)[0], HEIGHT - 6, x_label, "end")]
    for number in range(NUM_TICKS + 1):
        _, y = place(0, step * number)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 6, y + 4, f"{step * number:,.6g}", "end"))
    for number in range(int(max_x / x_step) + 1):
        x, _ = place(x_step * number, 0)
        parts.append(text(x, HEIGHT - BOTTOM + 16, f"{x_step * number:,.6g}", "middle"))
    for index, (name, points) in enumerate(series.items()):
        dashes = ' stroke-dasharray="5 3"' if index // len(COLORS) % 2 else ""
        style = f'fill="none" stroke="{COLORS[index % len(COLORS)]}" stroke-width="1.5"{dashes}'
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in thinned(points)))
        left, up = WIDTH - RIGHT, TOP + LINE * index
        parts.append(f'<polyline points="{path}" {style}/>')
        parts.append(f'<line x1="{left + 12}" x2="{left + NAME_LEFT - 6}" y1="{up + 5}" y2="{up + 5}" {style}/>')
        parts.append(text(left + NAME_LEFT, up + 9, name, "start"))
    right = max([RIGHT, *(math.ceil(NAME_LEFT + CHARACTER * len(name)) for name in series)])
    size = f'width="{WIDTH - RIGHT + right}" height="{max(HEIGHT, TOP + LINE * len(series) + 8)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def text(x: float, y: float, content: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold" font-size="13"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'


def nice_step(value: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that reaches `value` in all steps."""
    power = 10.0 ** math.floor(math.log10(value / NUM_TICKS))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * NUM_TICKS >= value * 0.999)


def thinned(points: Points) -> Points:
    """At most MAX_POINTS of them, the last one among them."""
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-stride][::-1]
