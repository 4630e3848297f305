"""Parsing the score out of a judge's reply."""

import json
import re
from typing import Any

_NUMBER = r"(?<![\w.,])([-+]?[0-9]+(?:[.,][0-9]+)*)(?!\w|[.,][0-9])"
_OF_100 = r"\s*(?:/|(?:out\s+)?of)\s*100(?![0-9])"
_SCORE = rf"{_NUMBER}(?:{_OF_100})?(?!\s*(?:/|(?:out\s+)?of)\s*[0-9])"  # on the scale of 100, not "8/10"
# A number marked as the score: alone on its line, after a label, or before "/100".
_MARKED = re.compile(
    rf"^[ \t\"'(]*{_SCORE}[ \t\"').!%]*$"
    rf"|\b(?:score|rating|grade)\s*(?:(?::|=|is|of|would be)\s*){{1,3}}{_SCORE}"
    rf"|{_NUMBER}{_OF_100}",
    re.IGNORECASE | re.MULTILINE,
)
_SCALE = re.compile(r"\b0\s*(?:to|[-–])\s*100\b|\b100 is the best\b", re.IGNORECASE)  # repeats the question
_RANGE = re.compile(r"[0-9]\s*(?:to|[-–])\s*[0-9]", re.IGNORECASE)
# Signs that the only number of a text is a score: a verb of rating, or its place at the beginning or after a colon.
_RATES = re.compile(
    r"\b(?:giv|rat(?:e|ing)|scor|grad|assign|award|deserv|point)"
    rf"|^\s*{_NUMBER}\s*(?:[.,:;–-]|because|since)|:\s*{_NUMBER}\W*$",
    re.IGNORECASE,
)


def parse_score(text: str) -> int | None:
    """Find the score from 0 to 100 in a judge's reply; None if it is not certain which number is meant.

    A failure is counted and shown; a wrong number would distort the mean unnoticed. Accepted is a number alone on a
    line, after a label, before "/100" or "out of 100", in a JSON object, or as the only number of a sentence that
    rates: `85`, `Score: 85`, `**85**`, `85/100`, `{"score": 85}`, `I'd give it an 85`. A decimal is rounded, half to
    even. Rejected are several different scores, a range (`80-90`), another scale (`8/10`, `0.85`), a value outside
    0-100 (`-5`, `150`), incomplete JSON, and a number that is no rating (`The answer is 4.`). Reasoning between
    `<think>` tags is ignored.

    Example:
        >>> parse_score("Score: 85. It names 2 of 3 vitamins.")
        85
    """
    text = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.DOTALL).replace("−", "-")
    if "{" in text:
        try:
            answer, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        except (ValueError, RecursionError):
            return None
        return _whole_score(answer.get("score"))
    text = _SCALE.sub("", re.sub(r"[*_`#]", "", text)).strip()  # without Markdown
    if _RANGE.search(text):
        return None
    found = {next(filter(None, match.groups())) for match in _MARKED.finditer(text)}
    if not found and _RATES.search(text):
        found = set(re.findall(_NUMBER, text))
    scores = {_whole_score(number) for number in found}
    return scores.pop() if len(scores) == 1 else None


def _whole_score(value: Any) -> int | None:
    """Round to an integer in 0-100; None for anything else, and for a fraction below 1, which is on another scale."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not 0 <= number <= 100 or 0 < number < 1 else round(number)
