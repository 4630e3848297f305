"""The judge of a configuration."""

from collections.abc import Callable
from typing import Any

from instruct_lm.evaluation.judges.base import Judge
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.ollama import OllamaJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.reference import ReferenceJudge

JUDGES: dict[str, Callable[..., Judge]] = {
    "reference": ReferenceJudge,
    "ollama": OllamaJudge,
    "openai": OpenAIJudge,
    "llamacpp": LlamaCppJudge,
}
"""The names in `JudgeConfig.kind`, without `none`."""


def make_judge(kind: str, **options: Any) -> Judge | None:
    """Make the judge of a configuration, which `config.py` has checked.

    Args:
        kind: A name in `JUDGES`, or `none`.
        **options: Fields of `OpenAIJudge`, such as `model`, `format_prompt` and `timeout`; unused by `reference`.

    Returns:
        The judge, to be closed after use; None for `none`.

    Raises:
        InputError: A value that the judge cannot use.
    """
    return None if kind == "none" else JUDGES[kind](**options)
