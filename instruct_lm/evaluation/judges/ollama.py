"""The judge that asks a model in Ollama."""

import json
from dataclasses import dataclass
from functools import cached_property

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.model_names import find_name, nearest_first
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
        # Ollama does not tell upper from lower case.
        name = find_name(self.model.lower(), [name.lower() for name in digests])
        if name is not None:
            return next(digest for other, digest in digests.items() if other.lower() == name)
        found = nearest_first(self.model, list(digests)) if digests else "It has no models."
        raise InputError(
            f"{self.base_url} lacks judge.model={self.model}. {found} To fetch it: ollama pull {self.model}"
        )

    def _remedy(self) -> str:
        return "Start it: ollama serve (or set judge.base_url to its address)."
