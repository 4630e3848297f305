"""The offline judge: compares an answer with the reference answer, without a language model."""

from collections.abc import Mapping
from typing import Any

from instruct_lm.evaluation.judges.base import Judge, Verdict
from instruct_lm.evaluation.metrics import chrf, exact_match


class ReferenceJudge(Judge):
    """Scores with the mean of exact match (0 or 100) and sentence chrF (0-100).

    Args:
        **options: What other judges need, unused.
    """

    def __init__(self, **options: Any) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """The kind and the formula."""
        return {"kind": "reference", "score": "mean of exact match x 100 and sentence chrF"}

    def check(self) -> None:
        """Nothing to check."""

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """Compare with `entry["output"]`; never fails."""
        return Verdict((100.0 * exact_match(response, entry["output"]) + chrf(response, entry["output"])) / 2)

    def close(self) -> None:
        """Nothing to release."""
