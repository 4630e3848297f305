"""Judges: what scores a model's answer from 0 to 100 against the reference answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from instruct_lm.errors import InputError, RunError
from instruct_lm.evaluation.metrics import chrf, exact_match

Entry = Mapping[str, str]

# Chapter 7.8 of the book; {input} is the entry in its prompt style.
BOOK_PROMPT = (
    "Given the input `{input}` and correct output `{output}`, score the model response `{response}` "
    "on a scale from 0 to 100, where 100 is the best score. Respond with the integer number only."
)


class JudgeError(RunError):
    """The judge cannot be asked (no server, no key accepted); the message names the remedy."""


@dataclass(frozen=True)
class Verdict:
    """What a judge made of one answer.

    Attributes:
        score: 0-100, or None if there is none.
        reason: Why there is no score; None if there is one.
        raw: The judge's own words; None if it gave no answer (and may be asked again), or needs no words.
        unreachable: No connection, key or model: what would meet every other entry alike.
    """

    score: int | float | None
    reason: str | None = None
    raw: str | None = None
    unreachable: bool = False


class Judge(Protocol):
    """Scores answers. `score` is called from several threads at once."""

    def describe(self) -> dict[str, Any]:
        """All that shapes the scores (kind, server, model, digest, prompt, …), as JSON values and without secrets."""

    def check(self) -> None:
        """Raise InputError or JudgeError with the remedy if the judge cannot be asked."""

    def score(self, entry: Entry, response: str) -> Verdict:
        """Score `response` to an entry with the keys `instruction`, `input` and `output`."""

    def close(self) -> None:
        """Stop waiting for another attempt and free what the judge holds; `check` opens it again."""


class ReferenceJudge:
    """Compares with the reference answer, offline: the mean of exact match × 100 and chrF."""

    def describe(self) -> dict[str, Any]:
        """The formula."""
        return {"kind": "reference", "score": "mean of exact match x 100 and sentence chrF"}

    def check(self) -> None:
        """Nothing to check."""

    def score(self, entry: Entry, response: str) -> Verdict:
        """Score against `entry["output"]`; always a number."""
        return Verdict((100.0 * exact_match(response, entry["output"]) + chrf(response, entry["output"])) / 2)

    def close(self) -> None:
        """Nothing to free."""


def make_judge(
    kind: str,
    format_prompt: Callable[[Entry], str],
    *,
    model: str | Path | None = None,
    base_url: str | None = None,
    prompt: str | None = None,
    timeout: float | None = None,
    api_key_env: str | None = "OPENAI_API_KEY",
    **options: Any,
) -> Judge | None:
    """The judge of a configuration.

    Args:
        kind: `reference`, `ollama`, `openai`, `llamacpp` or `none`.
        format_prompt: Entry to prompt text, as the answering model saw it.
        model: Name on the server, or the GGUF file of `llamacpp`; None: `llama3` for `ollama`.
        base_url: Server address of `ollama` and `openai`; None: where these live by default.
        prompt: The question; None: the book's.
        timeout: Seconds to wait for an answer; None: the judge's own default.
        api_key_env: Environment variable with the key of `openai`; the other judges are sent none.
        **options: What `OpenAIJudge` takes besides: `temperature`, `seed`, `max_tokens`, `retries`, `backoff`,
            `structured`. Ignored by `reference` and `none`.

    Returns:
        The judge, to be closed after use; None for `none`.

    Raises:
        InputError: An unknown kind, a missing model, or a value that the judge cannot use.
    """
    if kind == "none":
        return None
    if kind == "reference":
        return ReferenceJudge()
    from instruct_lm.evaluation.judges.local import LlamaCppJudge, OllamaJudge
    from instruct_lm.evaluation.judges.openai import OpenAIJudge

    options |= {key: value for key, value in {"prompt": prompt, "timeout": timeout}.items() if value is not None}
    address: dict[str, Any] = {"base_url": base_url} if base_url is not None else {}
    if kind == "ollama":
        return OllamaJudge(str(model or "llama3"), format_prompt, **address, **options)
    if kind not in ("openai", "llamacpp"):
        raise InputError(f"judge={kind}: unknown; choose reference, ollama, openai, llamacpp or none")
    if model is None:
        what = "the model's name on the server" if kind == "openai" else "the path of a GGUF file"
        raise InputError(f"judge.model is not set: judge={kind} needs {what}")
    if kind == "openai":
        return OpenAIJudge(str(model), format_prompt, api_key_env=api_key_env, **address, **options)
    return LlamaCppJudge(model, format_prompt, **options)
