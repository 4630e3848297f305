"""A local server, a cache in a temporary folder, and no pauses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from instruct_lm.io import network
from instruct_lm.io.fetcher import Fetcher
from tests.io.server import Server, serving


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    for name in ("HF_ENDPOINT", "HF_TOKEN", "XDG_CACHE_HOME", *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for name, value in {"TIMEOUT": (10, 10), "RETRIES": 2, "BACKOFF": 0, "MAX_WAIT": 0}.items():
        monkeypatch.setattr(network, name, value)
    monkeypatch.setattr(network, "_answered", set())  # a new process


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher(cache_dir=tmp_path / "cache")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TIMEOUT", (10, 0.2))
