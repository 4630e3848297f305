"""Scores a set of responses, one line of `scores.jsonl` an entry as they come, and sums them up."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge, JudgeError, ReferenceJudge, Verdict
from instruct_lm.evaluation.metrics import chrf, exact_match, rouge_l
from instruct_lm.evaluation.statistics import bootstrap_interval

logger = logging.getLogger(__name__)

MAX_UNREACHABLE = 8  # entries in a row without a server to answer them: then the evaluation stops


@dataclass(frozen=True)
class ScoredEntry:
    """One line of `scores.jsonl`.

    Attributes:
        index: Place of the entry in the responses, from 0.
        score: The judge's score, 0-100; None if it failed, or there is no judge.
        reason: Why it failed; None if it did not.
        exact_match: Whether response and reference are equal after normalisation.
        chrf: Sentence chrF, 0-100.
        rouge_l: ROUGE-L F-measure, 0-100.
        raw: The judge's answer as it came.
    """

    index: int
    score: float | None
    reason: str | None
    exact_match: bool
    chrf: float
    rouge_l: float
    raw: str | None = None

    @property
    def settled(self) -> bool:
        """Whether the judge answered, if only in prose: then it is not asked again. A network failure is."""
        return self.reason is None or self.raw is not None


def score_responses(
    entries: Sequence[Mapping[str, Any]],
    judge: Judge | None,
    path: Path,
    concurrency: int = 8,
    progress: bool = True,
) -> list[ScoredEntry]:
    """Score every response, going on where an interrupted call with the same judge and responses stopped.

    Each line of `path` is written to the disk before the next question is asked in its place. A line carries the
    fingerprint of the judge's description and the responses; if a file holds another one, it is replaced. An entry
    whose judge did not answer is asked again by the next call and gets a second line: the last one counts.

    Args:
        entries: Content of `responses.json`: the keys `instruction`, `output`, `model_response` and, if any, `input`.
        judge: None computes the offline metrics alone.
        path: The `scores.jsonl` to append to.
        concurrency: Questions in flight; the reference judge works without threads.
        progress: Show a bar with the mean so far.

    Returns:
        One item an entry, in the order of `entries`.

    Raises:
        InputError: No entries, an entry without its texts, or a judge that is misconfigured.
        JudgeError: The judge cannot be asked, or `MAX_UNREACHABLE` entries in a row found no server. What was scored
            stays in `path`. So it does after Ctrl-C, which waits for the answers that are under way.
    """
    texts = [_texts(entry, i) for i, entry in enumerate(entries)]
    if not texts:
        raise InputError("there are no responses to score")
    if concurrency < 1:
        raise InputError(f"judge.concurrency={concurrency}: must be at least 1")
    mark = fingerprint(texts, judge)
    scored = _resume(path, mark, len(texts))
    todo = [i for i in range(len(texts)) if i not in scored or not scored[i].settled]
    for i in todo:
        scored.pop(i, None)
    if judge and todo:
        judge.check()

    path.parent.mkdir(parents=True, exist_ok=True)
    one_at_a_time = threading.Lock()
    unreachable = 0  # in a row
    numbers = [item.score for item in scored.values() if item.score is not None]
    total, count = sum(numbers), len(numbers)
    bar = tqdm(total=len(texts), initial=len(scored), desc="scoring", unit="entry", disable=not progress)

    def ask(index: int) -> None:
        nonlocal unreachable, total, count
        entry = texts[index]
        response, reference = entry["model_response"], entry["output"]
        # before the question, so that nothing stands between an answer and its line
        metrics = exact_match(response, reference), chrf(response, reference), rouge_l(response, reference)
        verdict = judge.score(entry, response) if judge else Verdict(None)
        item = ScoredEntry(index, verdict.score, verdict.reason, *metrics, verdict.raw)
        with one_at_a_time:
            # one unbuffered write: a kill leaves a whole line or none
            file.write(json.dumps({"fingerprint": mark, **asdict(item)}).encode() + b"\n")
            os.fsync(file.fileno())
            scored[index] = item
            unreachable = unreachable + 1 if verdict.unreachable else 0
            if unreachable >= MAX_UNREACHABLE:
                raise JudgeError(
                    f"{unreachable} entries in a row found no judge, the last: {verdict.reason}.\n"
                    f"{len(scored)} of {len(texts)} entries are kept in {path}; see to the server and run it again."
                )
            if item.score is not None:
                total, count = total + item.score, count + 1
                bar.set_postfix_str(f"mean {total / count:.1f}", refresh=False)
            bar.update()

    with bar, path.open("ab", buffering=0) as file:
        if judge is None or isinstance(judge, ReferenceJudge):
            for i in todo:
                ask(i)
        else:
            with ThreadPoolExecutor(concurrency) as pool:  # leaving it waits for the answers under way
                try:
                    questions = [pool.submit(ask, i) for i in todo]
                    for question in as_completed(questions):
                        question.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    judge.close()
                    raise
    return [scored[i] for i in range(len(texts))]


def summarise(scored: Sequence[ScoredEntry], judge_description: Mapping[str, Any]) -> dict[str, Any]:
    """Sum up an evaluation as JSON values.

    Args:
        scored: What `score_responses` returned.
        judge_description: What `describe_judge` returned.

    Returns:
        A dict of `n` entries = `scored` + `failed` (+ the rest, if there is no judge), `mean` score over the scored
        ones with its 95% bootstrap interval `ci95` [low, high] over entries (both None if there are none),
        `mean_failed_as_zero` over scored and failed, `failures` (index and reason of each), the `judge`, and over all
        entries the share of `exact_match` in [0, 1] and the means of `chrf` and `rouge_l`, 0-100.
    """
    scores = [float(item.score) for item in scored if item.score is not None]
    failures = [{"index": item.index, "reason": item.reason} for item in scored if item.reason is not None]
    asked = len(scores) + len(failures)
    return {
        "n": len(scored),
        "scored": len(scores),
        "failed": len(failures),
        "mean": float(np.mean(scores)) if scores else None,
        "ci95": list(bootstrap_interval(scores)) if scores else None,
        "mean_failed_as_zero": sum(scores) / asked if asked else None,
        "exact_match": float(np.mean([item.exact_match for item in scored])),
        "chrf": float(np.mean([item.chrf for item in scored])),
        "rouge_l": float(np.mean([item.rouge_l for item in scored])),
        "judge": dict(judge_description),
        "failures": failures,
    }


def describe_judge(judge: Judge | None) -> dict[str, Any]:
    """The judge's description, also where there is none."""
    return judge.describe() if judge else {"kind": "none"}


def fingerprint(texts: Sequence[Mapping[str, str]], judge: Judge | None) -> str:
    """16 hexadecimal digits that change with the judge's description and the responses."""
    return hashlib.sha256(json.dumps([describe_judge(judge), list(texts)], sort_keys=True).encode()).hexdigest()[:16]


def _texts(entry: Mapping[str, Any], index: int) -> dict[str, str]:
    """The four texts of an entry."""
    texts = {}
    for key in ("instruction", "input", "output", "model_response"):
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if value is None and key == "input":
            value = ""
        if not isinstance(value, str):
            raise InputError(f"response {index}: {key!r} must be a text, and is {value!r}")
        texts[key] = value
    return texts


def _resume(path: Path, mark: str, n: int) -> dict[int, ScoredEntry]:
    """What an earlier call scored; removes a torn last line, and the whole file if it is of other scores."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    scored: dict[int, ScoredEntry] = {}
    readable = True
    for line in content.splitlines():
        try:
            values = json.loads(line)
            known = values.pop("fingerprint", None) == mark
            item = ScoredEntry(**values) if known else None
            readable = True
        except (ValueError, TypeError, AttributeError):
            readable = False  # its entry is asked again
            continue
        if item is None or not 0 <= item.index < n:
            logger.warning("%s holds scores of another judge, prompt or set of responses: starting anew", path)
            path.unlink()
            return {}
        scored[item.index] = item
    if content and not content.endswith(b"\n"):
        if not readable:
            os.truncate(path, content.rfind(b"\n") + 1)
        else:
            with path.open("ab") as file:
                file.write(b"\n")
    if scored:
        logger.info("%s: going on after %d scored entries", path, len(scored))
    return scored
