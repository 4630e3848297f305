"""What a comparison is about and shows, in a few lines: title, facts, sentences and warnings."""

from collections.abc import Iterable, Sequence

import numpy as np

from instruct_lm.report.comparison import Comparison, Contrast, p_text
from instruct_lm.report.evaluations import Evaluation
from instruct_lm.report.settings import Setting, differing, words

_NEAR, _MOST = 5, 0.9  # a score within 5 of 0 or 100; the share of them that leaves no room for differences


def title(comparison: Comparison) -> str:
    """`gpt2-medium on instruction: untuned, tuned`, or the keys that differ where there are many settings."""
    names = [setting.name for setting in comparison.settings]
    if len(names) < 4:
        what = ", ".join(names)
    else:
        trained = [setting for setting in comparison.settings if setting.trained]
        keys = differing([run for setting in trained for run in setting.runs])
        varied = ", ".join(words(key) for key in keys if key != "seed")
        what = f"{len(trained)} settings of {varied}" if varied and trained else f"{len(names)} settings"
    subject = " on ".join(filter(None, [_models(comparison.runs), _data(comparison.runs)]))
    return f"{subject}: {what}" if subject else what


def facts(comparison: Comparison) -> dict[str, str]:
    """What was evaluated: name → value, of what is known."""
    runs = comparison.runs
    counts = sorted({len(run.examples) for run in runs})
    splits = _listed(run.settings.get("split") for run in runs)
    entries = " or ".join(map(str, counts)) + (f" ({splits})" if splits else "")
    seeds = sorted({seed for setting in comparison.settings if setting.trained for seed in setting.seeds if seed})
    days = sorted({run.day for run in runs if run.day})
    found = {
        "Model": _models(runs),
        "Data": _data(runs),
        "Entries": entries,
        "Judge": _listed(judge_text(run) for run in runs),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})" if len(seeds) > 1 else "".join(map(str, seeds)),
        "Precision": _listed(run.precision for run in runs),
        "Scored": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
        "Evaluations": str(len(runs)),
    }
    return {name: value for name, value in found.items() if value}


def sentences(comparison: Comparison) -> list[str]:
    """The answer to the question that the settings pose, and a line for each other baseline."""
    question = comparison.question
    told = [summary(question)] if question else []
    for contrasts in comparison.paired.values():
        if others := [contrast for contrast in contrasts if contrast not in question]:
            told.append(summary(others))
    told += [contrast.sentence for contrast in comparison.contrasts if not contrast.differences]
    return told


def summary(contrasts: Sequence[Contrast]) -> str:
    """What the contrasts with one baseline show together."""
    first, k = contrasts[0], len(contrasts)
    if k == 1 or len({contrast.metric for contrast in contrasts}) > 1:
        return " ".join(contrast.sentence for contrast in contrasts)
    base, note = first.baseline.name, next((c.note for c in contrasts if c.note), "")
    found = [contrast for contrast in contrasts if contrast.significant]
    others = sorted((c for c in contrasts if not c.significant), key=lambda c: c.found.mean)
    if not found:
        span = f"{_sized(others[0])} to {_sized(others[-1])}"
        least = p_text(min(contrast.p_value for contrast in others)) + first.adjusted
        shown = f"that {first.evidence} can show: {span}, smallest {least}"
        return f"No difference between {base} and {k} other settings {shown}.{note}"
    if not others and len({contrast.verdict for contrast in found}) == 1:
        amounts = sorted(abs(contrast.found.mean) for contrast in found)
        by = f"by {amounts[0]:.1f} to {amounts[-1]:.1f}{first.unit}"
        each = f"each {_at_most(max(contrast.p_value for contrast in found))}{first.adjusted}"
        return f"All {k} settings are {first.verdict} than {base}, {by}, {each}.{note}"
    rest = _undecided(others)
    if len(found) == 1:
        return found[0].sentence + rest
    told = "; ".join(f"{c.setting.name} is {c.verdict} by {c.amount}, {p_text(c.p_value)}" for c in found)
    return f"{len(found)} of {k} settings differ from {base}{first.adjusted}: {told}.{rest}{note}"


def warnings(comparison: Comparison) -> list[str]:
    """What makes the differences hard to read."""
    trained = [setting for setting in comparison.settings if setting.trained]
    found = _extremes(trained if len(trained) > 1 else comparison.settings, comparison.headline)
    if set(differing([setting.runs[0] for setting in trained])) <= {"device.precision", "seed"} and len(trained) > 1:
        return found  # they ask what the precision does
    runs = [(setting.name, run) for setting in comparison.settings for run in setting.runs]
    found += _precisions("answered", [(name, run.precision) for name, run in runs])
    return found + _precisions("trained", [(name, run.training.get("precision")) for name, run in runs])


def judge_text(run: Evaluation) -> str:
    """`openai llama3`, `reference (mean of …)`."""
    judge = run.summary["judge"]
    named = " ".join(judge[key] for key in ("kind", "model") if judge.get(key))
    return f"{named} ({judge['score']})" if judge.get("score") else named


def _extremes(settings: Sequence[Setting], metric: str) -> list[str]:
    """A warning if nearly all scores of all these settings are near one end of the scale."""
    values = [values[~np.isnan(values)] for values in (setting.values(metric) for setting in settings)]
    for name, end in (("Floor", 0), ("Ceiling", 100)):
        if all(scores.size and np.mean(np.abs(scores - end) <= _NEAR) >= _MOST for scores in values):
            most = f"at least {_MOST:.0%} of the scores of every setting are within {_NEAR} of {end}"
            return [f"{name} effect: {most}. This judge and these entries cannot tell the settings apart."]
    return []


def _precisions(verb: str, known: Sequence[tuple[str, str | None]]) -> list[str]:
    """A warning if these runs were trained or answered in different precisions."""
    by_precision: dict[str, dict[str, None]] = {}  # names in order, each once
    for name, precision in known:
        if precision:
            by_precision.setdefault(precision, {})[name] = None
    if len(by_precision) < 2:
        return []
    listed = {each: ", ".join([*names][:3]) + " …" * (len(names) > 3) for each, names in by_precision.items()}
    told = "; ".join(f"{names}: {precision}" for precision, names in listed.items())
    return [f"The settings were {verb} in different precisions, which alone can change a score ({told})."]


def _undecided(others: Sequence[Contrast]) -> str:
    """The end of a summary; the one that is left is named, with its size."""
    if not others:
        return ""
    shown = f"no difference that {others[0].evidence} can show"
    if len(others) > 1:
        return f" For the other {len(others)}, {shown}."
    return f" For {others[0].setting.name}, {shown}: {others[0].size}, {p_text(others[0].p_value)}."


def _sized(contrast: Contrast) -> str:
    return f"{contrast.size} ({contrast.setting.name})"


def _at_most(p_value: float) -> str:
    return p_text(p_value).replace("=", "≤")


def _models(runs: Sequence[Evaluation]) -> str:
    return _listed(run.settings.get("model.name") or run.summary.get("model") for run in runs)


def _data(runs: Sequence[Evaluation]) -> str:
    return _listed(run.settings.get("data.name") for run in runs)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))
