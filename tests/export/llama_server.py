"""llama.cpp's server on a GGUF file, in the test's process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from urllib3.util import Retry


class LlamaServer:
    """A running server."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy cannot reach it
        retry = Retry(10, backoff_factor=0.1, status_forcelist=[503], allowed_methods=None)
        self.session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))

    def get(self, path: str) -> Any:
        return self._content(self.session.get(self.address + path, timeout=120))

    def post(self, path: str, **body: Any) -> Any:
        return self._content(self.session.post(self.address + path, json=body, timeout=120))

    def _content(self, reply: requests.Response) -> Any:
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.url}: {reply.status_code} {reply.text}")
        return reply.json()

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """What the server makes of a chat: the template, then the tokenizer."""
        prompt = self.post("/apply-template", messages=messages)["prompt"]
        return self.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]


@contextmanager
def served(path: Path, n_ctx: int = 512) -> Iterator[LlamaServer]:
    """Starts llama.cpp's server with the file, one request at a time, with float32 keys and values."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cache_prompt, params.warmup = n_ctx, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # waiting threads spin
    params.verbosity = -1
    server = xllamacpp.Server(params)
    running = LlamaServer(server.listening_address)
    running.get("/slots")  # llama.cpp hangs for ever if it is stopped before its task loop runs
    yield running
    running.session.close()
