"""A comparison as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib

import numpy as np

from instruct_lm.report import charts
from instruct_lm.report.comparison import Comparison
from instruct_lm.report.evaluations import CURVES
from instruct_lm.report.tables import LABELS, difference_text, interval_text
from instruct_lm.report.text import TEMPLATES, content, template

_CURVE_TITLES = ("Training loss", "Validation loss", "Validation loss of the responses")


def render(comparison: Comparison, title: str) -> str:
    """The page. All texts of entries, answers and names are escaped, and its policy runs no script but its own."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    intervals = [_scores(comparison), *(_differences(comparison, baseline) for baseline in comparison.paired)]
    trained = [(i, s.name) for i, s in enumerate(comparison.settings) if any(run.curves for run in s.runs)]
    return template("page.html").render(
        content(comparison, title),
        intervals={chart.title: charts.interval_charts([chart]) for chart in intervals},
        histograms=_histograms(comparison),
        losses=_loss_curves(comparison),
        legend=[(i % charts.N_COLOURS, name) for i, name in trained],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def picture(comparison: Comparison) -> str:
    """SVG file of the mean scores and, below, the differences from the last baseline: the first trained setting, or
    the untuned model where there is one setting besides."""
    differences = [_differences(comparison, baseline) for baseline in list(comparison.paired)[-1:]]
    return charts.standalone(charts.interval_charts([_scores(comparison), *differences]))


def _scores(comparison: Comparison) -> charts.Intervals:
    """Each setting's mean score (chrF without a judge) with its interval."""
    metric, rows = comparison.headline, []
    for i, setting in enumerate(comparison.settings):
        if found := setting.mean(metric):
            rows.append((setting.name, found, interval_text(found), i))
    return charts.Intervals("Scores", rows, f"{LABELS[metric]}, 95% interval")


def _differences(comparison: Comparison, baseline: str) -> charts.Intervals:
    """Each setting's difference from a baseline, over the same entries, in the metric that all contrasts have."""
    contrasts = comparison.paired[baseline]
    metric = "score" if all(contrast.metric == "score" for contrast in contrasts) else "chrf"
    rows = []
    for contrast in contrasts:
        found, number = contrast.differences[metric], comparison.settings.index(contrast.setting)
        interval = found.mean, found.low, found.high
        rows.append((contrast.setting.name, interval, difference_text(found), number))
    label = f"difference in {LABELS[metric]} from {charts.clipped(baseline, 24)}, 95% interval"
    return charts.Intervals(f"Differences from {baseline}", rows, label, zero=True)


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
    """(title, SVG) of each kind of loss that some run logged."""
    figures = []
    for key, title in zip(CURVES, _CURVE_TITLES, strict=True):
        curves = [
            (run.name, charts.thin(run.curves[key]), i)
            for i, setting in enumerate(comparison.settings)
            for run in setting.runs
            if run.curves.get(key)
        ]
        if curves:
            figures.append((title, charts.line_chart(title, curves, "optimizer step")))
    return figures
