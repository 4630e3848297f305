"""The judge that asks a model in Ollama."""

import json
from dataclasses import dataclass
from functools import cached_property

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.openai import OpenAIJudge


@dataclass(eq=False)
class OllamaJudge(OpenAIJudge):
    """A model in Ollama, identified by its digest. No key is sent unless `api_key_env` is set.

    Args:
        model: The name that `ollama pull` takes.
        base_url: Ollama's OpenAI-compatible address; its own API is at the same address without `/v1`.
    """

    kind = "ollama"

    base_url: str = "http://localhost:11434/v1"
    api_key_env: str | None = None

    def check(self) -> None:
        """Look up the model's digest; raise JudgeError if Ollama does not run, InputError if it lacks the model."""
        self._closed.clear()
        self.describe()

    @cached_property
    def digest(self) -> str | None:
        """The digest of the model's manifest, as `ollama list` shows it; None if another server answers."""
        reply = self._reach(f"{self.base_url.removesuffix('/v1')}/api/tags")
        try:
            digests = {model["name"]: model["digest"] for model in json.loads(reply.content)["models"]}
        except (ValueError, LookupError, TypeError):
            return None
        for name in (self.model, f"{self.model}:latest"):
            if name in digests:
                return digests[name]
        models = ", ".join(sorted(digests)) or "no models"
        raise InputError(f"{self.base_url} has {models}. Fetch judge.model={self.model}: ollama pull {self.model}")

    def _remedy(self) -> str:
        return "Start it: ollama serve (or set judge.base_url to its address)."
