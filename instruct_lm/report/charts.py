"""Small charts as SVG texts: losses, intervals, histograms. Sizes are in CSS pixels of a phone's width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Okabe and Ito's palette, which the colour-blind tell apart, darkened or lightened to 3:1 on the page's background.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --c0: #0072b2; --c1: #c44e00; --c2: #008563; --c3: #b5488c;
  --c4: #8a6d00; --c5: #2b8cbe; --c6: #6f4fb0; --c7: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --ink: #e8eaed; --muted: #a3acb8; --line: #363d47;
  --c0: #56b4e9; --c1: #ff8f3f; --c2: #2fc79a; --c3: #e79ac6;
  --c4: #e6c229; --c5: #9fd3f5; --c6: #b9a3f0; --c7: #aab4bf; } }
svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
svg .name, svg .value { fill: var(--ink); paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 3 3; }
svg .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
"""
N_COLOURS = 8
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 34


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: Shown when pointed at.
        points: (x, y) in the order of x.
        colour: Number in the palette, from 0; after `N_COLOURS` the line is dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


def line_chart(title: str, curves: Sequence[Curve], x_label: str) -> str:
    """Curves over the same axes; the vertical one is logarithmic if values differ by more than twice."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    log = 0 < 2 * min(ys) < max(ys)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), (log_ticks if log else ticks)(min(ys), max(ys))
    scale: Callable[[float], float] = math.log if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = _share(x, x_ticks[0], x_ticks[-1]), _share(scale(y), scale(y_ticks[0]), scale(y_ticks[-1]))
        return LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [_axes(x_ticks, y_ticks, place, x_label)]
    for curve in curves:
        points = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 3"' if curve.colour >= N_COLOURS else ""
        last = f"{curve.name}: {curve.points[-1][1]:.3f} at {curve.points[-1][0]:.0f}"
        parts.append(
            f'<g stroke="{_colour(curve.colour)}" fill="{_colour(curve.colour)}"><title>{escape(last)}</title>'
        )
        parts.append(f'<polyline class="curve" points="{path}"{dash}/>')
        if len(points) <= 12:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points]
        parts.append("</g>")
    return _svg(title, "".join(parts), HEIGHT)


def histogram(title: str, values: np.ndarray, colour: int, top: float) -> str:
    """Shares of scores in ten bins from 0 to 100.

    Args:
        title: What is shown.
        values: (n,) scores.
        colour: Number in the palette.
        top: Largest share on the axis, the same for histograms side by side.
    """
    shares = bin_shares(values)
    y_ticks = ticks(0, top)
    height = 150

    def place(x: float, y: float) -> tuple[float, float]:
        plot = height - TOP - BOTTOM
        return LEFT + (WIDTH - LEFT - RIGHT) * x / 100, height - BOTTOM - plot * y / y_ticks[-1]

    parts = [_axes([0, 20, 40, 60, 80, 100], y_ticks, place, "score", lambda y: f"{y:.0%}", height)]
    for i, share in enumerate(shares):
        (x, y), (x_end, ground) = place(10 * i, float(share)), place(10 * (i + 1), 0)
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{x_end - x - 2:.1f}" height="{ground - y:.1f}" '
            f'fill="{_colour(colour)}"><title>{10 * i} to {10 * (i + 1)}: {share:.0%}</title></rect>'
        )
    return _svg(title, "".join(parts), height)


def bin_shares(values: np.ndarray) -> np.ndarray:
    """(10,) shares of the scores in [0, 10), [10, 20), … [90, 100]."""
    return np.histogram(values, bins=10, range=(0, 100))[0] / max(1, len(values))


@dataclass(frozen=True)
class Dot:
    """A row of an interval chart.

    Attributes:
        name: Of the row.
        mean: Where the dot stands.
        low: Lower end of its interval.
        high: Upper end.
        text: The three as the row says them.
        colour: Number in the palette.
    """

    name: str
    mean: float
    low: float
    high: float
    text: str
    colour: int


def interval_chart(title: str, rows: Sequence[Dot], x_label: str, zero: bool = False) -> str:
    """A dot with its interval a row; with `zero`, a line where there is no difference."""
    values = [value for row in rows for value in (row.low, row.high)] + [0.0] * zero
    x_ticks = ticks(min(values), max(values))
    height = 34 * len(rows) + BOTTOM + TOP

    def place(x: float, y: float) -> tuple[float, float]:
        return 14 + (WIDTH - 28) * _share(x, x_ticks[0], x_ticks[-1]), y

    parts = [_axes(x_ticks, [], place, x_label, height=height)]
    if zero:
        x, _ = place(0, 0)
        parts.append(f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for i, row in enumerate(rows):
        y = TOP + 34 * i + 24
        (x, _), (start, _), (end, _) = (place(value, y) for value in (row.mean, row.low, row.high))
        parts.append(
            f'<g stroke="{_colour(row.colour)}" fill="{_colour(row.colour)}"><line x1="{start:.1f}" x2="{end:.1f}" '
            f'y1="{y}" y2="{y}" stroke-width="2"/><circle cx="{x:.1f}" cy="{y}" r="4.5"/></g>'
            f'<text class="name" x="14" y="{y - 10}">{escape(clipped(row.name))}</text>'
            f'<text class="value" x="{WIDTH - 14}" y="{y - 10}" text-anchor="end">{escape(row.text)}</text>'
        )
    return _svg(title, "".join(parts), height)


def standalone(charts: Sequence[str]) -> str:
    """An SVG file of charts, one below the other, with the styles that a page would bring."""
    placed, top = [], 0
    for chart in charts:
        height = int(chart.partition(f'viewBox="0 0 {WIDTH} ')[2].partition('"')[0])
        placed.append(chart.replace("<svg ", f'<svg y="{top}" width="{WIDTH}" height="{height}" ', 1))
        top += height
    ground = '<rect width="100%" height="100%" fill="var(--ground)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{2 * WIDTH}" '
        f'height="{2 * top}">'
        f"<style>{STYLE}</style>{ground}{''.join(placed)}</svg>\n"
    )


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / (at_most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = unit * factor
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < at_most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, from at or below `low` > 0 to at or above `high`."""
    found: list[float] = []
    for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        # one more at either end: log10(999.9999999999999) is 3
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        numbers = [round(mantissa * 10.0**exponent, 12) for exponent in exponents for mantissa in mantissas]
        first = max(i for i, number in enumerate(numbers) if number <= low)
        last = min(i for i, number in enumerate(numbers) if number >= high)
        found = numbers[first : last + 1]
        if len(found) >= 4:
            break
    return found


def clipped(name: str, at_most: int = 38) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= at_most else f"{name[: at_most - 1]}…"


def thin(points: Sequence[tuple[float, float]], at_most: int = 100) -> list[tuple[float, float]]:
    """Means of neighbours, so that few points are left."""
    size = math.ceil(len(points) / at_most)
    return [tuple(np.mean(points[i : i + size], axis=0).tolist()) for i in range(0, len(points), size)]


def _axes(
    x_ticks: Iterable[float],
    y_ticks: Iterable[float],
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    height: int = HEIGHT,
) -> str:
    """Grid lines with their numbers."""
    parts = []
    x_ticks = list(x_ticks)
    for y in y_ticks:
        _, top = place(x_ticks[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{y_text(y)}</text>')
    for x in x_ticks:
        left, _ = place(x, 1)
        number = f"{x:g}".replace("-", "−")
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{left:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{number}</text>')
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _svg(title: str, content: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{content}</svg>'


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _colour(number: int) -> str:
    return f"var(--c{number % N_COLOURS})"
