"""Charts as SVG, drawn by Matplotlib: losses, intervals, histograms. Colours are the CSS variables of `charts.css`."""

import io
import math
import re
import warnings
import zlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib import rcParams, style, ticker
from matplotlib.figure import Figure

from instruct_lm.report.text import TEMPLATES

_STYLE = ("default", TEMPLATES / "charts.mplstyle")  # "default": without the user's own matplotlibrc
N_COLOURS = 8
WIDTH, WIDE = 360, 860  # CSS pixels: a phone's width, a screen's
HEIGHT, ROW = 210, 34  # of a chart, of a row of an interval chart
# Matplotlib draws with the placeholder #0100NN for variable NN of this list; `charts.mplstyle` uses them too.
_VARIABLES = [*(f"c{i}" for i in range(N_COLOURS)), "ink", "muted", "line"]


# A line of a chart: name, (x, y) in the order of x, number in the palette
Curve = tuple[str, Sequence[tuple[float, float]], int]
# A row of an interval chart: name, (mean, low, high), these as text, number in the palette
Row = tuple[str, tuple[float, float, float], str, int]


class Intervals(NamedTuple):
    """An interval chart: a dot with its interval per row and, with `zero`, a line where there is no difference.

    Charts in one picture may share their `x_limits`.
    """

    title: str
    rows: Sequence[Row]
    x_label: str
    zero: bool = False
    x_limits: tuple[float, float] | None = None


def line_chart(title: str, curves: Sequence[Curve], x_label: str, width: int = WIDTH) -> str:
    """SVG of curves over the same axes; the vertical one is logarithmic if values differ by more than a factor of 2.

    The name of a curve is shown when the mouse points at it. From number `N_COLOURS` on, curves are dashed.
    """
    with style.context(_STYLE):
        figure = _figure(HEIGHT, width)
        axes = figure.subplots()
        for name, points, number in curves:
            x, y = zip(*points, strict=True)
            marker, line = "o" if len(x) <= 12 else "", "-" if number < N_COLOURS else "--"
            tip = f"tip: {name}: {y[-1]:.3f} at {x[-1]:.0f}"
            axes.plot(x, y, line, marker=marker, color=_colour(number), gid=tip)
        losses = [y for _, points, _ in curves for _, y in points]
        if 0 < 2 * min(losses) < max(losses):
            ticks = (1, 1.5, 2, 3, 5, 7) if max(losses) < 10 * min(losses) else (1, 2, 5)
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=ticks))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=x_label, ylabel="loss per token")
        return _svg(figure, title)


def histogram(title: str, shares: np.ndarray, number: int, x_label: str, top: float) -> str:
    """SVG of the shares of scores in ten bins from 0 to 100.

    Args:
        title: For readers who do not see it.
        shares: (10,) as `bin_shares` returns them.
        number: In the palette.
        x_label: Of the axis.
        top: Largest share on the axis, the same for histograms side by side.
    """
    with style.context(_STYLE):
        figure = _figure(150, WIDTH)
        axes = figure.subplots()
        for low, share in zip(range(0, 100, 10), shares, strict=True):
            axes.bar(low + 5, share, width=9, color=_colour(number), gid=f"tip: {low} to {low + 10}: {share:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(
            xlabel=x_label, ylabel="share of entries", xlim=(0, 100), ylim=(0, 1.05 * top), xticks=range(0, 101, 20)
        )
        return _svg(figure, title)


def bin_shares(values: np.ndarray) -> np.ndarray:
    """(10,) shares of the scores in [0, 10), [10, 20), … [90, 100]."""
    return np.histogram(values, bins=10, range=(0, 100))[0] / max(1, len(values))


def interval_charts(charts: Sequence[Intervals], width: int = WIDTH) -> str:
    """SVG of interval charts, one below the other."""
    heights = [ROW * len(chart.rows) + 40 for chart in charts]
    with style.context(_STYLE):
        figure = _figure(sum(heights), width)
        stacked = figure.subplots(len(charts), squeeze=False, height_ratios=heights)[:, 0]
        for axes, chart in zip(stacked, charts, strict=True):
            for y, (name, (mean, low, high), numbers, number) in enumerate(chart.rows):
                axes.plot([low, high], [y, y], color=_colour(number), linewidth=2)
                axes.plot(mean, y, "o", color=_colour(number), markersize=8)
                for x, text, side in ((0, clipped(name, width // 10), "left"), (1, numbers, "right")):
                    axes.text(x, y - 0.3, text, ha=side, transform=axes.get_yaxis_transform())
            if chart.zero:
                axes.axvline(0, color=rcParams["axes.labelcolor"], linestyle="--")
            axes.set(xlabel=chart.x_label, ylim=(len(chart.rows) - 0.6, -0.8), yticks=[], xlim=chart.x_limits)
            axes.spines.left.set_visible(False)
        return _svg(figure, "; ".join(chart.title for chart in charts))


def standalone(svg: str) -> str:
    """The same chart as a file of its own, with the styles that a page brings."""
    css = (TEMPLATES / "charts.css").read_text(encoding="utf-8")
    tag, _, content = svg.partition(">")
    return f'{tag}><style>{css}</style><rect width="100%" height="100%" fill="var(--ground)"/>{content}\n'


def clipped(name: str, at_most: int) -> str:
    """A name of at most this many characters."""
    return name if len(name) <= at_most else f"{name[: at_most - 1]}…"


def thin(points: Sequence[tuple[float, float]], at_most: int = 100) -> list[tuple[float, float]]:
    """At most this many points, each the mean of neighbours."""
    size = math.ceil(len(points) / at_most)
    return [tuple(np.mean(points[i : i + size], axis=0).tolist()) for i in range(0, len(points), size)]


def _figure(height: int, width: int) -> Figure:
    return Figure(figsize=(width / 72, height / 72))


def _colour(number: int) -> str:
    """The placeholder of a number in the palette."""
    return f"#0100{number % N_COLOURS:02d}"


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element with a name, the page's colours, and ids that no other title or width has."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts have what Matplotlib's own lacks
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    prefix = f"{zlib.crc32(f'{title}{figure.get_figwidth()}'.encode()):08x}-"

    def adapt(tag: re.Match[str]) -> str:
        if tip := re.fullmatch(r"""<g id=(["'])tip: (.*)\1>""", tag[0]):
            return f"<g><title>{tip[2]}</title>"
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])
        return re.sub(r"#0100(\d\d)", lambda found: f"var(--{_VARIABLES[int(found[1])]})", text)

    # Matplotlib escapes < and > in texts and attributes, so each match is a whole tag and no text is changed.
    svg = re.sub(r"<[^>]+>", adapt, file.getvalue()).partition("<svg ")[2]  # without the XML declaration
    return f'<svg role="img" aria-label="{escape(title)}" {svg}'
