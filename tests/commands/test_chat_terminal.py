"""The chat on a pseudo-terminal."""

import contextlib
import os
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from instruct_lm.commands import chat_terminal
from instruct_lm.commands.chat_session import EMPTY, NOTHING, Chat
from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.respond import Responder
from tests.commands.chat_commands import TIMEOUT, WORD, command, prompts, script, scripted, scripted_command
from tests.commands.test_chat_text import forbidden
from tests.run_commands import ROOT
from tests.test_respond import BYTES

pty = pytest.importorskip("pty", reason="no pseudo-terminals")
PROMPT = r"(?:\A|\n)> $"
PASTE = "\x1b[200~{}\x1b[201~"
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execve(command[0], command, environment | {"TERM": "xterm"})
        self.modes = termios.tcgetattr(self.fd)[:4]
        self.raw = ""

    def until(self, pattern: str) -> str:
        """What was said up to and with a match of the pattern, without what moves the cursor."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            # The blank after a prompt is drawn as a way of the cursor.
            text = re.sub(r"(?<=[>|])(\x08|\x1b\[\dD)\x1b\[\dC", " ", self.raw)
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)
            if match := re.search(pattern, text, re.S):
                self.raw = text[match.end() :]
                return text[: match.end()]
            piece = b""
            if select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                with contextlib.suppress(OSError):  # EIO: the other side has ended
                    piece = os.read(self.fd, 65536)
            if not piece:
                raise AssertionError(f"{pattern!r} did not come: {text!r}")
            self.raw += piece.decode(errors="replace")

    def type(self, text: str) -> None:
        view = memoryview(text.encode())
        while view:  # a terminal takes little at once
            view = view[os.write(self.fd, view[:512]) :]
            if select.select([self.fd], [], [], 0.01)[0]:
                self.raw += os.read(self.fd, 65536).decode(errors="replace")

    def ask(self, text: str) -> str:
        """Type a line; what came up to the next prompt."""
        self.type(f"{text}\r")
        return self.until(PROMPT)

    def ended(self) -> int:
        while True:  # what is still said
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a chat, the scripted one if none is given: the answers by question, and arguments."""
    terminals = []

    def start(says: dict[str, str] | None = None, *args: str, command: list[str] | None = None) -> Terminal:
        terminal = Terminal(command or scripted_command(*args), script(tmp_path / "asked", says or {}))
        terminals.append(terminal)
        terminal.until(PROMPT)
        return terminal

    yield start
    for terminal in terminals:
        os.close(terminal.fd)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)


@pytest.mark.slow
def test_ctrl_c_at_an_empty_prompt_ends_the_command_with_status_0(start: Start, chat_run: Path) -> None:
    terminal = start(command=command(chat_run))
    terminal.type(CTRL_C)
    assert terminal.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("leave", [CTRL_C, CTRL_D, "/exit\r"])
def test_leaving_is_no_failure_and_leaves_the_terminal_as_it_was(start: Start, leave: str) -> None:
    terminal = start()
    assert termios.tcgetattr(terminal.fd)[:4] != terminal.modes  # the line editor's
    terminal.type(f"typed{CTRL_C}")
    terminal.until(rf"typed.*{PROMPT}")  # cleared: the program is still there
    terminal.type("ask\r")
    terminal.until(WORD)
    assert termios.tcgetattr(terminal.fd)[:4] == terminal.modes
    terminal.type(CTRL_C)
    assert "[stopped]" in terminal.until(PROMPT)
    assert EMPTY in terminal.ask("")
    terminal.type(leave)
    assert terminal.ended() == 0


class Typed:
    """In place of the line editor: gives texts, raises exceptions, and then ends."""

    def __init__(self, *typed: str | type[BaseException]) -> None:
        self.typed = list(typed)
        self.default_buffer = SimpleNamespace(text="")

    def prompt(self, message: str) -> str:
        given = self.typed.pop(0) if self.typed else EOFError
        if isinstance(given, str):
            return given
        raise given


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one exchange') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    responder = Responder(scripted().responder.model, BYTES, TemplateStyle(template, {}, []))
    monkeypatch.setattr(Responder, "stream", lambda self, conversation: iter(["Blue."]))
    monkeypatch.setattr(chat_terminal, "_session", lambda: Typed("a", "b", "/reset", "c", KeyboardInterrupt, "d"))
    chat_terminal._Terminal(Chat(responder, history=True)).run()
    said = capsys.readouterr().out
    assert (said.count("Blue."), said.count("one exchange")) == (2, 1)  # Ctrl-C with nothing typed left before d


@pytest.mark.slow
def test_commands_input_and_lines(start: Start, tmp_path: Path) -> None:
    says = {"Add.": "3", "/etc": "a folder", "Name\n\n/a\ncolour.": "Blue.", "// C\n/* C */": "code"}
    terminal = start(says)
    listed = terminal.ask("/help")
    assert all(f"\n{name} " in listed for name in ("/input", "/multi", "/reset", "/help", "/exit"))
    assert "No command /etc: " in terminal.ask("/etc")
    assert "\na folder\n" in terminal.ask("//etc")
    assert "\nBlue.\n" in terminal.ask("/multi\rName\r\r/a\rcolour.\r.")
    terminal.type("/input\r1\r2\r.\r")
    terminal.until("input> $")
    assert "\n3\n" in terminal.ask("Add.")
    terminal.type(PASTE.format("// C\r/* C */"))
    terminal.until(r"C \*/")
    assert not (tmp_path / "asked").read_text().count("\n") > 3  # shown, not sent
    assert "\ncode\n" in terminal.ask("")
    terminal.type(f"/multi\rgiven up\r{CTRL_C}")
    terminal.until(rf"given up.*{PROMPT}")
    assert "forgotten" in terminal.ask("/reset")
    assert "\n3\n" in terminal.ask("Add.")
    terminal.type(CTRL_D)
    assert terminal.ended() == 0

    turns = [Turn("user", "/etc"), Turn("assistant", "a folder"), Turn("user", "Name\n\n/a\ncolour.")]
    turns += [Turn("assistant", "Blue."), Turn("user", "Add.", "1\n2"), Turn("assistant", "3")]
    turns += [Turn("user", "// C\n/* C */"), Turn("assistant", "code")]
    responder = scripted().responder
    conversations = [Conversation(tuple(turns[: 2 * n])) for n in range(1, 5)] + [Conversation.of("Add.")]
    assert prompts(tmp_path / "asked") == [responder.prompt_ids(conversation) for conversation in conversations]


@pytest.mark.slow
def test_a_stopped_answer_belongs_to_the_conversation(start: Start, tmp_path: Path) -> None:
    terminal = start({"Why?": "So."}, "--system", "Be brief.")
    terminal.type("Name a colour.\r")
    said = terminal.until(f"colour.*{WORD * 3}")
    terminal.type(CTRL_C)
    said += terminal.until(r"\[stopped\]")
    terminal.until(PROMPT)
    terminal.ask("Why?")
    terminal.type(CTRL_D)
    assert terminal.ended() == 0
    possible = []
    for words in (said.count("word"), said.count("word") + 1):  # Ctrl-C may come just before a word is printed
        turns = (Turn("system", "Be brief."), Turn("user", "Name a colour."), Turn("assistant", (WORD * words).strip()))
        asked = Conversation((*turns, Turn("user", "Why?"), Turn("assistant", "")))
        possible.append(scripted().responder.prompt_ids(asked))
    assert prompts(tmp_path / "asked")[1] in possible


@pytest.mark.slow
def test_hostile_answers_are_shown_as_text(start: Start) -> None:
    hostile = (
        "\x1b]0;title\x07\x1b[2J<b>x</b>\x9b31m\x08\u202e\u2066\u200b\U000e0041a\rb 👩‍👩‍👧‍👦 می\u200cخواهم "
        + "長" * 300
    )
    says = {
        "hostile": hostile,
        "both": "\n### Response:\nBlue.<|user|>\nRed?",
        "nothing": "\x1b\x07",
        "half": "ok \ufffd",
    }
    terminal = start(says)
    terminal.type("hostile\r")
    raw = ""
    while not raw.endswith("\x1b[?25h") or "長" not in raw:
        raw += os.read(terminal.fd, 65536).decode(errors="replace")
    answer = raw[raw.index("]0;title") : raw.rindex("長") + 1].replace("\r\n", "\n")
    assert answer == "]0;title[2J<b>x</b>31ma\nb 👩‍👩‍👧‍👦 می\u200cخواهم " + "長" * 300
    assert not forbidden(answer)
    assert re.search(r"both\n### Response:\nBlue\.\n\n> $", terminal.ask("both"))  # phi3's marks are others
    assert f"[{NOTHING}]" in terminal.ask("nothing")
    assert "\nok\n" in terminal.ask("half")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a line differs")
def test_a_line_longer_than_a_terminal_takes(start: Start, tmp_path: Path) -> None:
    terminal = start({"y" * 5000: "Long.", "z" * 9000: "Longer."})
    terminal.type(PASTE.format("y" * 5000) + "\r")
    assert "left out" not in terminal.until(r"Long\.")
    terminal.until(PROMPT)
    terminal.type(PASTE.format("z" * 9000) + "\r")
    assert re.search(r"\[The earliest exchange was left out and the last [\d,]+ tokens", terminal.until(r"Longer\."))
    assert prompts(tmp_path / "asked")[0] == scripted().responder.prompt_ids(Conversation.of("y" * 5000))
