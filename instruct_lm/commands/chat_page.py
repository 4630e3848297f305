"""Chat in a page of the browser, from a server on this machine that only this page can ask.

The page shows text as text: it never makes HTML of it, and its Content-Security-Policy forbids it to run or to load
anything but itself. Each answer is a response of its own, a line of JSON for each piece: the page stops an answer, or
leaves it when its tab is closed, by closing the connection. The page holds the conversation and sends it with each
question.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from socketserver import ThreadingTCPServer
from typing import Any

from instruct_lm.commands.chat_session import EMPTY, NOTHING, Chat, Exchange
from instruct_lm.errors import InputError

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100
MOST_BYTES = 4_000_000  # of a question with its conversation
# https://www.w3.org/TR/CSP3/ and https://w3c.github.io/trusted-types/: nothing but this page's own script and style,
# no frames, no forms, no images; text cannot become HTML or script even by a mistake in the page's script.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def serve(chat: Chat, about: str, port: int | None) -> None:
    """Serve the page on this machine until Ctrl-C.

    Raises:
        InputError: The port is taken.
    """
    with make_server(chat, about, port) as server:
        print(f"{about}\nThe chat is at http://{HOST}:{server.port}/ until Ctrl-C.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        server.stop()


def make_server(chat: Chat, about: str, port: int | None) -> Server:
    """A server that listens.

    Args:
        chat: Answers the questions.
        about: Text at the top of the page.
        port: None: the first free one from 7860 on.

    Raises:
        InputError: The port is taken.
    """
    for number in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,):
        try:
            return Server(chat, about, number)
        except OSError as error:
            reason = error
    if port is None:
        raise InputError(f"No port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free: choose another by --port.")
    raise InputError(f"Port {port} is not free ({reason}): choose another, or leave out --port.") from reason


class Server(ThreadingTCPServer):
    """Serves the page and one answer at a time: the others wait.

    Args:
        chat: Answers the questions.
        about: Text at the top of the page.
        port: The port on this machine; 0: any.

    Raises:
        OSError: The port is taken.
    """

    daemon_threads = True
    request_queue_size = 128  # with five, idle connections keep others waiting for seconds
    allow_reuse_address = os.name == "posix"  # elsewhere, it would let two servers share a port

    def __init__(self, chat: Chat, about: str, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.chat, self.about, self.port = chat, about, int(self.server_address[1])
        self.token = secrets.token_urlsafe()  # in the page alone: other pages cannot read it
        self.model, self.stopping = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """End the answers; returns when the model is at rest."""
        self.stopping.set()
        self.model.acquire()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of errors, but not of clients that went away or said nothing."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def page(self, nonce: str) -> bytes:
        """The page, whose own script and style carry the nonce."""
        page = files("instruct_lm.commands").joinpath("chat_page.html").read_text(encoding="utf-8")
        values = {"nonce": nonce, "token": self.token, "about": self.about}
        values |= {"history": "true" if self.chat.history else "false"}
        for name, value in values.items():
            page = page.replace(f"{{{{{name}}}}}", escape(value))
        return page.encode()

    def events(self, asked: Exchange, before: Sequence[Exchange]) -> Generator[dict[str, Any], None, None]:
        """What the page is told of an answer: empty where there is only a sign of life."""
        if not asked.instruction.strip():
            yield {"remark": EMPTY}
            return
        conversation = self.chat.conversation(asked.instruction, asked.input, before)
        if remark := self.chat.remark(conversation):
            yield {"remark": remark}
        if not self.model.acquire(blocking=False):
            yield {"waiting": True}
            while not self.model.acquire(timeout=1):
                yield {}
        shown = ""
        try:
            with closing(self.chat.answer(conversation)) as answer:
                while not self.stopping.is_set() and (text := next(answer, None)) is not None:
                    yield {"text": text[len(shown) :]} if text != shown else {}
                    shown = text
        finally:
            self.model.release()
        if self.stopping.is_set():
            yield {"error": "The server was stopped."}
        elif not shown:
            yield {"remark": NOTHING}


class _Handler(BaseHTTPRequestHandler):
    """One request: the page, or an answer."""

    server: Server
    timeout = 30  # seconds for a client to read or write; a tab that sleeps must not keep the model
    server_version, sys_version = "instruct-lm", ""

    def do_GET(self) -> None:
        """Give the page."""
        if not self._is_here():
            self._refuse(
                HTTPStatus.FORBIDDEN, f"Open the page as http://{HOST}:{self.server.port}/ or through localhost."
            )
        elif self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        else:
            nonce = secrets.token_urlsafe()
            page = self.server.page(nonce)
            self._begin(HTTPStatus.OK, "text/html", {"Content-Security-Policy": POLICY.format(nonce=nonce)})
            self.wfile.write(page)

    def do_POST(self) -> None:
        """Give an answer, a line of JSON for each piece."""
        token = self.headers.get("X-Token", "")
        same = self._is_here() and self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        if not same or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "Reload the page: it is not this server's.")
        if self.path != "/answer":
            return self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            wanted = f"The question and its conversation take more than {MOST_BYTES:,} bytes: begin a new one."
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, wanted)
        try:
            asked, before = read_question(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, f"This is no question: {error}")
        self._begin(HTTPStatus.OK, "application/x-ndjson")
        with suppress(OSError), closing(self.server.events(asked, before)) as events:  # OSError: the tab is closed
            try:
                for event in events:
                    self._tell(event)
                self._tell({"end": True})
            except OSError:
                raise
            except Exception as error:
                if not isinstance(error, InputError):
                    traceback.print_exc()
                self._tell({"error": str(error) or type(error).__name__})

    def _is_here(self) -> bool:
        """Whether the page was asked for by this machine's name: another may be a stranger's that leads here.

        The port may be another one, that of a tunnel.
        """
        return self.headers.get("Host", "").partition(":")[0] in (HOST, "localhost")

    def _tell(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._begin(status, "text/plain")
        self.wfile.write(message.encode())

    def _begin(self, status: HTTPStatus, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Security-Policy": "default-src 'none'",
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def read_question(body: bytes) -> tuple[Exchange, list[Exchange]]:
    """The question in a request's body, an object with `instruction`, `input` and `before`, and the exchanges before.

    Raises:
        ValueError: It is no such JSON.
    """
    asked = json.loads(body)
    if not isinstance(asked, dict) or not isinstance(asked.get("before"), list):
        raise ValueError("an object with instruction, input and before is needed")
    before = [Exchange(*_texts(item, *Exchange._fields)) for item in asked["before"]]
    return Exchange(*_texts(asked, "instruction", "input")), before


def _texts(item: Any, *names: str) -> list[str]:
    """The texts of an object by their names."""
    values = [item.get(name) for name in names] if isinstance(item, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"texts are needed: {', '.join(names)}")
    return values  # type: ignore[return-value]
