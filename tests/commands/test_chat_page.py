"""The chat's page: its server asked by strangers, and the page in a browser with hostile answers."""

import http.client
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from instruct_lm.commands.chat_page import FIRST_PORT, MOST_BYTES, Server, make_server, read_question, serve
from instruct_lm.commands.chat_session import EMPTY, Chat
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.prompts import STYLES
from instruct_lm.errors import InputError
from instruct_lm.respond import Responder
from tests.commands.chat_commands import TIMEOUT, WORD
from tests.test_respond import BYTES, MODEL


class Scripted(Chat):
    """Says `word ` until `go_on` is cleared."""

    def __init__(self) -> None:
        super().__init__(Responder(MODEL, BYTES, STYLES["chatml"]), history=True)
        self.seen: list[Conversation] = []
        self.open = 0  # answers that are being given
        self.most = 0

    def answer(self, conversation: Conversation) -> Any:
        self.seen.append(conversation)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if conversation.prompt[-1].text == "fail":
                raise InputError("no such thing")
            if conversation.prompt[-1].text == "bug":
                raise KeyError("bug")
            for n in range(1, 4 if conversation.prompt[-1].text == "short" else 10**6):
                yield WORD * min(n, 1000)
        finally:
            self.open -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(Scripted(), "about <b>it</b>", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.stop()


def question(instruction: str, **changed: Any) -> bytes:
    return json.dumps({"instruction": instruction, "input": "", "before": [], **changed}).encode()


def post(
    server: Server, body: bytes, **changed: str | None
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Ask as the page does, but for changed headers."""
    host = f"127.0.0.1:{server.port}"
    headers = {"Host": host, "Origin": f"http://{host}", "X-Token": server.token, "Content-Length": str(len(body))}
    headers |= {name.replace("_", "-"): value for name, value in changed.items() if value is not None}
    for name, value in changed.items():
        if value is None:
            del headers[name.replace("_", "-")]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    connection.putrequest("POST", "/answer", skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    return connection, connection.getresponse()


def events(response: http.client.HTTPResponse) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.read().splitlines()]


def test_an_answer_comes_in_pieces(server: Server) -> None:
    before = [{"instruction": "a", "input": "b", "answer": "c"}]
    told = events(post(server, question("short", input="d", before=before))[1])
    assert [event for event in told if event] == [{"text": WORD}] * 3 + [{"end": True}]
    turns = (Turn("user", "a", "b"), Turn("assistant", "c"), Turn("user", "short", "d"), Turn("assistant", ""))
    assert server.chat.seen[0].turns == turns  # type: ignore[attr-defined]
    told = events(post(server, question("short", input="x" * 500))[1])
    assert "tokens of the instruction were left out" in told[0]["remark"]
    assert events(post(server, question(" \n"))[1]) == [{"remark": EMPTY}, {"end": True}]


@pytest.mark.parametrize(
    "changed",
    [
        {"Host": "evil.example"},  # DNS rebinding
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": None},
        {"Origin": "http://evil.example"},  # a form or a script of another page
        {"Origin": "http://localhost:1"},  # of another server on this machine
        {"Origin": "null"},
        {"Origin": None},
        {"X_Token": None},
        {"X_Token": "wrong"},
        {"X_Token": "\xe9"},
    ],
)
def test_strangers_get_no_answer(server: Server, changed: dict[str, str | None]) -> None:
    assert post(server, question("short"), **changed)[1].status == 403
    assert server.chat.seen == []  # type: ignore[attr-defined]


def test_the_page_is_for_its_own_address_and_carries_its_policy(server: Server) -> None:
    def get(path: str, host: str) -> tuple[http.client.HTTPResponse, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        return response, response.read().decode()

    assert get("/", "evil.example")[0].status == 403
    assert get("/", "evil.example:80")[0].status == get("/", "localhost.evil.example:80")[0].status == 403
    assert get("/", "localhost:9999")[0].status == 200  # through a tunnel
    assert get("/favicon.ico", f"localhost:{server.port}")[0].status == 404
    response, page = get("/", f"localhost:{server.port}")
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert "about &lt;b&gt;it&lt;/b&gt;" in page
    assert server.token in page
    assert "{{" not in page
    assert re.findall(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page) == []
    assert get("/", f"localhost:{server.port}")[0].headers["Content-Security-Policy"] != policy  # a nonce is used once


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, question("a", input=None), question("a", before={}),
     question("a", before=["b"]), question("a", before=[{"instruction": "b"}]), b'{"before": []}'],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_question_is_refused(server: Server, body: bytes) -> None:
    response = post(server, body)[1]
    assert (response.status, response.read().startswith(b"This is no question: ")) == (400, True)
    with pytest.raises((ValueError, RecursionError)):
        read_question(body)


@pytest.mark.parametrize("length", [str(MOST_BYTES + 1), "-1", "9" * 5000, "x"])
def test_too_long_a_question_is_not_read(server: Server, length: str) -> None:
    assert post(server, b"", Content_Length=length)[1].status == 413


def test_failures_are_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert events(post(server, question("fail"))[1]) == [{"error": "no such thing"}]
    assert capsys.readouterr().err == ""
    assert events(post(server, question("bug"))[1]) == [{"error": "'bug'"}]
    assert "KeyError" in capsys.readouterr().err
    assert events(post(server, question("short"))[1])[-1] == {"end": True}  # and the next is answered


def test_one_answer_at_a_time_and_a_closed_tab_ends_its_own(server: Server) -> None:
    first, one = post(server, question("endless"))
    assert one.readline()
    second, two = post(server, question("short", before=[]))
    assert json.loads(two.readline()) == {"waiting": True}
    third, three = post(server, question("another endless"))
    assert json.loads(three.readline()) == {"waiting": True}
    assert one.readline()  # still the first
    three.close()
    third.close()  # closed while it waits
    one.close()
    first.close()
    told = events(two)
    assert [event for event in told if event] == [{"text": WORD}] * 3 + [{"end": True}]
    second.close()
    assert events(post(server, question("short"))[1])[-1] == {"end": True}
    assert server.chat.most == 1  # type: ignore[attr-defined]


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Scripted()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"Port {port} is not free .*leave out --port"):
            make_server(talk, "", port)
        monkeypatch.setattr("instruct_lm.commands.chat_page.FIRST_PORT", port)
        with make_server(talk, "", None) as other:
            assert other.port > port
        monkeypatch.setattr("instruct_lm.commands.chat_page.PORTS", 1)
        with pytest.raises(InputError, match=f"No port from {port} to {port} is free"):
            make_server(talk, "", None)
    assert FIRST_PORT == 7860


def test_ctrl_c_ends_the_server_without_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    serve(Scripted(), "about", None)
    assert re.search(r"about\nThe chat is at http://127\.0\.0\.1:\d+/ until Ctrl-C\.", capsys.readouterr().out)
