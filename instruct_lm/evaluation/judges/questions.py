"""What a judge is asked, and the scale of its answer."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.parsing import PERCENT, Scale

_PLACEHOLDERS = ("prompt", "instruction", "input", "output", "response")
_KNOWN = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)

# Chapter 7.8 of the book.
_SCORE = (
    "Given the input `{prompt}` and correct output `{output}`, score the model response `{response}` "
    "on a scale from 0 to 100, where 100 is the best score. Respond with the integer number only."
)
# After the rubric of the book's author (github.com/rasbt/reasoning-from-scratch, chF/04_llm-judge/ollama-judge.py), in
# words of our own; that one leaves the form of the answer open.
_RUBRIC = """\
Judge how well a response follows an instruction, compared with a reference answer. Use this rubric:

1: It does not do what the instruction asks: it is off the subject, wrong, or far too long.
2: It does a part of it, with major mistakes, gaps or things that do not belong there.
3: It does some of it, but it is incomplete, partly wrong or partly unclear.
4: It does nearly all of it, with only small mistakes, gaps or unclear places.
5: It does all of it: clear, right, to the point, and no longer than it needs to be.

Instruction:
{prompt}

Reference answer:
{output}

Response:
{response}

Write your feedback in one to three sentences, then the score, an integer from 1 to 5. Answer with a JSON object:
{"feedback": "...", "score": ...}"""


@dataclass(frozen=True)
class Question:
    """A text with placeholders, and what it asks for.

    Attributes:
        text: With `{response}`, and any of `{prompt}` (the entry as the answering model saw it), `{instruction}`,
            `{input}` and `{output}` (the reference answer). Other braces are text.
        scale: The lowest and the highest score that it asks for.
        schema: JSON schema of the answer; None: the text asks for a form of its own.
        feedback: Whether it asks for words too.
    """

    text: str
    scale: Scale = PERCENT
    schema: Mapping[str, Any] | None = None
    feedback: bool = False

    def ask(self, entry: Mapping[str, str], response: str, format_prompt: Callable[[Mapping[str, str]], str]) -> str:
        """The text for an answer to an entry."""
        # All at once, so that an answer that contains "{output}" is left as it is.
        parts = {**entry, "prompt": format_prompt(entry), "response": response}
        return re.sub(rf"\{{({'|'.join(_PLACEHOLDERS)})\}}", lambda match: parts[match[1]], self.text)

    def percent(self, score: float) -> float:
        """A score of this scale from 0 to 100, linearly: 4 of 1 to 5 is 75."""
        low, high = self.scale
        return score if self.scale == PERCENT else 100 * (score - low) / (high - low)


def _schema(low: int, high: int, *texts: str) -> dict[str, Any]:
    """An object of texts and then an integer score: a judge gives its reasons before its number."""
    properties: dict[str, Any] = {text: {"type": "string"} for text in texts}
    properties["score"] = {"type": "integer", "minimum": low, "maximum": high}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCORE = Question(_SCORE, PERCENT, _schema(0, 100))
"""The book's question: a number from 0 to 100."""

RUBRIC = Question(_RUBRIC, (1, 5), _schema(1, 5, "feedback"), feedback=True)
"""A feedback, then a number from 1 to 5."""

NAMED = {"score": SCORE, "rubric": RUBRIC}


def read_question(prompt: str | None, scale: Sequence[float] | None = None) -> Question:
    """The question of a configuration.

    Args:
        prompt: `score` (also None), `rubric`, a text with `{response}`, or the path of a file that holds one.
        scale: Lowest and highest score that a text of the user's own asks for; None: 0 to 100.

    Raises:
        InputError: A prompt that is none of these, one without `{response}` or with an unknown placeholder; or a scale
            that is none, or is given for a named prompt.
    """
    if scale is not None and scale[0] >= scale[1]:
        raise InputError(f"judge.scale=[{scale[0]:g},{scale[1]:g}]: give the lowest score, then the highest.")
    named = NAMED.get(prompt or "score")
    if named is not None:
        if scale is not None and tuple(scale) != named.scale:
            low, high = named.scale
            raise InputError(
                f"judge.scale=[{scale[0]:g},{scale[1]:g}] with judge.prompt={prompt or 'score'}, which asks for "
                f"{low:g} to {high:g}: leave judge.scale out, or give a prompt of your own."
            )
        return named
    text, place = str(prompt), "judge.prompt"
    if "{" not in text:
        text, place = _read_text(text), f"judge.prompt={text}"
    if twice := re.search(r"\{\{\s*(\w+)\s*\}\}", text):
        raise InputError(f"{place} has {twice[0]}: write {{{twice[1]}}}, with one pair of braces.")
    unknown = set(re.findall(r"\{([A-Za-z_]\w*)\}", text)) - {*_PLACEHOLDERS}
    if unknown:
        raise InputError(f"{place} has {{{min(unknown)}}}, which is no placeholder. There are {_KNOWN}.")
    if "{response}" not in text:
        raise InputError(f"{place} lacks {{response}}, the answer to judge. Placeholders are {_KNOWN}.")
    return Question(text, PERCENT if scale is None else (scale[0], scale[1]))


def _read_text(path: str) -> str:
    """The text of a file, without blanks at its ends."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(
            f"judge.prompt={path:.200}: {reason}. Give score, rubric, a text with {{response}}, or a file with one."
        ) from error
