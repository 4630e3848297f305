"""A comparison as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from instruct_lm.report import charts as plots
from instruct_lm.report.comparison import Comparison
from instruct_lm.report.evaluations import CURVES
from instruct_lm.report.settings import Setting
from instruct_lm.report.side_by_side import Answer, Entry, by_disagreement, side_by_side
from instruct_lm.report.tables import (
    LABELS,
    Table,
    all_tables,
    difference_text,
    differences_title,
    interval_text,
    seen_sentence,
)

_CURVE_TITLES = {
    "train/loss": "Training loss",
    "val/loss": "Validation loss",
    "val/response_loss": "Validation loss of the responses",
}


def render(comparison: Comparison, title: str) -> str:
    """The page. All texts of entries, answers and names are escaped, and its policy runs no script but its own."""
    sections = _tables_and_charts(comparison)
    entries = by_disagreement(side_by_side(comparison))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = re.findall("<script>(.*?)</script>", template, re.DOTALL)[0]
    headings = [("findings", "Findings"), *((anchor, name) for anchor, name, _ in sections), ("answers", "Answers")]
    return Template(template).substitute(
        title=escape(title),
        subtitle=escape(f"{len(comparison.runs)} evaluations, {len(entries)} entries"),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chart_style=plots.STYLE,
        navigation=" ".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in headings),
        findings=_findings(comparison),
        sections="\n".join(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(name)}</h2>\n{content}\n</section>'
            for anchor, name, content in sections
        ),
        n_entries=len(entries),
        entries="\n".join(map(_entry, entries)),
    )


def picture(comparison: Comparison) -> str:
    """SVG file of the mean scores and, below, the differences from the last baseline: the first trained setting, or
    the untuned model where there is one setting besides."""
    differences = [_differences_chart(comparison, baseline) for baseline in list(comparison.paired)[-1:]]
    return plots.standalone([_scores_chart(comparison), *differences])


def _scores_chart(comparison: Comparison) -> str:
    """Each setting's mean score (chrF without a judge) with its interval."""
    metric = comparison.headline
    rows = [
        plots.Dot(setting.name, *setting.means[metric], interval_text(setting.means[metric]), i)
        for i, setting in enumerate(comparison.settings)
        if metric in setting.means
    ]
    return plots.interval_chart("Mean and interval of each setting", rows, f"{LABELS[metric]}, 95% interval")


def _differences_chart(comparison: Comparison, baseline: str) -> str:
    """What each setting has more than a baseline, over the same entries, in the metric that all contrasts have."""
    contrasts = comparison.paired[baseline]
    metric = "score" if all(contrast.metric == "score" for contrast in contrasts) else "chrf"
    colours = {setting.name: i for i, setting in enumerate(comparison.settings)}  # as in the other charts
    rows = []
    for contrast in contrasts:
        found, name = contrast.differences[metric], contrast.setting.name
        rows.append(plots.Dot(name, found.mean, found.low, found.high, difference_text(found), colours[name]))
    label = f"difference in {LABELS[metric]} from {plots.clipped(baseline, 24)}, 95% interval"
    return plots.interval_chart(differences_title(baseline), rows, label, zero=True)


def _tables_and_charts(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of each section."""
    found = []
    drawn = {"Scores": _scores_chart(comparison)}
    drawn |= {differences_title(baseline): _differences_chart(comparison, baseline) for baseline in comparison.paired}
    for number, table in enumerate(all_tables(comparison)):
        charts = _figures([("", drawn[table.title])]) if table.title in drawn else ""
        found.append((f"table-{number}", table.title, charts + _table(table)))
        if number == 0:
            found += [("distribution", "Distribution of scores", _histograms(comparison))]
    curves = _curves(comparison)
    return [*found, ("losses", "Loss curves", curves)] if curves else found


def _findings(comparison: Comparison) -> str:
    items = [
        f'<li class="{"found" if contrast.significant else "open"}">{_unbroken(contrast.sentence)}</li>'
        for contrast in comparison.contrasts
    ]
    return f'<ul class="findings">{"".join(items)}<li>{escape(seen_sentence(comparison))}</li></ul>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "".join(
        f'<tr><th scope="row">{_breakable(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.cells
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.title)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table aria-label="{label}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _breakable(name: str) -> str:
    """A name that may break after `_`, `=` and `,`."""
    return re.sub("(?<=[_=,])", "<wbr>", escape(name))


def _unbroken(sentence: str) -> str:
    """A sentence that does not break within `4.1 ± 2.0` and `p = 0.2`."""
    return escape(re.sub(r" ([±<=]) ", "\u00a0\\1\u00a0", sentence))


def _histograms(comparison: Comparison) -> str:
    metric = comparison.headline
    scored = [(i, setting, _known(setting, metric)) for i, setting in enumerate(comparison.settings)]
    scored = [(i, setting, values) for i, setting, values in scored if values.size]
    top = max((float(plots.bin_shares(values).max()) for _, _, values in scored), default=1.0)
    return _figures(
        (setting.name, plots.histogram(f"Distribution of scores of {setting.name}", values, i, top))
        for i, setting, values in scored
    )


def _curves(comparison: Comparison) -> str:
    charts = []
    trained: dict[int, str] = {}
    for key in CURVES:
        curves = []
        for i, setting in enumerate(comparison.settings):
            for run in setting.runs:
                if points := run.curves.get(key):
                    curves.append(plots.Curve(run.name, plots.thin(points), i))
                    trained[i] = setting.name
        if curves:
            charts.append((_CURVE_TITLES[key], plots.line_chart(_CURVE_TITLES[key], curves, "optimizer step")))
    if not charts:
        return ""
    legend = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" stroke-width="3" '
        f'stroke="var(--c{i % plots.N_COLOURS})"/></svg>{escape(name)}</li>'
        for i, name in trained.items()
    )
    note = (
        "Loss per token. Training and validation loss have the weights of each run, so that they do not compare runs "
        "of other weights; the loss of the responses is the same measure for all. Long curves show means of neighbours."
    )
    return f'<ul class="legend">{legend}</ul>{_figures(charts)}<p class="note">{note}</p>'


def _figures(charts: Iterable[tuple[str, str]]) -> str:
    figures = (f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in charts)
    return f'<div class="charts">{"".join(figures)}</div>'


def _entry(entry: Entry) -> str:
    scores = entry.scores
    between = f'<span class="score">scores {min(scores):.0f} to {max(scores):.0f}</span>' if len(scores) > 1 else ""
    extra = f'<p class="text input" dir="auto">{escape(entry.input)}</p>' if entry.input else ""
    return (
        f'<article class="entry" data-index="{entry.number}" data-spread="{entry.spread:.6g}" '
        f'data-low="{min(scores, default=0.0):.6g}"><h3>Entry {entry.number} {between}</h3>'
        f'<p class="text" dir="auto">{escape(entry.instruction)}</p>{extra}<div class="answers">'
        f'<div class="answer reference"><h4>Reference</h4>'
        f'<p class="text" dir="auto">{escape(entry.reference)}</p></div>'
        f"{''.join(map(_answer, entry.answers))}</div></article>"
    )


def _answer(answer: Answer) -> str:
    text = f'<p class="text" dir="auto">{escape(answer.text)}</p>' if answer.text else '<p class="none">no answer</p>'
    return (
        f'<div class="answer" style="border-left-color: var(--c{answer.setting % plots.N_COLOURS})">'
        f'<h4>{escape(answer.by)} <span class="score">{answer.scores_text}</span></h4>{text}</div>'
    )


def _known(setting: Setting, metric: str) -> np.ndarray:
    values = setting.values(metric).ravel()
    return values[~np.isnan(values)]
