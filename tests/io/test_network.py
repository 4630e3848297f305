"""When a request is repeated, and after which pause."""

import re
import socket
import threading
from pathlib import Path

import pytest

from instruct_lm.io import network
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError, UnreachableError
from tests.io.server import SHA256, Server, closed_port, error_500, good, serving


def test_no_server(server: Server, fetcher: Fetcher) -> None:
    with closed_port() as url, pytest.raises(UnreachableError, match=r"cannot be reached .*Connection refused"):
        fetcher.fetch(f"{url}/model.bin")


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("9999", 30.0), ("soon", 0.0)])
def test_retry_after_is_kept_to_within_the_bound(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, seconds: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(network, "MAX_WAIT", 30)
    server.faults = [lambda h: h.answer(429, Retry_After=header)]
    Fetcher(tmp_path).fetch(f"{server.url}/model.bin")
    assert pauses == [seconds]


def test_pauses_double_with_jitter(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for name, value in {"RETRIES": 5, "BACKOFF": 2, "MAX_WAIT": 20}.items():
        monkeypatch.setattr(network, name, value)
    server.default = error_500
    with pytest.raises(DownloadError, match="HTTP 500"):
        Fetcher(tmp_path).fetch(f"{server.url}/model.bin")
    assert len(pauses) == 5
    for pause, full in zip(pauses, [2, 4, 8, 16, 32], strict=True):
        assert full / 2 <= pause <= min(full, 20)


@pytest.fixture
def knocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts to which a connection is tried before the first request."""
    connect, tried = socket.create_connection, []

    def noting(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        return connect(address, timeout)

    monkeypatch.setattr("instruct_lm.io.network.socket.create_connection", noting)
    return tried


def test_hosts_out_of_reach_are_each_tried_twice_and_reported_in_one_message(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, knocks: list[str]
) -> None:
    sources = {"hf:a/b@1/model.gguf": None, "hf:a/b@1/merges.txt": SHA256, "hf:a/c@2": None}
    server.head = good
    sources |= {"https://nowhere.invalid/data.json": None, f"{server.url}/small.bin": None}
    with closed_port() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(UnreachableError) as raised:
            fetcher.fetch_all(sources)
    assert sorted(knocks) == ["127.0.0.1"] * 3 + ["nowhere.invalid"] * 2  # the server's own once
    assert server.requests == []
    message = str(raised.value)
    assert message.startswith("5 sources are missing, 4 of them cannot be fetched:\n")
    for place in ("hf/a/b/1/model.gguf", "hf/a/b/1/merges.txt", "https/nowhere.invalid/data.json"):
        assert f"by hand: put it at {fetcher.cache_dir / place}\n" in message
    assert re.search(rf"put config.json, model.safetensors .*tokenizer.json.* {fetcher.cache_dir}/hf/a/c/2\n", message)
    assert re.search(r"small.bin: not fetched yet\n.*\n  by hand: put it at .*small.bin\n", message)
    assert re.search(
        r"Ways on:\n.*export HF_ENDPOINT=https://hf-mirror\.com, then the same command\n.*mirror=https://", message
    )


def test_a_name_server_that_does_not_answer_holds_nothing_up(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def hang(*_: object, **__: object) -> None:
        answered.wait(60)
        raise TimeoutError

    monkeypatch.setattr("instruct_lm.io.network.socket.create_connection", hang)
    monkeypatch.setattr(network, "FIRST_CONTACT", 0.1)
    with pytest.raises(UnreachableError, match=r"one.invalid cannot be reached \(no connection within 0.1 s\)"):
        fetcher.fetch_all({"https://one.invalid/a": None, "https://two.invalid/b": None})
    answered.set()


def test_a_proxy_out_of_reach_is_named(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as url:
        monkeypatch.setenv("https_proxy", f"http://someone:secret@{url.removeprefix('http://')}")
        with pytest.raises(UnreachableError, match=r"nowhere.invalid cannot be reached \(proxy 127.0.0.1:") as raised:
            fetcher.fetch("https://nowhere.invalid/model.bin")
    assert "secret" not in str(raised.value)


def test_a_proxy_that_refuses_ends_it_at_the_second_attempt(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setenv("https_proxy", server.url)  # answers CONNECT by 501
    with pytest.raises(UnreachableError, match=r"nowhere.invalid cannot be reached \(Tunnel connection failed: 501"):
        fetcher.fetch_all({"https://nowhere.invalid/a.bin": None, "https://nowhere.invalid/b.bin": None})
    assert len(pauses) == 1


def test_a_file_store_out_of_reach_ends_it_at_the_second_attempt(server: Server, fetcher: Fetcher) -> None:
    with closed_port() as url:
        server.default = lambda h: h.answer(302, Location=f"{url}/blob")
        with pytest.raises(UnreachableError, match=f"{url.removeprefix('http://')} cannot be reached"):
            fetcher.fetch(f"{server.url}/model.bin")
    assert len(server.requests) == 2


def test_a_host_that_has_answered_before_gets_all_retries(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    with serving() as server:
        fetcher.fetch(f"{server.url}/model.bin")
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(DownloadError, match=r"Connection refused.*\(attempts: 3\)") as raised:
        fetcher.fetch(f"{server.url}/other.bin")
    assert not isinstance(raised.value, UnreachableError)
    assert len(pauses) == network.RETRIES


def test_a_token_in_an_address_is_not_logged(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_answered", {network.host_of(server.url)})
    server.default = server.head = lambda h: h.answer(503, b"")
    with caplog.at_level("INFO"), pytest.raises(DownloadError):
        network.remote_size(f"{server.url}/file.json?token=abcde", None, "")
    assert "file.json: HTTP 503" in caplog.text
    assert "abcde" not in caplog.text
