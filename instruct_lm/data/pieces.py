"""Pieces of text, each with its part in the loss: what a prompt style makes of the turns of a conversation.

They tell the style's own text, which may hold control tokens such as `<|im_start|>`, from what people wrote, which
never does; and what is trained from what is not.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from instruct_lm.data.conversation import Turn


class Kind(IntEnum):
    """A token's part in the loss."""

    PROMPT = 0
    HEADER = 1  # announces a response
    RESPONSE = 2  # with what ends it


class Piece(NamedTuple):
    """A text of one kind.

    Attributes:
        text: The text.
        kind: Its part in the loss.
        own: Whether it is the style's own text, in which control tokens are recognised.
        ends: Whether it is the end token of a response: the control token `text`, or the tokenizer's own end token if
            its vocabulary has no such token.
    """

    text: str
    kind: Kind
    own: bool = True
    ends: bool = False


class PromptStyle(Protocol):
    """What training, generation and chat know of a prompt style."""

    @property
    def name(self) -> str:
        """The name in the configuration group `prompt`."""

    @property
    def header(self) -> str:
        """The text that announces a response."""

    @property
    def end(self) -> str:
        """The control token that ends a response; empty: the tokenizer's own end token."""

    @property
    def turns(self) -> bool:
        """Whether the style is made for several exchanges, so that a chat shows the model the earlier ones."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """The pieces of turns, the last of them the assistant's.

        Each turn is one piece that is not the style's own; that of an assistant turn is of kind RESPONSE.
        """


def said(turn: Turn, input_lead: str) -> str:
    """The text of a turn with its input, if it has one."""
    return turn.text + (input_lead + turn.input if turn.input else "")


def prompt_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces before the text of the last response."""
    last = max(i for i, piece in enumerate(pieces) if piece.kind == Kind.RESPONSE and not piece.own)
    return list(pieces[:last])


def prompt_text(style: PromptStyle, turns: Sequence[Turn]) -> str:
    r"""The text before the last response and its header.

    Example:
        >>> from instruct_lm.data.prompts import PHI3
        >>> prompt_text(PHI3, [Turn("user", "Name a colour."), Turn("assistant", "Red.")])
        '<|user|>\nName a colour.'
    """
    pieces = prompt_pieces(style.pieces(turns))
    while pieces and pieces[-1].kind == Kind.HEADER:
        pieces.pop()
    return "".join(piece.text for piece in pieces)


def full_text(style: PromptStyle, turns: Sequence[Turn]) -> str:
    """The whole text that training sees, without end tokens that have no text in this style."""
    return "".join(piece.text for piece in style.pieces(turns))


def extract_response(generated: str, style: PromptStyle) -> str:
    r"""Return the response in a text that a model generated, without the response header and surrounding whitespace.

    A generated text begins with the header if the prompt did not end with it, as in the book. A header further on is
    the model's mistake, so it stays.

    Example:
        >>> from instruct_lm.data.prompts import ALPACA
        >>> extract_response("\n\n### Response:\nBlue.\n", ALPACA), extract_response("Blue. ### Response:", ALPACA)
        ('Blue.', 'Blue. ### Response:')
    """
    return generated.strip().removeprefix(style.header.strip()).strip()
