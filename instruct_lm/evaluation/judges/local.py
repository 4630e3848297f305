"""Judges on this machine: a model in Ollama, or a GGUF file in this process."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Entry, Verdict
from instruct_lm.evaluation.judges.openai import OpenAIJudge

OLLAMA_URL = "http://localhost:11434/v1"


class OllamaJudge(OpenAIJudge):
    """A model in a local Ollama, known by its digest. It is sent no key.

    Args:
        model: The name that `ollama pull` takes.
        format_prompt: As in `OpenAIJudge`.
        base_url: Ollama's OpenAI-compatible address; its own API is looked for beside it.
        **options: As in `OpenAIJudge`.
    """

    kind = "ollama"

    def __init__(
        self, model: str, format_prompt: Callable[[Entry], str], *, base_url: str = OLLAMA_URL, **options: Any
    ) -> None:
        super().__init__(model, format_prompt, base_url=base_url, api_key_env=None, **options)
        self._digest: str | None = None
        self._looked_up = False

    def check(self) -> None:
        """Raise JudgeError if Ollama does not run, InputError if it has no such model."""
        self._closed.clear()
        reply = self._reach(f"{self.base_url.removesuffix('/v1')}/api/tags")
        self._looked_up = True
        try:
            digests = {model["name"]: model["digest"] for model in json.loads(reply.content)["models"]}
        except (ValueError, LookupError, TypeError):
            return  # another server in Ollama's place: no digests, and the first question tells the rest
        for name in (self.model, f"{self.model}:latest"):
            if name in digests:
                self._digest = digests[name]
                return
        raise InputError(
            f"judge.model={self.model}: not among the models of Ollama at {self.base_url} "
            f"({', '.join(sorted(digests)) or 'it has none'}).\nFetch it: ollama pull {self.model}"
        )

    def digest(self) -> str | None:
        """The digest of the model's manifest, as `ollama list` shows it."""
        if not self._looked_up:
            self.check()
        return self._digest

    def _remedy(self) -> str:
        return "Start it: ollama serve (or point judge.base_url at where it runs)."


class LlamaCppJudge(OpenAIJudge):
    """A GGUF file judged in this process, by llama.cpp's server on a free local port (extra `llamacpp`).

    One question is computed at a time and no prompt cache is kept, so that a score does not depend on the order of
    the questions or on an interruption. Call `check` first: it loads the model.

    Args:
        model: The GGUF file.
        format_prompt: As in `OpenAIJudge`.
        n_ctx: Tokens that a question and its answer may take; longer ones fail with that reason.
        n_threads: CPU threads; None: llama.cpp's choice.
        timeout: Seconds to wait for an answer.
        **options: As in `OpenAIJudge`.

    Raises:
        InputError: `model` is no GGUF file, or xllamacpp is not installed.
    """

    kind = "llamacpp"

    def __init__(
        self,
        model: str | Path,
        format_prompt: Callable[[Entry], str],
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        timeout: float = 600.0,
        **options: Any,
    ) -> None:
        self.path, self.n_ctx, self.n_threads = Path(model), n_ctx, n_threads
        if not _is_gguf(self.path):
            raise InputError(f"judge.model={model}: not a GGUF file; give the path of one, or choose another judge")
        try:
            import xllamacpp
        except ImportError as error:
            raise InputError("judge=llamacpp needs xllamacpp: pip install 'instruct-lm[llamacpp]'") from error
        self._llama = xllamacpp
        self._running: Any = None  # xllamacpp.Server
        self._digest = ""
        self._one_at_a_time = threading.Lock()  # one slot, so that scores do not depend on what else is computed
        # the port is known once the server runs
        super().__init__(
            self.path.name, format_prompt, base_url="http://127.0.0.1/v1", api_key_env=None, timeout=timeout, **options
        )

    @property
    def server(self) -> str:
        """The library that computes."""
        return f"xllamacpp {self._llama.__version__}, in this process"

    def digest(self) -> str:
        """SHA-256 of the file."""
        if not self._digest:
            sha256 = hashlib.sha256()
            with self.path.open("rb") as file:
                while block := file.read(2**20):
                    sha256.update(block)
            self._digest = f"sha256:{sha256.hexdigest()}"
        return self._digest

    def check(self) -> None:
        """Load the file and start the server, unless it runs."""
        self._closed.clear()
        with self._one_at_a_time:
            if self._running is None:
                params = self._llama.CommonParams()
                params.model.path = str(self.path)
                params.n_ctx, params.n_parallel, params.cache_prompt = self.n_ctx, 1, False
                params.verbosity = -1
                if self.n_threads:
                    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.n_threads
                try:
                    self._running = self._llama.Server(params)
                except Exception as error:  # whatever llama.cpp throws for a file that it cannot read
                    raise InputError(f"judge.model={self.path}: llama.cpp cannot load it ({error})") from error
                self.base_url = f"{self._running.listening_address}/v1"
                # waits for its task loop: llama.cpp hangs for good if it is stopped before that runs
                self._reach(f"{self._running.listening_address}/slots")

    def score(self, entry: Entry, response: str) -> Verdict:
        """Score, once the questions before this one are answered; after `close`, none is."""
        with self._one_at_a_time:
            if self._running is None or self._closed.is_set():
                return Verdict(None, "llama.cpp does not run: call check()", unreachable=True)
            return super().score(entry, response)

    def close(self) -> None:
        """Stop the server and free the model, once the question under way is answered: llama.cpp hangs otherwise."""
        super().close()
        with self._one_at_a_time:
            self._running = None


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
