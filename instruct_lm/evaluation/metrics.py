"""Offline metrics of one answer against its reference, and the statistics over many."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from instruct_lm.errors import InputError

if TYPE_CHECKING:
    from sacrebleu.metrics import CHRF

_CURLY_TO_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_OPENING = "'\"`«([{¿¡…"
_CLOSING = "'\"`»)]}…" + ".,;:!?"


def normalise(text: str) -> str:
    """Lower-case, one space between words, no quotes, brackets or sentence punctuation at the edges of a word.

    Punctuation inside a word and signs that carry meaning stay, so `3.5`, `-34`, `5%`, `C++` and `W=M*G` differ from
    `35`, `34`, `5`, `C` and `WMG`. A text of nothing but punctuation stays as it is: `?` is an answer too.

    Example:
        >>> normalise("The opposite of ‘wet’  is 'Dry'.")
        'the opposite of wet is dry'
    """
    text = unicodedata.normalize("NFC", text).translate(_CURLY_TO_STRAIGHT).casefold()
    words = (word.lstrip(_OPENING).rstrip(_CLOSING) for word in text.split())
    return " ".join(word for word in words if word) or text.strip()


def exact_match(response: str, reference: str) -> bool:
    """Whether both texts are the same after `normalise` (case, punctuation, whitespace)."""
    return normalise(response) == normalise(reference)


@cache
def _chrf_metric() -> "CHRF":
    from sacrebleu.metrics import CHRF

    return CHRF()  # chrF2 of Popović (2015): character 1- to 6-grams, beta 2, whitespace ignored


def chrf(response: str, reference: str) -> float:
    """Sentence chrF of sacrebleu, 0-100.

    A set is summarised by the mean over its entries, not by pooled n-grams (`corpus_chrf`): every entry counts alike,
    and a bootstrap over entries applies. On the book's published answers the mean is 56.8, the pooled value 51.7.
    """
    return float(_chrf_metric().sentence_score(response, [reference]).score)


def _lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over the words of `a` (Hyyrö, 2004)."""
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    everywhere = row = (1 << len(a)) - 1
    for word in b:
        hits = row & positions.get(word, 0)
        row = ((row + hits) | (row - hits)) & everywhere
    return len(a) - row.bit_count()  # a cleared bit is a word of the subsequence


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin, 2004), 0-100, as the `rouge_score` package computes it without stemming.

    Words are runs of `a-z0-9` after lower-casing; a text without any, such as one in Cyrillic, scores 0.
    """
    words, reference_words = (re.findall("[a-z0-9]+", text.lower()) for text in (response, reference))
    if not words or not reference_words:
        return 0.0
    # 2PR / (P + R) with P = lcs / len(words) and R = lcs / len(reference_words)
    return 200.0 * _lcs_length(words, reference_words) / (len(words) + len(reference_words))


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: One number an entry.
        confidence: Share of the resampled means inside the interval, in (0, 1).
        n_resamples: Number of resamples, each of `len(values)` entries drawn with replacement.
        seed: Seed of the draws: the same values give the same interval.

    Returns:
        The lower and upper end, in the unit of `values`.

    Raises:
        InputError: `values` is empty, or `confidence` is outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise InputError("a bootstrap interval needs at least one value")
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // data.size)  # at most 32 MB of indices at a time
    means = np.concatenate(
        [
            data[rng.integers(data.size, size=(min(rows, n_resamples - start), data.size))].mean(axis=1)
            for start in range(0, n_resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip(x @ y / scale, -1, 1)) if scale else None


def _kendall(x: np.ndarray, y: np.ndarray) -> float | None:
    """Tau-b (Kendall, 1945): concordant minus discordant pairs, ties left out of the scale; O(n²) time, O(n) memory."""
    concordance = untied_x = untied_y = 0.0
    for i in range(len(x) - 1):
        sign_x, sign_y = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        concordance += sign_x @ sign_y
        untied_x += sign_x @ sign_x
        untied_y += sign_y @ sign_y
    scale = (untied_x * untied_y) ** 0.5
    return float(concordance / scale) if scale else None


def agreement(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Agreement of two judges over the same entries: Pearson's r, Spearman's rho and Kendall's tau-b, in [-1, 1].

    Args:
        first: One judge's scores.
        second: The other judge's scores of the same entries, in the same order.

    Returns:
        The keys `pearson`, `spearman` and `kendall`; None where a judge gave every entry the same score.

    Raises:
        InputError: The lengths differ, or there are fewer than two entries.
    """
    if len(first) != len(second) or len(first) < 2:
        raise InputError(
            f"agreement needs two or more scores a judge, of the same entries: {len(first)}, {len(second)}"
        )
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y)), "kendall": _kendall(x, y)}
