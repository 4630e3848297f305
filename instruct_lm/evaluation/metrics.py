"""Offline metrics of one answer against its reference: exact match, chrF and ROUGE-L."""

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import regex

_CURLY_TO_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_WIDTH_FORMS = regex.compile(r"[\uFF01-\uFF5D\uFF61-\uFFDC]+")  # but not ～, which is punctuation unlike ~
# Brackets and quotation marks are \p{Ps}, \p{Pe}, \p{Pi} and \p{Pf}; Terminal_Punctuation is `.,;:!?` and its like in
# every script, such as 。، and ।.
_QUOTES_AND_PAUSES = r"'\"`\p{Pi}\p{Pf}…‥⋯—―・～〜"
_OPENING = regex.compile(rf"^[{_QUOTES_AND_PAUSES}\p{{Ps}}¿¡]+")
_CLOSING = regex.compile(rf"(?r)[{_QUOTES_AND_PAUSES}\p{{Pe}}\p{{Terminal_Punctuation}}]+$")


def _unified(text: str) -> str:
    """One form of each character: NFC, ASCII letters and signs for full-width ones, kana for half-width ones.

    NFKC would do more than that: it makes 2 of ², and 1⁄2 of ½.
    """
    text = _WIDTH_FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", text)


def normalise(text: str) -> str:
    """Lower-case, one space between words, no quotes, brackets or sentence punctuation at the edges of a word.

    That holds for the punctuation of every language; in a text without spaces, the edges are those of the text.
    Full-width and half-width forms are the same as the usual ones. Punctuation inside a word and signs that carry
    meaning stay, so `3.5`, `-34`, `5%`, `C++` and `W=M*G` differ from `35`, `34`, `5`, `C` and `WMG`. A text of nothing
    but punctuation stays as it is: `?` is an answer too.

    Example:
        >>> normalise("The opposite of ‘wet’  is 'Dry'."), normalise("「巴黎」。")
        ('the opposite of wet is dry', '巴黎')
    """
    words = _unified(text).translate(_CURLY_TO_STRAIGHT).casefold().split()
    return " ".join(filter(None, (_CLOSING.sub("", _OPENING.sub("", word)) for word in words))) or " ".join(words)


def exact_match(response: str, reference: str) -> bool:
    """Whether both texts are the same after `normalise` (case, punctuation, whitespace, width of characters).

    It tokenises at whitespace alone.
    """
    return normalise(response) == normalise(reference)


@cache
def _chrf_metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()  # chrF2 of Popović (2015): character 1- to 6-grams, beta 2, whitespace ignored


def chrf(response: str, reference: str) -> float:
    """Sentence chrF of sacrebleu, 0-100.

    It tokenises into characters, in every language alike, without whitespace and with regard to case. Equal texts have
    100; a text of whitespace alone has 0, also against itself.

    A set is summarised by the mean over its entries, not by pooled n-grams (`corpus_chrf`), so that every entry counts
    alike and a bootstrap over entries applies. On the book's published answers the mean is 56.8, the pooled value 51.7.
    """
    return float(_chrf_metric().sentence_score(response, [reference]).score)


_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Hangul}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"(?=[\p{{L}}\p{{N}}])[{_WITHOUT_SPACES}]\p{{M}}*"  # a character with its marks
    rf"|(?:(?![{_WITHOUT_SPACES}])[\p{{L}}\p{{M}}\p{{N}}])+"
)


class _UnicodeWords:
    """Tokenizer for `rouge_score`, whose own knows only `a-z0-9`: it leaves nothing of a text in Cyrillic."""

    def tokenize(self, text: str) -> list[str]:
        """See `rouge_l`."""
        words = _WORD.findall(regex.sub(r"\p{Cf}", "", _unified(text).lower()))  # Cf: such as joiners, soft hyphens
        return words or [sign for sign in regex.findall(r"\X", text) if not sign.isspace()]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin, 2004) of the `rouge_score` package, 0-100, without stemming.

    It tokenises into runs of letters (with their combining marks) and digits in lower case, for ASCII texts the words
    of the package itself. Scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), and
    Korean, are compared by character. Full-width and half-width forms are the same as the usual ones. A text without
    words, such as `?` or an emoji, is compared by its signs. Equal texts have 100; a text of whitespace alone has 0,
    also against itself.
    """
    return 100.0 * float(_rouge_scorer().score(reference, response)["rougeL"].fmeasure)


class Metric(NamedTuple):
    """A metric that every scored entry has, as the field of the same name in `ScoredEntry`.

    Attributes:
        label: Its name in tables.
        compute: (response, reference) → its value: True or False, or 0 to 100, the higher the better.
    """

    label: str
    compute: Callable[[str, str], float]


METRICS = {
    "exact_match": Metric("exact match", exact_match),
    "chrf": Metric("chrF", chrf),
    "rouge_l": Metric("ROUGE-L", rouge_l),
}
"""In the order of the tables."""
