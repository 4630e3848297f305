"""Offline metrics of one answer against its reference: exact match, chrF and ROUGE-L."""

import re
import unicodedata
from functools import cache
from typing import Any

_CURLY_TO_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_OPENING = "'\"`«([{¿¡…"
_CLOSING = "'\"`»)]}…" + ".,;:!?"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # kana, Chinese characters, Hangul


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
def _chrf_metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()  # chrF2 of Popović (2015): character 1- to 6-grams, beta 2, whitespace ignored


def chrf(response: str, reference: str) -> float:
    """Sentence chrF of sacrebleu, 0-100.

    A set is summarised by the mean over its entries, not by pooled n-grams (`corpus_chrf`), so that every entry counts
    alike and a bootstrap over entries applies. On the book's published answers the mean is 56.8, the pooled value 51.7.
    """
    return float(_chrf_metric().sentence_score(response, [reference]).score)


class _UnicodeWords:
    """Tokenizer for `rouge_score`, whose own knows only `a-z0-9`: it leaves nothing of a text in Cyrillic."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits in lower case; each Chinese, Japanese or Korean character is a word."""
        return re.findall(f"[{_CJK}]|[^\\W_{_CJK}]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin, 2004) of the `rouge_score` package, 0-100, without stemming.

    Words are runs of Unicode letters and digits in lower case, for ASCII texts the package's own words. Chinese,
    Japanese and Korean texts are compared by character.
    """
    return 100.0 * float(_rouge_scorer().score(reference, response)["rougeL"].fmeasure)
