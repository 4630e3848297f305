"""The score in the words of a judge."""

import json
import re
from typing import Any

_NUMBER = r"(?<![\w.,])([-+]?[0-9]+(?:[.,][0-9]+)*)(?!\w|[.,][0-9])"
_OF_100 = r"\s*(?:/|(?:out\s+)?of)\s*100(?![0-9])"
_VALUE = rf"{_NUMBER}(?:{_OF_100})?(?!\s*(?:/|(?:out\s+)?of)\s*[0-9])"
_MARKED = re.compile(
    rf"^[ \t\"'(]*{_VALUE}[ \t\"').!%]*$"  # a line of its own
    rf"|\b(?:score|rating|grade)\s*(?:(?::|=|is|of|would be)\s*){{1,3}}{_VALUE}"
    rf"|{_NUMBER}{_OF_100}",
    re.IGNORECASE | re.MULTILINE,
)
_SCALE = re.compile(r"\b0\s*(?:to|[-–])\s*100\b|\b100 is the best\b", re.IGNORECASE)  # the question, repeated
_RANGE = re.compile(r"[0-9]\s*(?:to|[-–])\s*[0-9]", re.IGNORECASE)
_LONE = re.compile(  # what makes the only number of a text a score
    r"\b(?:giv|rat(?:e|ing)|scor|grad|assign|award|deserv|point)"
    rf"|^\s*{_NUMBER}\s*(?:[.,:;–-]|because|since)|:\s*{_NUMBER}\W*$",
    re.IGNORECASE,
)


def _whole_score(value: Any) -> int | None:
    """Round to an integer in 0-100; None for anything else, and for a fraction of 1, which is another scale."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not 0 <= number <= 100 or 0 < number < 1 else round(number)


def parse_score(text: str) -> int | None:
    """The score in a judge's answer, or None: better a failure that is counted than a number it did not mean.

    The number may stand alone on a line, after a label, before "/100" or "out of 100", in a JSON object, or as the only
    number of a sentence that rates: `85`, `Score: 85`, `**85**`, `85/100`, `{"score": 85}`, `I'd give it an 85`.
    A decimal is rounded, half to even. Rejected: several different scores, a range (`80-90`), another scale (`8/10`,
    `0.85`), a value outside 0-100 (`-5`, `150`), JSON that is cut short, and a number that is no rating (`The answer
    is 4.`). Reasoning between `<think>` tags is skipped.
    """
    text = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.DOTALL).replace("−", "-")
    if "{" in text:
        try:
            answer, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        except (ValueError, RecursionError):
            return None
        return _whole_score(answer.get("score"))
    text = _SCALE.sub("", re.sub(r"[*_`#]", "", text)).strip()
    if _RANGE.search(text):
        return None
    found = {next(filter(None, match.groups())) for match in _MARKED.finditer(text)}
    if not found and _LONE.search(text):
        found = set(re.findall(_NUMBER, text))
    scores = {_whole_score(number) for number in found}
    return scores.pop() if len(scores) == 1 else None
