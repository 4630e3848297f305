"""The one internal type of an entry: a conversation of turns."""

from __future__ import annotations

from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one side says.

    Attributes:
        role: One of `ROLES`.
        text: What it says; of an Alpaca entry's user turn, the instruction.
        input: Of an Alpaca entry's user turn: the text that the instruction applies to; else empty.
    """

    role: str
    text: str
    input: str = ""


class Conversation(NamedTuple):
    """An entry. Every assistant turn is trained on; in evaluation the last one is the reference.

    Attributes:
        turns: At most one system turn, which comes first; then user and assistant turns, the last of them the
            assistant's.
        number: The entry's number in its file, from 1; 0 if it comes from none.
    """

    turns: tuple[Turn, ...]
    number: int = 0

    @classmethod
    def of(cls, instruction: str, input: str = "", output: str = "", number: int = 0) -> Conversation:
        """One exchange, such as an Alpaca entry."""
        return cls((Turn("user", instruction, input), Turn("assistant", output)), number)

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last."""
        return self.turns[:-1]

    @property
    def reference(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text
