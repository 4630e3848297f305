"""The one internal type of an entry: a conversation of turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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

    def as_entry(self) -> dict[str, Any]:
        """The conversation in Alpaca's keys: `instruction` and `input` are its last user turn, `output` its last turn.

        What comes before is in `system` and `history`, a list of messages; without it the keys are left out.

        Example:
            >>> Conversation((Turn("system", "Be brief."), Turn("user", "Hi."), Turn("assistant", "Hello."))).as_entry()
            {'instruction': 'Hi.', 'input': '', 'output': 'Hello.', 'system': 'Be brief.'}
        """
        before = list(self.prompt)
        last = before.pop() if before and before[-1].role == "user" else Turn("user", "")
        entry: dict[str, Any] = {"instruction": last.text, "input": last.input, "output": self.reference}
        if before and before[0].role == "system":
            entry["system"] = before.pop(0).text
        if before:
            entry["history"] = [{"role": turn.role, "content": turn.text} for turn in before]
        return entry

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], number: int = 0) -> Conversation:
        """The conversation of an entry as `as_entry` writes it; `history` may also be a list of pairs, as in Alpaca's.

        Raises:
            LookupError, TypeError, ValueError: It is no such entry.
        """
        turns = [Turn("system", entry["system"])] if entry.get("system") else []
        for item in entry.get("history") or ():
            if isinstance(item, Mapping):
                turns.append(Turn(item["role"], item["content"]))
            else:
                asked, answered = item
                turns += [Turn("user", asked), Turn("assistant", answered)]
        exchange = cls.of(entry["instruction"], entry.get("input") or "", entry["output"])
        return cls((*turns, *exchange.turns), number)
