"""Parsing the score out of a judge's reply."""

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from instruct_lm.evaluation.judges.reasoning import answer_of

Scale = tuple[float, float]

PERCENT: Scale = (0, 100)
"""The scale of the book's question, and of every score in the results."""

MAX_OBJECTS = 50  # JSON objects looked at in one reply

# A letter of a script that puts blanks between words: "3km" is no number, "85分" is.
_LETTER = r"[^\W\d\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_NUMBER = rf"(?<!{_LETTER})(?<!{_LETTER}-)(?<![\d.,_])([-+]?[0-9]+(?:[.,][0-9]+)*)(?!{_LETTER}|[_+]|[.,]?[0-9])"
_UNIT = r"(?:\s*(?:points?|pts|punkte?|puntos|points|балл\w*|[分点點점]))?"
_OF = r"\s*(?:/|\b(?:out\s+)?of\b|\b(?:over|von|sur|sobre|de|из|su)\b)\s*(?:a\s+(?:possible|total\s+of)\s+)?"
# What makes of a number a range or a revision: "80 or 90", "85 → 90", "85, 90".
_GOES_ON = (
    r"(?![^\S\n]*(?:[,;&|~〜～…/→⇒=-]|->|=>|\.\.+|\b(?:and|or|to|und|oder|et|ou|y|o)\b|[或和至到、])?[^\S\n]*[-+]?[0-9])"
    r"(?!\s*\?)"
)
# "85 for accuracy and 90 for style" rates parts of the answer.
_PARTS = r"(?!\s+(?:for|in|on)\b[^0-9.\n]{1,40}[0-9]+\S{0,4}\s+(?:for|in|on)\b)"
# "3 out of 5 items" counts items.
_NO_NOUN = (
    r"(?![^\S\n]+(?!points|pts|punkt|puntos|punti|pontos|stars|because|since|for\b|due|given|based|overall|here|and\b"
    r"|but\b|with\b)[a-z]{3,})"
)
_HYPOTHETICAL = r"(?!\s+(?:would|could|might|means|indicates|represents|requires|is\s+(?:the\s+)?(?:best|max|perfect)))"

_WORDS = (
    r"\b(?:score|rating|rated|grade|mark|evaluation|assessment|verdict|judge?ment|result(?=\s*\])|bewertung"
    r"|(?:gesamt)?punktzahl|punteggio|puntuación|puntaje|calificación|pontuação|skor|puan|điểm|ocena|betyg|cijfer|оценка|балл|स्कोर|الدرجة|النتيجة)"
)
_CJK_WORDS = r"得分|分数|分數|评分|評分|打分|总分|總分|スコア|点数|評価|採点(?:結果)?|得点|評点|总评|점수|평점"
_SEPARATORS = r"(?:(?:[:=|\])】]|\s[-–—]\s|\bis\b|\bof\b|[-=]>|[→⇒]|\b(?:would|should) be\b|为|是|は|는|\[\[?)\s*)"
_ASIDE = (
    r"(?:\s*\([^()]*\))?(?:\s+(?:finale?|globale?|total|końcowa))?(?:\s+(?:for|of)\s[^0-9\n:.]{0,60}(?=[:=])"
    r"|\s+for\s+(?:the|this|that)\s+(?:model(?:['’]s)?\s+)?(?:response|answer|reply)(?=\s+is\b))?[\"'”]?\s*"
)
_LABEL = rf"(?:{_WORDS}{_ASIDE}{_SEPARATORS}{{1,3}}|(?:{_CJK_WORDS}){_ASIDE}{_SEPARATORS}{{0,3}})[\"'“(\[]*"
_TENTATIVE = re.compile(
    r"\b(?:draft|initial|preliminary|tentative|provisional|first|previous|perfect|max(?:imum)?|min(?:imum)?|full|best"
    r"|highest|lowest|top|possible|average|passing|baseline|confidence|similarity|bleu|rouge(?:-\w)?|chrf|f1)\s*$",
    re.IGNORECASE,
)
# What a number counts: "names 3 out of 5".
_COUNTS = re.compile(
    r"\b(?:names?|lists?|mentions?|includes?|has|have|contains?|covers?|shows?|provides?|gets?|got|only|of|the)\s+$",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"\A\W{0,9}(?:overall|final)\b|\b(?:final|overall)\b[^0-9\n:=]{0,30}$|\\boxed|\[{2}|\[\s*(?:result|score)\s*\]|最终|最終|总分|總分|総合",
    re.IGNORECASE,
)
_RANGE = re.compile(r"[0-9]\s*%?\s*(?:\bto\b|[-–—~〜～至到→⇒]|->|=>|\.\.+)\s*[0-9]|\bbetween\s+[0-9]", re.IGNORECASE)
_REVISES = re.compile(
    r"(?:\b(?:wait|hmm+|actually|on second thought|revis\w+|reconsider\w*|make (?:it|that))\b|\bno,|\bcorrection:)"
    r"[^0-9\n]{0,60}[0-9]",
    re.IGNORECASE,
)
# A sentence in which a rater names one number: "I'd give it an 85."
_RATES = (
    r"(?:\bI(?:['’](?:d|ll)|\s+(?:would|will|shall|can|must))?\s+(?:\w+\s+)?"
    r"(?:give|rate|score|grade|assign|award|say|go\s+with)\b"
    r"|\b(?:response|answer|reply|output|model|it|this|which)\b[^0-9\n.]{0,60}?\b"
    r"(?:deserves|merits|earns|receives|scores|is\s+(?:rated|scored|graded|awarded|assigned|given|worth)))"
    r"[^0-9\n.]{0,80}?"
)
_UNREAL = re.compile(r"\b(?:not|never|if|unless|without)\b|n['’]t\b", re.IGNORECASE)  # "I would not give it 85."
_ENDS = r"(?=\s*(?:[.,;:!?)%\"'”\n]|$|points?\b|because\b|since\b|as\b|due\b|given\b|on\b|overall\b|here\b|-|–|—))"


def parse_score(reply: str, scale: Scale = PERCENT) -> float | None:
    """Find the score in a judge's reply; None if it is not certain which number is meant.

    A failure is counted and shown; a wrong number would distort the mean unnoticed. What a thinking model writes before
    its answer does not count. Accepted is a number alone on a line, after a label in one of several languages, before
    "/100" or "out of 100", boxed, in a JSON object, or as the only number of a sentence that rates: `85`, `Score: 85`,
    `**85**`, `85/100`, `{"Score": "85"}`, `\\boxed{85}`, `得分：85`, `85,0`, `I'd give it an 85`. A number that is
    boxed, or called final or overall, goes before others. Rejected are several different scores, a range (`80-90`) or
    a revision (`85 → 90`), another scale (`8/10`, `0.85`), a value outside the scale (`-5`, `150`), incomplete JSON,
    and a number that is no rating (`The answer is 4.`).

    Args:
        reply: The judge's words.
        scale: The lowest and the highest score.

    Returns:
        The score on that scale; on the scale from 0 to 100 an integer, half to even.

    Example:
        >>> parse_score("Score: 85. It names 2 of 3 vitamins.")
        85
        >>> parse_score('{"feedback": "Right, but long.", "score": 4}', (1, 5))
        4.0
    """
    answer = answer_of(reply)
    found = {_on_scale(value, scale) for value in _candidates(answer, scale)}
    return found.pop() if len(found) == 1 else None


def parse_feedback(reply: str) -> str:
    """The words of a judge's answer: a text of its JSON object, or else the whole answer; no reasoning."""
    answer = answer_of(reply)
    for item in _objects(answer)[0]:
        for key, value in item.items():
            if _plain(key) in _FEEDBACK and isinstance(value, str):
                return value.strip()
    return answer


def _candidates(answer: str, scale: Scale) -> list[Any]:
    """What the answer states as its score: several values if it is not certain, among them None for an unusable one."""
    objects, rest = _objects(answer)
    if rest is None or (objects and _REVISES.search(rest)):
        return []
    if objects:
        return [value for item in objects for value in _stated(item, scale)]
    text = _normalise(answer)
    unscaled = _scale_words(scale).sub(" ", text)
    if _RANGE.search(unscaled) or _REVISES.search(unscaled):
        return []
    ordinary: list[Any] = []
    final: list[Any] = []
    for match in _marked(scale).finditer(unscaled):
        before = unscaled[max(0, match.start() - 60) : match.start()]
        if _COUNTS.search(before) and re.match(r"[0-9]", match[0]):
            continue
        if _TENTATIVE.search(before):
            ordinary.append(None)
            continue
        is_final = _FINAL.search(before.rpartition("\n")[2]) or _FINAL.search(match[0])
        (final if is_final else ordinary).append(next(filter(None, match.groups())))
    return final or ordinary or _rated(unscaled)


@lru_cache
def _marked(scale: Scale) -> re.Pattern[str]:
    """A number marked as the score: alone on its line, after a label, boxed, or before "/100"."""
    of = rf"{_UNIT}{_OF}{scale[1]:g}(?![0-9])"
    score = rf"{_NUMBER}(?:{of})?{_UNIT}(?!{_OF}[0-9]){_GOES_ON}{_PARTS}{_HYPOTHETICAL}"
    percent, stars = ("%", "") if scale == PERCENT else ("", r"(?:[ \t]*stars?)?")
    score += r"(?!\s*(?:stars?\b|★|⭐))" if percent else r"(?!\s*%)"
    ends = rf"{_UNIT}{stars}[ \t\"'”)\]】.!|{percent}]*$"
    return re.compile(
        rf"^[ \t\"'“(\[【]*(?!1?[0-9]\)){score}(?:です)?{ends}"
        rf"|^[^\w\n]{{0,9}}(?:overall|total|final answer|итог|合計)\s*[:|=]\s*{score}{ends}"
        rf"|{_LABEL}\s*{score}"
        rf"|\b(?:note|nota|voto)\s*:\s*{score}[ \t.]*$"  # also "remark"
        rf"|\\boxed\s+{score}"
        rf"|[打给給]出?\s*{_NUMBER}\s*分"
        rf"|{_NUMBER}{of}{_NO_NOUN}{_GOES_ON}",
        re.IGNORECASE | re.MULTILINE,
    )


@lru_cache
def _scale_words(scale: Scale) -> re.Pattern[str]:
    """Words that repeat the question's scale: "from 0 to 100", "100 is the best", "(out of 100)", "满分100"."""
    low, high = (re.escape(f"{end:g}") for end in scale)
    return re.compile(
        rf"(?<![\d.]){low}\s*(?:\bto\b|\band\b|[-–—~〜～至到])\s*{high}(?![\d.])"
        rf"|\b{high} (?:is|being) (?:the )?(?:best|high\w*|max\w*)"
        rf"|满分\s*[为是:]?\s*{high}\s*分?|{high}\s*点満点(?:中)?|\bout of (?:a )?possible {high}\b"
        rf"|\(\s*(?:out\s+of|/|from)\s*{high}[^()\n]*\)|(?:/|\b(?:rating|score)\s+out\s+of)\s*{high}(?=\s*[:=])",
        re.IGNORECASE,
    )


def _rated(text: str) -> list[Any]:
    """The only number of a text, if a sentence rates with it or it begins the text."""
    numbers = re.findall(_NUMBER, text)
    if len(set(numbers)) != 1 or re.search(rf"[0-9]{_UNIT}{_OF}[0-9]", text):
        return []
    begins = re.match(rf"\s*{_NUMBER}\s*(?:[.,:;(–—-]|\bbecause\b|\bsince\b)", text)
    if begins and not re.match(r"\s*1[.)]\s", text):  # "1. The response …" begins a list
        return numbers[:1]
    rates = re.search(rf"{_RATES}{_NUMBER}{_ENDS}", text, re.IGNORECASE)
    return numbers[:1] if rates and not _UNREAL.search(text[: rates.end()].rpartition("\n")[2]) else []


def _normalise(text: str) -> str:
    """ASCII digits and punctuation, without Markdown, LaTeX and tags, of which the marks of a score stay."""
    ascii_of = {ord(char): str(unicodedata.decimal(char)) for char in set(text) if char.isdecimal()}
    ascii_of |= {code + 0xFEE0: chr(code) for code in range(0x21, 0x7F)}  # full width
    text = text.translate(ascii_of | {ord("。"): ".", ord("−"): "-", ord("٫"): ".", ord("\u00a0"): " "})
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathbf|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r" \\boxed \1 ", text)
    text = re.sub(r"\$+([^$\n]*)\$+", r"\1", text)  # a single one is a currency
    text = re.sub(r"\\[()\[\]]|^\$\$$|\\%", lambda match: "%" if match[0] == "\\%" else "", text, flags=re.MULTILINE)
    text = re.sub(r"<\s*(?:score|rating|grade)\s*>", "final score: ", text, flags=re.IGNORECASE)
    text = re.sub(r"<[|/]?[a-zA-Z][\w ]*[|/]?>", "", text)
    text = re.sub(r"^[ \t]*(?:#+|>+)(?=\s)", "", text, flags=re.MULTILINE)  # headings, quotations
    return re.sub(r"[*`]", "", text).replace("_", " ").strip()


_KEYS = {"score", "rating", "grade", "mark", "finalscore", "overallscore", "finalrating", "overallrating", "totalscore"}
_KEYS |= {
    "scoreoutof100",
    "evaluationscore",
    "qualityscore",
    "modelscore",
    "responsescore",
    "modelresponsescore",
    "evaluation",
    "points",
    "overall",
    "得分",
    "分数",
    "评分",
    "スコア",
    "점수",
}
_FEEDBACK = {"feedback", "explanation", "reason", "reasoning", "rationale", "comment", "justification"}
_SCALES = {"maxscore", "max", "maximum", "outof", "scale", "total", "maxpoints", "scoremax"}


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key).casefold()


def _objects(answer: str) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON objects of an answer, in order, and the text after them; None if one is incomplete."""
    objects: list[dict[str, Any]] = []
    decoder, at, end = json.JSONDecoder(), 0, 0
    for _ in range(MAX_OBJECTS):
        at = answer.find("{", at)
        if at < 0:
            return objects, answer[end:]
        try:
            item, at = decoder.raw_decode(answer, at)
            objects.append(item)
            end = at
        except (ValueError, RecursionError):
            flat = re.compile(r"\{[^{}]*\}").match(answer, at)
            if flat and (pairs := dict(_loose_pairs(flat[0]))):
                objects.append(pairs)
            elif re.compile(r"\{\s*(?:[\"'{]|$)").match(answer, at):
                return [], None
            at = end = flat.end() if flat else at + 1
    return [], None


def _loose_pairs(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of what Python or JavaScript would write: {'score': 85}, {score: 85,}."""
    for match in re.finditer(r"[{,]\s*([\"']?)(\w+)\1\s*:\s*(\"[^\"]*\"|'[^']*'|[^,{}\"']*?)\s*(?=[,}])", text):
        yield match[2], match[3].strip("\"'")


def _stated(item: dict[str, Any], scale: Scale) -> list[Any]:
    """The scores of an object, or else of the objects in it; [None] if it states another scale."""
    keys = {_plain(key): value for key, value in item.items()}
    for key in _SCALES & keys.keys():
        ends = re.findall(r"[0-9]+(?:\.[0-9]+)?", str(keys[key]))
        if ends and float(ends[-1]) != scale[1]:
            return [None]
    if scores := [value for key, value in keys.items() if key in _KEYS and not isinstance(value, (dict, list))]:
        return [_text_score(value, scale) if isinstance(value, str) else value for value in scores]
    inner = [value for value in item.values() if isinstance(value, dict)]
    inner += [entry for value in item.values() if isinstance(value, list) for entry in value if isinstance(entry, dict)]
    found = [value for nested in inner for value in _stated(nested, scale)]
    if not found:  # {"score": {"value": 85}}, {"score": [85]}
        for key in _KEYS & keys.keys():
            values = keys[key].values() if isinstance(keys[key], dict) else keys[key]
            found += [value for value in values if not isinstance(value, (dict, list))]
    return found


def _text_score(text: str, scale: Scale) -> Any:
    found = {_on_scale(value, scale) for value in (_candidates(text, scale) if "{" not in text else [])}
    return found.pop() if len(found) == 1 else None


def _on_scale(value: Any, scale: Scale) -> float | None:
    """The number if it lies on the scale; a fraction below 1 is on another one unless this one ends there."""
    if isinstance(value, str):  # 85,0 is 85; 85,5 may be two scores
        value = re.sub(r",(?=0{1,2}$)", ".", value.strip())
        value = None if re.search(r"\.[0-9]{3}$", value) else value  # 1.000 may be a thousand
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    low, high = scale
    if isinstance(value, bool) or not low <= number <= high or 0 < number < 1 < high:
        return None
    return round(number) if scale == PERCENT else number
