"""A local server that misbehaves on demand, and the file that it serves."""

import contextlib
import gzip
import hashlib
import http.server
import os
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from instruct_lm.io.fetcher import Fetcher

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

    def do_HEAD(self) -> None:
        self.server.heads.append(self.path)
        self.close_connection = True
        self.server.head(self)

    def answer(self, status: int, body: bytes = b"", send: int | None = None, **headers: str | None) -> None:
        """Headers for the whole `body`, then its first `send` bytes; a header of None is left out."""
        self.send_response(status)
        defaults = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", "Connection": "close"}
        for name, value in (defaults | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
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
        self.head: Callable[[Handler], None] = error_405
        self.requests: list[tuple[str, dict[str, str]]] = []  # GET alone
        self.heads: list[str] = []
        self.gate = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def good(h: Handler, send: int | None = None, etag: str | None = ETAG, body: bytes = BODY, **more: str) -> None:
    if start := h.first_byte():
        if start >= len(body):
            return h.answer(416, Content_Range=f"bytes */{len(body)}", ETag=etag)
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        send = None if send is None else max(0, send - start)
        return h.answer(206, body[start:], send, Content_Range=span, ETag=etag, **more)
    return h.answer(200, body, send, ETag=etag, **more)


def hub(files: Mapping[str, bytes]) -> Callable[[Handler], None]:
    """Serves each file at its path, and nothing else."""
    return lambda h: good(h, body=files[h.path]) if h.path in files else error_404(h)


def error_405(h: Handler) -> None:
    h.answer(405)


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


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """The address of a port that is taken and refuses connections."""
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


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


def place(server: Server, fetcher: Fetcher, name: str = "model.bin") -> Path:
    assert fetcher.cache_dir is not None
    return fetcher.cache_dir / "http" / f"127.0.0.1%3A{server.server_port}" / name


def leftovers(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {path.name, f"{path.name}.lock", f"{path.name}.sha256"}
