"""The judge that asks a GGUF file, run by llama.cpp in this process."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Verdict
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.io.files import sha256_of


class LlamaCppJudge(OpenAIJudge):
    """A GGUF file, run by llama.cpp's server in this process on a free local port (extra `llamacpp`).

    It answers one question at a time and keeps no prompt cache, so that a score depends neither on the order of the
    questions nor on interruptions. `check` loads the model and must come first.

    Args:
        model: The GGUF file.
        n_ctx: Most tokens of a question with its reply; longer ones fail with that reason.
        n_threads: CPU threads; None: llama.cpp's default.
        timeout: Seconds to wait for a reply.
        **options: `format_prompt` and further fields of `OpenAIJudge`.

    Raises:
        InputError: `model` is no GGUF file, or xllamacpp is not installed.
    """

    kind = "llamacpp"

    def __init__(
        self,
        model: str | Path,
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        timeout: float = 600,
        **options: Any,
    ) -> None:
        path = Path(model)
        if not _is_gguf(path):
            raise InputError(f"judge.model={model}: not a GGUF file; give the path of one, or choose another judge")
        try:
            import xllamacpp
        except ImportError as error:
            raise InputError("judge=llamacpp needs xllamacpp: pip install 'instruct-lm[llamacpp]'") from error
        # check() adds the port to base_url
        super().__init__(path.name, base_url="http://127.0.0.1/v1", api_key_env=None, timeout=timeout, **options)
        self.path, self.n_ctx, self.n_threads = path, n_ctx, n_threads
        self.server = f"xllamacpp {xllamacpp.__version__}, in this process"
        self._xllamacpp = xllamacpp
        self._server: Any = None  # xllamacpp.Server while it runs
        self._one_at_a_time = threading.Lock()

    def digest(self) -> str:
        """SHA-256 of the file, computed once."""
        self._digest = self._digest or f"sha256:{sha256_of(self.path)}"
        return self._digest

    def check(self) -> None:
        """Load the file and start the server, unless it runs."""
        self._closed.clear()
        with self._one_at_a_time:
            if self._server is not None:
                return
            params = self._xllamacpp.CommonParams()
            params.model.path = str(self.path)
            params.n_ctx, params.n_parallel, params.cache_prompt = self.n_ctx, 1, False
            params.verbosity = -1
            if self.n_threads:
                params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.n_threads
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
                return Verdict(None, "llama.cpp does not run: call check()", unreachable=True)
            return super().score(entry, response)

    def close(self) -> None:
        """Wait for the question in progress (llama.cpp would hang otherwise), then stop the server, free the model."""
        super().close()
        with self._one_at_a_time:
            self._server = None


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
