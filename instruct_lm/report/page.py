"""A comparison as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from instruct_lm.report import charts
from instruct_lm.report.comparison import Comparison, Contrast
from instruct_lm.report.evaluations import CURVES
from instruct_lm.report.tables import LABELS, difference_text, interval_text
from instruct_lm.report.text import TEMPLATES, content, template

_CURVE_TITLES = ("Training loss", "Validation loss", "Validation loss of the responses")


def render(comparison: Comparison, title: str) -> str:
    """The page. All texts of entries, answers and names are escaped, and its policy runs no script but its own."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    question = comparison.question
    others = [paired for paired in comparison.paired.values() if paired != question]
    below = [_scores(comparison), *(_differences(comparison, paired) for paired in others)]
    trained = [(i, s.name) for i, s in enumerate(comparison.settings) if any(run.curves for run in s.runs)]
    return template("page.html").render(
        content(comparison, title),
        answer=_intervals([_differences(comparison, question)]) if question else "",
        intervals={chart.title: _intervals([chart]) for chart in below},
        by_length=_intervals(_by_length(comparison)) if comparison.thirds else "",
        histograms=_histograms(comparison),
        losses=_loss_curves(comparison),
        legend=[(i % charts.N_COLOURS, name) for i, name in trained],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def picture(comparison: Comparison) -> str:
    """SVG file of the mean scores and, below, the differences that answer the question of the settings."""
    differences = [_differences(comparison, comparison.question)] if comparison.question else []
    return charts.standalone(charts.interval_charts([_scores(comparison), *differences]))


def _scores(comparison: Comparison) -> charts.Intervals:
    """Each setting's mean score (chrF without a judge) with its interval."""
    metric, rows = comparison.headline, []
    for i, setting in enumerate(comparison.settings):
        if found := setting.mean(metric):
            rows.append((setting.name, found, interval_text(found), i))
    return charts.Intervals("Scores", rows, f"{LABELS[metric]}, 95% interval")


def _differences(comparison: Comparison, contrasts: Sequence[Contrast], part: str = "") -> charts.Intervals:
    """Each setting's difference from a baseline, over the same entries, in the metric that all contrasts have."""
    metric = "score" if all(contrast.metric == "score" for contrast in contrasts) else "chrf"
    baseline, rows = contrasts[0].baseline.name, []
    for contrast in contrasts:
        if found := contrast.differences.get(metric):
            interval = found.mean, found.low, found.high
            number = comparison.settings.index(contrast.setting)
            rows.append((contrast.setting.name, interval, difference_text(found), number))
    label = f"difference in {LABELS[metric]} from {charts.clipped(baseline, 32)}, {part or '95% interval'}"
    return charts.Intervals(f"Differences from {baseline}{part and f', {part}'}", rows, label, zero=True)


def _by_length(comparison: Comparison) -> list[charts.Intervals]:
    """The differences of the question in each third by length ratio, on axes with the same limits."""
    drawn = [_differences(comparison, third.contrasts, third.name) for third in comparison.thirds]
    ends = [end for chart in drawn for _, interval, _, _ in chart.rows for end in interval]
    space = 0.05 * (max(0, *ends) - min(0, *ends)) or 1
    limits = min(0, *ends) - space, max(0, *ends) + space
    return [chart._replace(x_limits=limits) for chart in drawn]


def _histograms(comparison: Comparison) -> list[tuple[str, str]]:
    """(setting, SVG) of each setting that has scores, with the same vertical axis."""
    values = {setting.name: setting.values(comparison.headline) for setting in comparison.settings}
    shares = {name: charts.bin_shares(scores[~np.isnan(scores)]) for name, scores in values.items()}
    top = max(float(found.max()) for found in shares.values())
    return [
        (name, charts.histogram(f"Distribution of scores of {name}", found, i, LABELS[comparison.headline], top))
        for i, (name, found) in enumerate(shares.items())
        if found.any()
    ]


def _loss_curves(comparison: Comparison) -> list[tuple[str, str]]:
    """(title, SVG) of each kind of loss that some run logged; without step 0, beside which all else would be flat."""
    figures = []
    for key, title in zip(CURVES, _CURVE_TITLES, strict=True):
        curves = [
            (run.name, charts.thin(points), i)
            for i, setting in enumerate(comparison.settings)
            for run in setting.runs
            if (points := [point for point in run.curves.get(key, ()) if point[0] > 0])
        ]
        if curves:
            draw = partial(charts.line_chart, title, curves, "optimizer step")
            figures.append((title, _both_widths(draw)))
    return figures


def _intervals(drawn: Sequence[charts.Intervals]) -> str:
    return _both_widths(partial(charts.interval_charts, drawn))


def _both_widths(draw: Callable[..., str]) -> str:
    """A chart for phones and one for screens, of which the page shows one: a scaled one would scale its letters too."""
    widths = {"narrow": charts.WIDTH, "wide": charts.WIDE}
    return "".join(f'<div class="{name}">{draw(width=width)}</div>' for name, width in widths.items())
