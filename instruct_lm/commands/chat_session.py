"""What the terminal and the page have in common: from what a person wrote to the answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property
from typing import NamedTuple

from instruct_lm.commands.chat_text import Marks, growing
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.respond import Responder

EMPTY = "Write an instruction, such as: Name the capital of Colombia."
NOTHING = "The model gave no answer."


class Exchange(NamedTuple):
    """A question and its answer, as far as it was shown.

    Attributes:
        instruction: What the person asked.
        input: The text that the instruction applies to; may be empty.
        answer: The answer.
    """

    instruction: str
    input: str = ""
    answer: str = ""


class Chat:
    """Answers questions of any number of conversations; it holds none of them.

    Args:
        responder: The model with its tokenizer and prompt style.
        history: Whether the model sees the earlier exchanges of a conversation.
        system: The text of a system turn before each conversation; empty: none.

    Raises:
        InputError: The prompt style takes no system turn, or leaves no room for an answer.
    """

    def __init__(self, responder: Responder, history: bool, system: str = "") -> None:
        self.responder, self.history, self.system = responder, history, system.strip()
        responder.prompt_ids(self.conversation(EMPTY))

    @property
    def about(self) -> str:
        """What the model sees of a conversation."""
        if not self.history:
            return "The model sees each instruction alone, none before it."
        return "The model sees the conversation so far."

    def conversation(self, instruction: str, input: str = "", before: Sequence[Exchange] = ()) -> Conversation:
        """The conversation that asks for an answer, with the exchanges before it if the model sees them."""
        system = [Turn("system", self.system)] if self.system else []
        exchanges = [*(before if self.history else ()), Exchange(instruction, input)]
        turns = [turn for asked in exchanges for turn in _turns(asked)]
        return Conversation((*system, *turns))

    def remark(self, conversation: Conversation) -> str:
        """What a person should know of the prompt; empty if all of it fits."""
        cut = self.responder.cut(conversation)
        earliest = "exchange was" if cut.exchanges == 1 else f"{cut.exchanges:,} exchanges were"
        parts = [f"The earliest {earliest} left out"] if cut.exchanges else []
        if cut.tokens:
            parts.append(f"the last {cut.tokens:,} tokens of the instruction were left out")
        remark = " and ".join(parts)
        return f"{remark[:1].upper()}{remark[1:]}: the model takes no more." if parts else ""

    def answer(self, conversation: Conversation) -> Generator[str, None, None]:
        """Yield the growing answer, all of it each time, at least once for each token."""
        return growing(self.responder.stream(conversation), self._marks)

    @cached_property
    def _marks(self) -> Marks:
        return Marks.of(self.responder.style, self.responder.tokenizer.control_tokens)


def _turns(asked: Exchange) -> tuple[Turn, ...]:
    """The turns of an exchange."""
    return Conversation.of(asked.instruction.strip(), asked.input.strip("\r\n"), asked.answer).turns
