"""The judge of a configuration."""

from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.ollama import OllamaJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.reference import ReferenceJudge

MODELS = {"ollama": OllamaJudge, "openai": OpenAIJudge, "llamacpp": LlamaCppJudge}


def make_judge(kind: str, *, model: str | None = None, base_url: str | None = None, **options: Any) -> Judge | None:
    """Make the judge of a configuration.

    Args:
        kind: `reference`, `ollama`, `openai`, `llamacpp` or `none`.
        model: The model's name on the server, or the GGUF file of `llamacpp`; None only without a model.
        base_url: Address of the server of `ollama` or `openai`; None: their usual address.
        **options: Further fields of `OpenAIJudge`, such as `format_prompt` and `timeout`; unused by `reference`.

    Returns:
        The judge, to be closed after use; None for `none`.

    Raises:
        InputError: A missing model, or a value that the judge cannot use.
    """
    if kind == "none":
        return None
    if kind == "reference":
        return ReferenceJudge()
    if model is None:
        raise InputError("judge.model is not set: give a model's name, or for llamacpp the path of a GGUF file")
    if base_url is not None:
        options["base_url"] = base_url
    return MODELS[kind](model, **options)
