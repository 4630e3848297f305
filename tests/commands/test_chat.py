"""Talking to a run: as function, in a terminal (a pseudo-terminal), and in a browser."""

import argparse
import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.commands import chat
from instruct_lm.data.conversation import Conversation
from tests.run_commands import ROOT, call

TIMEOUT = 120  # seconds for a page or an answer to come; a limit, not a measure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights: its answers go on until they may not, for seconds."""
    folder = tmp_path_factory.mktemp("chat")
    settings = ["model=gpt2-tiny", "data=sample", "trainer=debug", "model.block_size=8000", "prompt=phi3"]
    call("train.py", *settings, "output_dir=run", "generation.max_new_tokens=20", cwd=folder)
    return folder / "run"


def options(run: Path, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(chat._parser().parse_args([str(run)])), **changed})


def command(run: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "instruct_lm.chat", str(run), *args]


SLOW = """
import sys, time
from instruct_lm.commands import chat
from instruct_lm.respond import Responder

def slowly(self, example, stream=Responder.stream):
    for n, _ in enumerate(stream(self, example), 1):
        yield "word " * n
        time.sleep(0.05)

Responder.stream = slowly
sys.exit(chat.main())
"""


def slow_command(run: Path, *args: str) -> list[str]:
    """The same with answers that take minutes, so that they can be stopped, and that can be seen: a model with random
    weights may have nothing to say but control characters."""
    return [sys.executable, "-c", SLOW, str(run), "--max-new-tokens", "2000", *args]


def test_the_answer_grows_to_what_evaluation_would_give(run: Path) -> None:
    responder = chat.load(options(run))
    assert (responder.style.name, responder.max_new_tokens) == ("phi3", 20)
    grown = list(chat.answers(responder, " Name a colour.\n"))
    whole = responder.answer([Conversation.of("Name a colour.", "", "")])[0]
    assert len(grown) == whole.tokens == 20
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(grown))
    assert grown[-1] == "".join(
        c for c in whole.text.rstrip("\ufffd") if ord(c) > 0x9F or c in "\n\t" or " " <= c <= "~"
    )


def test_the_plain_core_gives_the_same_answer(run: Path) -> None:
    plain, fast = (chat.load(options(run, fast=fast)) for fast in (False, True))
    assert list(chat.answers(plain, "Name a colour.")) == list(chat.answers(fast, "Name a colour."))


def test_nothing_asked_and_too_much_asked_are_told(run: Path) -> None:
    responder = chat.load(options(run, max_new_tokens=4))
    assert list(chat.answers(responder, "  \n")) == [chat.EMPTY]
    assert not next(chat.answers(responder, "x" * 5000)).startswith("[")
    fits = len(responder.prompt_ids(Conversation.of("x" * 9000, "", ""))) - len(
        responder.prompt_ids(Conversation.of("", "", ""))
    )
    remark = next(chat.answers(responder, "x" * 9000))
    assert f"its last {9000 - fits:,} tokens were left out" in remark
    assert 8000 - 100 < fits < 8000


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["RUN", "--web", "--port", "0"], "--port 0: give a number from 1"),
        (["RUN", "--max-new-tokens", "0"], "generation.max_new_tokens=0 must be greater than or equal to 1"),
        (["RUN", "--temperature", "-1"], "generation.temperature=-1.0 must be greater than or equal to 0"),
        (["RUN", "--checkpoint", "first"], "invalid choice: 'first'"),
    ],
)
def test_bad_arguments_are_named(run: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    try:
        status = chat.main([arg.replace("RUN", str(run)) for arg in args])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_pipe_gives_an_answer_a_line(run: Path) -> None:
    asked = "Name a colour.\n\nName a town.\n"
    done = subprocess.run(command(run), cwd=ROOT, input=asked.encode(), capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    responder = chat.load(options(run))
    expected = [list(chat.answers(responder, text))[-1] for text in asked.splitlines()]
    assert done.stdout.decode() == "".join(f"{text}\n" for text in expected)
    assert expected[1] == chat.EMPTY


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execv(command[0], command)
        self.text = ""

    def until(self, pattern: str) -> str:
        """What was said up to and with a match of the pattern."""
        deadline = time.monotonic() + TIMEOUT
        while not (match := re.search(pattern, self.text, re.S)):
            ready = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]
            piece = b""
            if ready:
                with contextlib.suppress(OSError):  # EIO: the other side has ended
                    piece = os.read(self.fd, 65536)
            if not piece:
                raise AssertionError(f"{pattern!r} did not come; after it: {self.text!r}")
            self.text += piece.decode(errors="replace")
        said, self.text = self.text[: match.end()], self.text[match.end() :]
        return said

    def type(self, text: str) -> None:
        view = memoryview(text.encode())
        while view:  # a terminal takes little at once
            view = view[os.write(self.fd, view[:512]) :]
            if select.select([self.fd], [], [], 0.01)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_streams_stops_and_goes_on(run: Path) -> None:
    terminal = Terminal(*slow_command(run))
    assert "prompt style phi3" in terminal.until("Ctrl-D ends.")
    terminal.until("> $")
    terminal.type("\n")
    terminal.until(re.escape(chat.EMPTY))
    terminal.until("> $")
    terminal.type("Name a colour.\n")
    terminal.until(r"Name a colour\.\r\nword ")  # the echo, and the answer has begun
    terminal.type("\x03")
    terminal.until(r"\[stopped\]")
    terminal.until("> $")
    terminal.type("y" * 5000 + "\n")
    assert "left out" not in terminal.until(r"y\r\n.*word ")
    terminal.type("\x03")
    terminal.until(r"\[stopped\]")
    terminal.until("> $")
    terminal.type("\x04")
    assert terminal.ended() == 0


# The page


def test_a_taken_port_is_named(run: Path) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(run, "--web", "--port", str(port)), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
        )
    assert done.returncode == 2
    assert f"Port {port} is not free" in done.stderr
    assert "leave out --port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def page(run: Path) -> Iterator[Any]:
    """The chat's page in a browser."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no chromium or google-chrome on the path")
    server = subprocess.Popen(
        slow_command(run, "--web"),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        said = ""
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = server.stdout.readline()
            assert line, f"the server ended with {server.wait()}: {said}"
            said += line
        with sync_api.sync_playwright() as playwright:
            try:
                browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            except sync_api.Error as error:
                pytest.skip(f"{program} does not start here: {error}")
            page = browser.new_page()
            page.set_default_timeout(1000 * TIMEOUT)
            page.goto(address[0])
            yield page
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=TIMEOUT)


@pytest.mark.slow
def test_a_browser_asks_stops_and_asks_again(page: Any) -> None:
    box, answers = page.get_by_role("textbox"), page.locator("[data-testid=bot]")

    def ask_and_stop(question: str, number: int) -> str:
        box.fill(question)
        box.press("Enter")
        answers.nth(number).get_by_text("word word word").wait_for()
        page.locator("button.stop-button").click()
        page.locator("button.submit-button").wait_for()
        return str(answers.nth(number).inner_text())

    stopped = ask_and_stop("Name a colour.", 0)
    assert "left out" not in ask_and_stop("z" * 5000, 1)
    assert answers.nth(0).inner_text() == stopped
    box.fill("   ")
    box.press("Enter")
    answers.nth(2).get_by_text(chat.EMPTY).wait_for()
