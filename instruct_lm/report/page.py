"""A comparison as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib

import numpy as np

from instruct_lm.report import charts
from instruct_lm.report.comparison import Comparison
from instruct_lm.report.evaluations import CURVES
from instruct_lm.report.side_by_side import by_disagreement, side_by_side
from instruct_lm.report.tables import LABELS, all_tables, difference_text, interval_text, seen_sentence
from instruct_lm.report.text import TEMPLATES, template

_CURVE_TITLES = ("Training loss", "Validation loss", "Validation loss of the responses")


def render(comparison: Comparison, title: str) -> str:
    """The page. All texts of entries, answers and names are escaped, and its policy runs no script but its own."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    intervals = [_scores(comparison), *(_differences(comparison, baseline) for baseline in comparison.paired)]
    losses, legend = _loss_curves(comparison)
    return template("page.html").render(
        title=title,
        comparison=comparison,
        seen_sentence=seen_sentence(comparison),
        tables=all_tables(comparison),
        intervals={chart.title: charts.interval_charts([chart]) for chart in intervals},
        histograms=_histograms(comparison),
        losses=losses,
        legend=legend,
        entries=by_disagreement(side_by_side(comparison)),
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
        if found := setting.means.get(metric):
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
    metric, scored = comparison.headline, []
    for i, setting in enumerate(comparison.settings):
        values = setting.values(metric)
        if (values := values[~np.isnan(values)]).size:
            scored.append((f"Distribution of scores of {setting.name}", values, i, LABELS[metric]))
    top = max((float(charts.bin_shares(values).max()) for _, values, *_ in scored), default=1.0)
    return [(comparison.settings[chart[2]].name, charts.histogram(*chart, top)) for chart in scored]


def _loss_curves(comparison: Comparison) -> tuple[list[tuple[str, str]], list[tuple[int, str]]]:
    """(title, SVG) of each kind of loss that some run logged, and (colour, setting) of the settings that did."""
    figures = []
    legend: dict[tuple[int, str], None] = {}
    for key, title in zip(CURVES, _CURVE_TITLES, strict=True):
        curves = []
        for i, setting in enumerate(comparison.settings):
            for run in setting.runs:
                if points := run.curves.get(key):
                    curves.append((run.name, charts.thin(points), i))
                    legend[i % charts.N_COLOURS, setting.name] = None
        if curves:
            figures.append((title, charts.line_chart(title, curves, "optimizer step")))
    return figures, list(legend)
