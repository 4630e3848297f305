"""Chat in a terminal, and answers to the lines of a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from instruct_lm.commands.chat_session import EMPTY, NOTHING, Chat, Exchange
from instruct_lm.commands.chat_text import visible
from instruct_lm.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

HELP = """\
/input   give a text that the next instruction applies to
/multi   write an instruction of several lines
/reset   forget the conversation and the input
/help    show this list
/exit    leave; so do Ctrl-D and, where nothing is typed, Ctrl-C
Pasted lines are one instruction: Enter sends them. Ctrl-C stops an answer and clears what is typed.
An instruction of one line that begins with a slash: write two slashes, //."""
_BLOCK_END = "."


def talk(chat: Chat, about: str) -> None:
    """Read instructions from the terminal, or a line each from a pipe, and print the answers as they grow."""
    if sys.stdin.isatty():
        print(f"{about}\n/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.")
        _Terminal(chat).run()
        return
    before: list[Exchange] = []
    for line in sys.stdin:
        line = line.lstrip("\ufeff")  # a byte order mark, as Windows writes it
        if not line.strip():
            print(EMPTY, file=sys.stderr)
            print()
            continue
        conversation = chat.conversation(line, before=before)
        if remark := chat.remark(conversation):
            print(remark, file=sys.stderr)
        *_, answer = chat.answer(conversation)
        print(answer, flush=True)
        if answer:
            before.append(Exchange(line, answer=answer))


class _Terminal:
    """A conversation in a terminal."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.before: list[Exchange] = []
        self.input = ""
        self.session = _session()

    def run(self) -> None:
        """Read and answer until the person leaves."""
        while True:
            try:
                print()
                self._take(self._read())
            except EOFError:
                return
            except InputError as error:  # such as a chat template that takes one exchange alone
                print(f"[{error}]")
            except KeyboardInterrupt:  # between a question and its answer: that question is dropped
                print("[stopped]")

    def _read(self) -> str:
        """What was typed or pasted; EOFError: the person leaves."""
        while True:
            try:
                return self.session.prompt("input> " if self.input else "> ")
            except KeyboardInterrupt:
                if not self.session.default_buffer.text:
                    raise EOFError from None

    def _take(self, text: str) -> None:
        """Obey a command, or answer a question."""
        if not text.startswith("/") or "\n" in text.strip():
            self._ask(text)
        elif text.startswith("//"):
            self._ask(text[1:])
        else:
            self._obey(text.strip())

    def _obey(self, command: str) -> None:
        if command == "/exit":
            raise EOFError
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            self.before, self.input = [], ""
            print("[The conversation and the input are forgotten.]")
        elif command == "/multi":
            if block := self._read_block("the instruction"):
                self._ask(block)
        elif command == "/input":
            self.input = self._read_block("the text that the next instruction applies to")
            print("[Now the instruction.]" if self.input else "[No input.]")
        else:
            print(
                f"[No command {visible(command)}: /help lists them. To send a text that begins with a slash, write //.]"
            )

    def _read_block(self, what: str) -> str:
        """Lines up to one with a single dot; empty if Ctrl-C gives it up."""
        print(f"[Write or paste {what}; a line with a single dot, or Ctrl-D, ends it, Ctrl-C gives it up.]")
        lines: list[str] = []
        try:
            while (line := self.session.prompt("| ")) != _BLOCK_END:
                lines.append(line)
        except EOFError:
            pass
        except KeyboardInterrupt:
            return ""
        return "\n".join(lines).strip("\n")

    def _ask(self, instruction: str) -> None:
        if not instruction.strip():
            print(f"[{EMPTY}]")
            return
        conversation = self.chat.conversation(instruction, self.input, self.before)
        if remark := self.chat.remark(conversation):
            print(f"[{remark}]")
        shown, stopped = "", False
        with contextlib.closing(self.chat.answer(conversation)) as answer:
            try:
                for text in answer:
                    new, shown = text[len(shown) :], text  # before it is printed: Ctrl-C may come in between
                    print(new, end="", flush=True)
            except KeyboardInterrupt:
                stopped = True
        print(" [stopped]" if stopped else "" if shown else f"[{NOTHING}]")
        # A stopped answer belongs to the conversation as far as it was shown.
        if shown:
            self.before.append(Exchange(instruction, self.input, shown))
        self.input = ""


def _session() -> PromptSession[str]:
    """Line editing with history, in which a paste of several lines is one text on every system."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    output = create_output(always_prefer_tty=True)
    output.enable_cpr = False  # type: ignore[attr-defined]  # a terminal that does not answer would cost a warning
    return PromptSession(output=output, enable_suspend=True)
