"""Scoring a set of answers: one line of `scores.jsonl` per entry, and a summary."""

import hashlib
import json
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge, JudgeError, Verdict
from instruct_lm.evaluation.judges.reference import ReferenceJudge
from instruct_lm.evaluation.metrics import METRICS
from instruct_lm.evaluation.responses import entry_texts
from instruct_lm.evaluation.score_file import ScoredEntry as ScoredEntry
from instruct_lm.evaluation.score_file import score_line, scored_lines
from instruct_lm.evaluation.statistics import bootstrap_interval
from instruct_lm.io.files import write_text

logger = logging.getLogger(__name__)

MAX_UNREACHABLE = 8  # consecutive entries that could not reach the judge, after which scoring stops


def score_responses(
    entries: Sequence[Mapping[str, Any]], judge: Judge | None, path: Path, concurrency: int = 8
) -> list[ScoredEntry]:
    """Score every response; continue where an interrupted call with the same judge and responses stopped.

    Each score is appended to `path` and synced as soon as it is known. Each line carries a fingerprint of the judge and
    the responses, and a check of its own content; a file with another fingerprint is replaced, and an entry whose line
    is damaged is scored again. An entry that got no answer from the judge is asked again by the next call and gets a
    second line: the last line counts.

    Args:
        entries: Content of `responses.json`: the keys `instruction`, `output`, `model_response` and optionally `input`.
        judge: None computes the offline metrics alone.
        path: The `scores.jsonl` to append to.
        concurrency: Requests in flight; the reference judge uses one thread.

    Returns:
        One item per entry, in the order of `entries`.

    Raises:
        InputError: No entries, an entry without its texts, or a misconfigured judge.
        JudgeError: The judge cannot be reached, or `MAX_UNREACHABLE` consecutive entries failed to reach it. The scores
            so far stay in `path`; so they do after Ctrl-C, which waits for the requests in flight.
    """
    texts = [entry_texts(entry, f"response {i}") for i, entry in enumerate(entries)]
    if not texts:
        raise InputError("there are no responses to score")
    decisive = json.dumps([describe_judge(judge), texts], sort_keys=True)
    mark = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    scored = _resume(path, mark)
    todo = {i: entry for i, entry in enumerate(texts) if i not in scored}
    if judge and todo:
        judge.check()
    numbers = [item.score for item in scored.values() if item.score is not None]
    total, count, unreachable = sum(numbers), len(numbers), 0
    bar = tqdm(total=len(texts), initial=len(scored), desc="scoring", unit="entry")
    with bar, closing(_score_all(todo, judge, mark, path, concurrency)) as results:
        for item, reached in results:
            scored[item.index] = item
            unreachable = 0 if reached else unreachable + 1
            if unreachable >= MAX_UNREACHABLE:
                raise JudgeError(
                    f"{unreachable} entries in a row could not reach the judge, the last one: {item.reason}.\n"
                    f"{len(scored)} of {len(texts)} entries are in {path}. Check the server and run the command again."
                )
            if item.score is not None:
                total, count = total + item.score, count + 1
                bar.set_postfix_str(f"mean {total / count:.1f}", refresh=False)
            bar.update()
    return [scored[i] for i in range(len(texts))]


def _score_all(
    todo: Mapping[int, Mapping[str, str]], judge: Judge | None, mark: str, path: Path, concurrency: int
) -> Generator[tuple[ScoredEntry, bool], None, None]:
    """Yield entries in the order of completion, their lines written, and whether each reached the judge."""

    def score(index: int) -> tuple[ScoredEntry, bool]:
        entry = todo[index]
        response, reference = entry["model_response"], entry["output"]
        # The metrics come before the question, so that nothing delays writing the reply.
        metrics: dict[str, Any] = {name: metric.compute(response, reference) for name, metric in METRICS.items()}
        verdict = judge.score(entry, response) if judge else Verdict(None)
        words: dict[str, Any] = {"raw": verdict.raw, "feedback": verdict.feedback, "again": verdict.again}
        item = ScoredEntry(index, verdict.score, verdict.reason, **metrics, **words)
        # Unbuffered, in append mode, in one call: a kill leaves the whole line or none, and threads do not mix theirs.
        file.write(f"{score_line(mark, item)}\n".encode())
        os.fsync(file.fileno())
        return item, not verdict.unreachable

    path.parent.mkdir(parents=True, exist_ok=True)
    workers = concurrency if judge and not isinstance(judge, ReferenceJudge) else 1
    with path.open("ab", buffering=0) as file, ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(score, i) for i in todo]):
                yield done.result()
        except BaseException:  # an error, Ctrl-C, or closing: leaving the pool waits for the requests in flight
            pool.shutdown(wait=False, cancel_futures=True)
            if judge:
                judge.close()
            raise


def summarise(scored: Sequence[ScoredEntry], judge_description: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise an evaluation as JSON values.

    Args:
        scored: Result of `score_responses`.
        judge_description: Result of `describe_judge`.

    Returns:
        `n`: Entries, of which `scored` have a score and `failed` have a reason instead (without a judge: neither).
        `mean`, `ci95`: Mean score and its 95% bootstrap interval [low, high] over entries; None if nothing is scored.
        `mean_failed_as_zero`: Mean over scored and failed entries.
        `exact_match`: Share of all entries, 0-1. `chrf`, `rouge_l` and the others of `METRICS`: Means over all, 0-100.
        `judge`: The description. `failures`: Index and reason of each failed entry.
        `lowest`: Index, score and feedback of the first entry with the lowest score, if the judge gives feedback.
    """
    scores = [float(item.score) for item in scored if item.score is not None]
    failures = [{"index": item.index, "reason": item.reason} for item in scored if item.reason is not None]
    asked = len(scores) + len(failures)
    told = [item for item in scored if item.score is not None and item.feedback is not None]
    lowest = min(told, key=lambda item: float(item.score or 0), default=None)
    return {
        "n": len(scored),
        "scored": len(scores),
        "failed": len(failures),
        "mean": float(np.mean(scores)) if scores else None,
        "ci95": list(bootstrap_interval(scores)) if scores else None,
        "mean_failed_as_zero": sum(scores) / asked if asked else None,
        **{name: float(np.mean([getattr(item, name) for item in scored])) for name in METRICS},
        "judge": dict(judge_description),
        "failures": failures,
        **({"lowest": {key: getattr(lowest, key) for key in ("index", "score", "feedback")}} if lowest else {}),
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """The main numbers of a summary in one to five lines of text."""
    n = summary["n"]
    means = {metric.label: f"{summary[name]:.1f}" for name, metric in METRICS.items()}
    means[METRICS["exact_match"].label] = f"{round(summary['exact_match'] * n)} of {n}"
    lines = [f"{n} answers: {', '.join(f'{label} {mean}' for label, mean in means.items())}"]
    if "ended" in summary:
        lines.append(f"answers ended by the model: {summary['ended']:.0%}, {summary['mean_tokens']:.1f} tokens each")
    if summary["mean"] is not None:
        kind, (low, high) = summary["judge"]["kind"], summary["ci95"]
        lines.append(f"score ({kind}): {summary['mean']:.1f} of 100, 95% interval {low:.1f} to {high:.1f}")
    if lowest := summary.get("lowest"):
        lines.append(
            f"lowest: entry {lowest['index']}, {lowest['score']:g}: {' '.join(lowest['feedback'].split())[:160]}"
        )
    if summary["failed"]:
        first = summary["failures"][0]
        lines.append(
            f"{summary['failed']} entries have no score, the first: entry {first['index']}, {first['reason']}. "
            f"Mean with those as 0: {summary['mean_failed_as_zero']:.1f}"
        )
    return "\n".join(lines)


def describe_judge(judge: Judge | None) -> dict[str, Any]:
    """The judge's description; `{"kind": "none"}` without a judge."""
    return judge.describe() if judge else {"kind": "none"}


def _resume(path: Path, mark: str) -> dict[int, ScoredEntry]:
    """Index → entry for all that need no further question; drops cut and damaged lines, and all of another `mark`."""
    if not path.exists():
        return {}
    content = path.read_text(encoding="utf-8", errors="replace")
    lines = list(scored_lines(content))
    if any(fingerprint != mark for _, fingerprint, _ in lines):
        logger.warning("%s holds scores of another judge, prompt or set of responses: starting anew", path)
        path.unlink()
        return {}
    kept = "".join(f"{line}\n" for line, _, _ in lines)
    if (lost := sum(1 for line in content.split("\n")[:-1] if line) - len(lines)) > 0:
        logger.warning("%s: %d lines are damaged: their entries are scored again", path, lost)
    if kept != content:
        write_text(kept, path)
    scored = {item.index: item for _, _, item in lines}
    scored = {i: item for i, item in scored.items() if not item.again}
    if scored:
        logger.info("%s: continuing after %d scored entries", path, len(scored))
    return scored
