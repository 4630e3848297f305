"""An OpenAI-compatible server on a local port that behaves as a test asks it to, and keeps a log."""

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Exchange:
    """One POST: what was asked, and the ways to reply to it."""

    def __init__(
        self, handler: BaseHTTPRequestHandler, server: "JudgeServer", body: dict[str, Any], attempt: int
    ) -> None:
        self.handler, self.server, self.body, self.attempt = handler, server, body, attempt
        self.question: str = body["messages"][0]["content"]

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def answer(self, content: Any, finish_reason: str = "stop", prompt_tokens: Any = None, **message: Any) -> None:
        """A chat completion; `message` holds what a server adds, such as `reasoning`."""
        said = {"role": "assistant", "content": content, **message}
        choice = {"index": 0, "message": said, "finish_reason": finish_reason}
        self.server.answered.append(self.question)
        body = {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens}}
        self.send(200, json.dumps(body).encode())

    def half(self) -> None:
        """Announce more bytes than follow."""
        self.send(200, b'{"choices": [{"mess', {"Content-Length": "400"})

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()

    def stall(self) -> None:
        """Say nothing until the server stops."""
        self.server.stopping.wait()


class JudgeServer:
    """Context manager; `behave` replies to each POST, `asked` and `answered` list the questions in order.

    The n-th request of the same question is `attempt` n, from 0. GETs are answered from `pages` (404 for the rest).
    """

    def __init__(self, behave: Callable[[Exchange], None], pages: dict[str, Any] | None = None) -> None:
        self.behave, self.pages = behave, {"/v1/models": {"data": []}} if pages is None else pages
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with self._lock:
                    attempt = self.asked.count(question)
                    self.asked.append(question)
                    self.bodies.append(body)
                    self.headers.append(dict(handler.headers))
                if handler.path != "/v1/chat/completions":
                    handler.send_error(404)
                    return
                self.behave(Exchange(handler, self, body, attempt))

            def do_GET(handler) -> None:
                page = self.pages.get(handler.path)
                content = json.dumps(page).encode()
                handler.send_response(200 if page is not None else 404)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True

            def handle_error(server, *args: Any) -> None:
                """A client that left is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


def answering(content: str | None, **options: Any) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.answer(content, **options)


def in_turn(*behaviours: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """The n-th behaviour for the n-th request of a question; the last one from then on."""
    return lambda exchange: behaviours[min(exchange.attempt, len(behaviours) - 1)](exchange)
