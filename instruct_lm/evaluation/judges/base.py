"""What every judge has in common: the interface and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from instruct_lm.errors import RunError


class JudgeError(RunError):
    """The judge cannot be reached or refuses the key; the message names the remedy."""


@dataclass(frozen=True)
class Verdict:
    """The result of judging one answer.

    Attributes:
        score: 0-100; None if judging failed.
        reason: Why judging failed; None if there is a score.
        raw: The judge's reply as text; None if it did not reply, or computes the score without words.
        feedback: What the judge says about the answer, if it was asked for that; None without a score.
        unreachable: Judging failed for a reason that affects every entry: no connection, wrong key or unknown model.
        again: There was no answer to the question, so the next call asks it again.
    """

    score: int | float | None
    reason: str | None = None
    raw: str | None = None
    feedback: str | None = None
    unreachable: bool = False
    again: bool = False


class Judge(Protocol):
    """Scores answers. `score` is called from several threads at once."""

    def describe(self) -> dict[str, Any]:
        """Everything that affects the scores (kind, server, model, digest, prompt, …) as JSON values, no secrets."""

    def check(self) -> None:
        """Get ready to score; raise InputError or JudgeError with the remedy if that is impossible."""

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """Score `response` to an entry with the keys `instruction`, `input` and `output`."""

    def close(self) -> None:
        """Stop retrying and release resources. A later `check` makes the judge usable again."""
