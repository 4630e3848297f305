"""The cache: processes, hashes, tokens, mirrors, local files."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from instruct_lm.errors import InputError
from instruct_lm.io import files
from instruct_lm.io.fetcher import Fetcher
from tests.io.server import (
    BODY,
    SHA256,
    Handler,
    Server,
    error_404,
    error_500,
    good,
    place,
    serving,
    truncate,
    wrong_bytes,
)

CHILD = """
import logging, os, signal, sys
from pathlib import Path
import requests
from instruct_lm.io.fetcher import Fetcher
logging.basicConfig(format="%(message)s")
cache, url, chunks_to_live = sys.argv[1:]
real = requests.Response.iter_content
def iter_content(self, size):
    for i, chunk in enumerate(real(self, size)):
        if i == int(chunks_to_live):
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
requests.Response.iter_content = iter_content
print(Fetcher(Path(cache)).fetch(url))
"""


def child(server: Server, fetcher: Fetcher, chunks_to_live: int = -1) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(fetcher.cache_dir), f"{server.url}/model.bin", str(chunks_to_live)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_a_killed_download_goes_on_in_another_process(server: Server, fetcher: Fetcher) -> None:
    with child(server, fetcher, chunks_to_live=2) as killed:
        killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    path = place(server, fetcher)
    part = path.with_name("model.bin.part").read_bytes()
    assert 0 < len(part) < len(BODY)
    assert part == BODY[: len(part)]
    assert not path.exists()
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert server.requests[1][1]["Range"] == f"bytes={len(part)}-"


def test_two_processes_fetch_a_file_once(server: Server, fetcher: Fetcher) -> None:
    def hold(h: Handler) -> None:
        first_is_here.set()
        h.server.gate.wait(60)
        good(h)

    first_is_here = threading.Event()
    server.faults = [hold]
    with child(server, fetcher) as first:
        assert first_is_here.wait(60)
        with child(server, fetcher) as second:
            assert second.stderr is not None
            assert second.stderr.readline() == "model.bin: another process is fetching it; waiting\n"
            server.gate.set()
            outputs = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert outputs == [str(place(server, fetcher))] * 2
    assert place(server, fetcher).read_bytes() == BODY
    assert len(server.requests) == 1


def test_threads_fetch_a_file_once(server: Server, fetcher: Fetcher) -> None:
    barrier, results = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        results.append(fetcher.fetch(f"{server.url}/model.bin").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 4
    assert len(server.requests) == 1


def test_a_cached_file_needs_no_network_and_is_hashed_once_in_a_process(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetcher.fetch(f"{server.url}/model.bin")
    assert fetcher.fetch(f"{server.url}/model.bin") == path

    def never(_: Path) -> str:
        raise RuntimeError("hashed again")

    monkeypatch.setattr(files, "sha256_of", never)
    offline = Fetcher(fetcher.cache_dir, offline=True)
    assert fetcher.fetch(f"{server.url}/model.bin") == path
    assert offline.fetch(f"{server.url}/model.bin", sha256=SHA256.upper()) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_bit_that_flips_in_the_cache_is_noticed_and_the_file_fetched_again(
    server: Server, fetcher: Fetcher, sha256: str | None
) -> None:
    path = fetcher.fetch(f"{server.url}/model.bin")
    flip(path)
    with pytest.raises(
        InputError, match=r"model\.bin: it is damaged: its bytes have changed on the disk, and offline=true"
    ):
        Fetcher(fetcher.cache_dir, offline=True).fetch(f"{server.url}/model.bin", sha256=sha256)
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=sha256).read_bytes() == BODY


def flip(path: Path) -> None:
    """Flip a bit as a disk does, which leaves size and time of change as they are; then begin a new process."""
    state = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    files._hashed.cache_clear()


def test_a_file_that_is_put_into_the_cache_by_hand_is_used(server: Server, fetcher: Fetcher) -> None:
    path = fetcher.fetch(f"{server.url}/model.bin")
    path.write_bytes(b"another file, longer or not")
    assert Fetcher(fetcher.cache_dir, offline=True).fetch(f"{server.url}/model.bin") == path


def test_a_cached_file_with_another_hash_is_fetched_again(server: Server, fetcher: Fetcher) -> None:
    server.faults = [wrong_bytes]
    path = fetcher.fetch(f"{server.url}/model.bin")
    with pytest.raises(InputError, match=r"model.bin: another sha256 than expected, and offline=true"):
        Fetcher(fetcher.cache_dir, offline=True).fetch(f"{server.url}/model.bin", sha256=SHA256)
    assert path.read_bytes() == bytes(len(BODY))
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY
    assert Fetcher(fetcher.cache_dir, offline=True).fetch(f"{server.url}/model.bin", sha256=SHA256) == path


def test_a_file_put_in_place_by_hand(server: Server, fetcher: Fetcher) -> None:
    offline = Fetcher(fetcher.cache_dir, offline=True)
    with pytest.raises(InputError, match=r"model.bin: not there, and offline=true") as raised:
        offline.fetch(f"{server.url}/model.bin", sha256=SHA256)
    path = Path(str(raised.value).rpartition("put it at ")[2])
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(InputError, match="another sha256"):
        offline.fetch(f"{server.url}/model.bin", sha256=SHA256)
    path.write_bytes(BODY + b"?")
    path.write_bytes(BODY)  # the recorded hash is of an earlier state of the file
    assert offline.fetch(f"{server.url}/model.bin", sha256=SHA256) == path
    assert server.requests == []


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot use .*cache_dir"):
        Fetcher(tmp_path / "cache").fetch(f"{server.url}/model.bin")


def test_default_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Fetcher().fetch(f"{server.url}/model.bin")
    assert path.is_relative_to(tmp_path / "instruct-lm")


def test_the_token_goes_to_the_hub_alone(
    server: Server,
    fetcher: Fetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    with serving() as store:
        url = f"http://localhost:{store.server_port}/blob?signature=x"
        server.default = lambda h: h.answer(302, Location=url)
        store.faults = [truncate, error_500]
        assert fetcher.fetch("hf:a/b@1/model.bin").read_bytes() == BODY
        store.default = error_404
        with pytest.raises(InputError) as raised:
            fetcher.fetch("hf:a/b@1/other.bin")
    assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer hf_secret"] * 4
    assert len(store.requests) == 4
    assert all("Authorization" not in headers for _, headers in store.requests)
    server.default = good
    fetcher.fetch(f"{server.url}/model.bin")  # the same host, but not as a hub
    assert server.requests[-1][1]["Authorization"].startswith("Basic ")  # the user's own ~/.netrc
    assert "hf_secret" not in caplog.text + str(raised.value)


def test_a_bad_token_is_not_printed(server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret")
    with pytest.raises(InputError, match="HF_TOKEN") as raised:
        fetcher.fetch("hf:a/b@1/model.bin")
    assert "hf_sec" not in str(raised.value)


def test_mirror_and_query(server: Server, fetcher: Fetcher) -> None:
    mirrored = Fetcher(fetcher.cache_dir, mirror=f"{server.url}/base/")
    path = mirrored.fetch("https://user:secret@example.org/a/model.bin?raw=1#top")
    assert server.requests[0][0] == "/base/example.org/a/model.bin?raw=1"
    assert "Authorization" not in server.requests[0][1]
    assert re.fullmatch(r"https/example\.org/a/query-[0-9a-f]{16}/model\.bin", str(path.relative_to(fetcher.cache_dir)))
    server.default = error_404
    with pytest.raises(InputError) as raised:
        fetcher.fetch(f"{server.url.replace('//', '//user:secret@')}/other.bin?key=secret")
    assert "secret" not in str(raised.value)


def test_local_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = Fetcher(tmp_path / "cache", offline=True)
    (tmp_path / "data.bin").write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert fetcher.fetch("data.bin", sha256=SHA256) == Path("data.bin")
    assert fetcher.fetch("~/data.bin") == tmp_path / "data.bin"
    assert fetcher.fetch(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=f"(?s)no such file or folder in {re.escape(str(tmp_path))}.*hf:<owner>"):
        fetcher.fetch("missing.bin")
    with pytest.raises(InputError, match=r"data.bin: its sha256 is"):
        fetcher.fetch("data.bin", sha256="0" * 64)
    with pytest.raises(InputError, match="instead of 7e09a9af"):
        fetcher.fetch("data.bin", sha256="7e09a9af")
    with pytest.raises(InputError, match="null"):
        fetcher.fetch(str(tmp_path), sha256=SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]
