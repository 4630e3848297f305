"""The judge of a configuration."""

from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.ollama import OllamaJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.reference import ReferenceJudge


def make_judge(
    kind: str,
    *,
    model: str | Path | None = None,
    base_url: str | None = None,
    api_key_env: str | None = "OPENAI_API_KEY",
    **options: Any,
) -> Judge | None:
    """Make the judge of a configuration.

    Args:
        kind: `reference`, `ollama`, `openai`, `llamacpp` or `none`.
        model: The model's name on the server, or the GGUF file of `llamacpp`; None: `llama3` for `ollama`.
        base_url: Address of the server of `ollama` or `openai`; None: their usual address.
        api_key_env: Environment variable that holds the key of `openai`; the other judges send no key.
        **options: Further fields of `OpenAIJudge`, such as `format_prompt` and `timeout`; unused by `reference`.

    Returns:
        The judge, to be closed after use; None for `none`.

    Raises:
        InputError: An unknown kind, a missing model, or a value that the judge cannot use.
    """
    address: dict[str, Any] = {} if base_url is None else {"base_url": base_url}
    match kind:
        case "none":
            return None
        case "reference":
            return ReferenceJudge()
        case "ollama":
            return OllamaJudge(str(model or "llama3"), **address, **options)
        case "openai" if model:
            return OpenAIJudge(str(model), api_key_env=api_key_env, **address, **options)
        case "llamacpp" if model:
            return LlamaCppJudge(model, **options)
        case "openai" | "llamacpp":
            raise InputError("judge.model is not set: openai needs a model's name, llamacpp the path of a GGUF file")
    raise InputError(f"judge={kind}: unknown judge; choose one of conf/judge")
