"""The lines of `scores.jsonl`: each carries a fingerprint of what it belongs to and a check of its own content."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from instruct_lm.io.records import record_line, record_lines

FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class ScoredEntry:
    """One line of `scores.jsonl`.

    Attributes:
        index: Position of the entry in the responses, from 0.
        score: The judge's score, 0-100; None if judging failed or there is no judge.
        reason: Why judging failed; None if it did not.
        exact_match: Whether response and reference are equal after normalisation.
        chrf: Sentence chrF, 0-100.
        rouge_l: ROUGE-L F-measure, 0-100.
        raw: The judge's reply as text.
        feedback: What the judge says about the answer, if it was asked for that.
        again: Whether the next call asks the judge again, since there was no answer to the question.
    """

    index: int
    score: float | None
    reason: str | None
    exact_match: bool
    chrf: float
    rouge_l: float
    raw: str | None = None
    feedback: str | None = None
    again: bool = False


def score_line(fingerprint: str, item: ScoredEntry) -> str:
    """The line of an entry, without its end."""
    return record_line({FINGERPRINT: fingerprint, **asdict(item)})


def scored_lines(text: str) -> Iterator[tuple[str, str, ScoredEntry]]:
    """The line, the fingerprint and the entry of each line that is whole; a line cut by a kill or damaged has none."""
    for line, values in record_lines(text):
        with suppress(TypeError, LookupError):  # the keys of another version
            yield line, values.pop(FINGERPRINT), ScoredEntry(**values)


def read_scores(path: Path) -> dict[int, ScoredEntry]:
    """Index → entry of a `scores.jsonl`; of two lines for an entry the last counts. Empty if there is no such file.

    Raises:
        OSError: It cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {item.index: item for _, _, item in scored_lines(text)}
