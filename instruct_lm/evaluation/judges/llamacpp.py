"""The judge that asks a GGUF file, run by llama.cpp in this process."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Verdict
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.io.files import sha256_of

N_CTX = 4096  # most tokens of a question with its reply; longer ones fail with that reason


@dataclass(eq=False)
class LlamaCppJudge(OpenAIJudge):
    """A GGUF file, run by llama.cpp's server in this process on a free local port (extra `llamacpp`).

    It answers one question at a time and keeps no prompt cache, so that a score depends neither on the order of the
    questions nor on interruptions. `check` loads the model and must come first.

    Args:
        model: Path of the GGUF file.
        base_url: Not used, as `api_key_env`: the judge asks its own server.

    Raises:
        InputError: `model` is no file, or xllamacpp is not installed.
    """

    kind = "llamacpp"
    timeouts = 1  # no network that may fail: the same question takes the same time

    def __post_init__(self) -> None:
        self.path = Path(self.model)
        if not self.path.is_file():
            raise InputError(f"judge.model={self.path}: no such file; give the path of a GGUF file")
        try:
            import xllamacpp
        except ImportError as error:
            remedy = "in the repository: pip install -e '.[llamacpp]'"
            raise InputError(f"judge=llamacpp needs xllamacpp, {remedy}") from error
        # check() adds the port to base_url
        self.model, self.base_url, self.api_key_env = self.path.name, "http://127.0.0.1/v1", None
        super().__post_init__()
        self.server = f"xllamacpp {xllamacpp.__version__}, in this process"
        self._xllamacpp = xllamacpp
        self._server: Any = None  # xllamacpp.Server while it runs
        self._one_at_a_time = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return f"sha256:{sha256_of(self.path)}"

    def check(self) -> None:
        """Load the file and start the server, unless it runs."""
        self._closed.clear()
        with self._one_at_a_time:
            if self._server is not None:
                return
            params = self._xllamacpp.CommonParams()
            params.model.path = str(self.path)
            params.n_ctx, params.n_parallel, params.cache_prompt = N_CTX, 1, False
            params.verbosity = -1
            try:
                self._server = self._xllamacpp.Server(params)
            except Exception as error:  # llama.cpp's exceptions have no common type
                raise InputError(f"judge.model={self.path}: llama.cpp cannot load it ({error})") from error
            self.base_url = f"{self._server.listening_address}/v1"
            # Wait until its task loop runs: llama.cpp hangs forever if it is stopped before.
            self._reach(f"{self._server.listening_address}/slots")

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """Score after the questions before this one; fails at once after `close`."""
        with self._one_at_a_time:
            if self._server is None or self._closed.is_set():
                return Verdict(None, "llama.cpp does not run: call check()", unreachable=True, again=True)
            return super().score(entry, response)

    def _extras(self) -> dict[str, Any]:
        """Without thinking, as llama.cpp's templates know it too."""
        off = {"chat_template_kwargs": {"enable_thinking": False}} if self.reasoning_effort == "none" else {}
        return {**super()._extras(), **off}

    def close(self) -> None:
        """Wait for the question in progress (llama.cpp would hang otherwise), then stop the server, free the model."""
        super().close()
        with self._one_at_a_time:
            self._server = None
