"""The prompt styles: constant texts around the turns, or the model's own chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Turn
from instruct_lm.data.pieces import Kind, Piece, PromptStyle, said
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError


@dataclass(frozen=True)
class PlainStyle:
    """A style of constant texts around the turns.

    Attributes:
        name: The name in the configuration group `prompt`.
        user: Text before a user turn.
        input_lead: Text between an instruction and a non-empty input.
        user_end: Text after a user turn.
        header: Text before a response.
        end: The control token that ends a response; empty: the tokenizer's own end token.
        after: Text after that token, trained with the response.
        between: Text between a response and the next turn.
        system: Text before a system turn.
        system_end: Text after it.
        default_system: Text that stands in place of a system turn where there is none.
        turns: Whether the style is made for several exchanges.
    """

    name: str
    user: str
    input_lead: str
    user_end: str
    header: str
    end: str = ""
    after: str = ""
    between: str = ""
    system: str = ""
    system_end: str = ""
    default_system: str = ""
    turns: bool = field(default=True, repr=False)  # not part of the token cache's key: it decides no id

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        r"""As for `PromptStyle`.

        Example:
            >>> for piece in ALPACA.pieces([Turn("user", "Add them.", "1, 2"), Turn("assistant", "3")]):
            ...     print(piece.kind.name, piece.own, repr(piece.text[-21:]))
            PROMPT True 't.\n\n### Instruction:\n'
            PROMPT False 'hem.\n\n### Input:\n1, 2'
            HEADER True '\n\n### Response:\n'
            RESPONSE False '3'
            RESPONSE True ''
        """
        return list(_joined(self._pieces(turns)))

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        if not turns or turns[0].role != "system":
            yield Piece(self.default_system, Kind.PROMPT)
        for previous, turn in zip((None, *turns), turns, strict=False):
            if previous and previous.role == "assistant":
                yield Piece(self.between, Kind.PROMPT)
            if turn.role == "assistant":
                yield Piece(self.header, Kind.HEADER)
                yield Piece(turn.text, Kind.RESPONSE, own=False)
                yield Piece(self.end, Kind.RESPONSE, ends=True)
                yield Piece(self.after, Kind.RESPONSE)
                continue
            before, after = (self.system, self.system_end) if turn.role == "system" else (self.user, self.user_end)
            yield Piece(before, Kind.PROMPT)
            yield Piece(said(turn, self.input_lead), Kind.PROMPT, own=False)
            yield Piece(after, Kind.PROMPT)


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces without empty ones of the style's own, neighbours of its own and of one kind joined."""
    held: Piece | None = None
    for piece in pieces:
        plain = piece.own and not piece.ends
        if plain and not piece.text:
            continue
        if plain and held and held.kind == piece.kind:
            held = held._replace(text=held.text + piece.text)
            continue
        if held:
            yield held
        held = piece if plain else None
        if not plain:
            yield piece
    if held:
        yield held


# "Build a Large Language Model From Scratch", chapter 7, `format_input`. A system turn takes the place of the preamble.
ALPACA = PlainStyle(
    "alpaca",
    user="\n\n### Instruction:\n",
    input_lead="\n\n### Input:\n",
    user_end="",
    header="\n\n### Response:\n",
    default_system="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    turns=False,
)
# The same chapter, exercise 7.1, for one exchange.
PHI3 = PlainStyle(
    "phi3",
    user="<|user|>\n",
    input_lead="\n",
    user_end="",
    header="\n<|assistant|>:\n",
    between="\n",
    system="<|system|>\n",
    system_end="\n",
)
# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md; SmolLM2-Instruct's and Qwen's chat templates
# without their system turn.
CHATML = PlainStyle(
    "chatml",
    user="<|im_start|>user\n",
    input_lead="\n",
    user_end="<|im_end|>\n",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    system="<|im_start|>system\n",
    system_end="<|im_end|>\n",
)

STYLES = {style.name: style for style in (ALPACA, PHI3, CHATML)}


def get_style(name: str, tokenizer: Tokenizer) -> PromptStyle:
    """Return a prompt style by its name; `template` is the chat template of the tokenizer's model.

    Raises:
        InputError: There is no such style, or the model has no chat template.
    """
    if name == "template":
        if not tokenizer.chat_template:
            raise InputError(
                f"prompt=template: {tokenizer.name} comes without a chat template. Choose one of {', '.join(STYLES)}."
            )
        return TemplateStyle(tokenizer.chat_template, tokenizer.template_variables, tokenizer.control_tokens)
    if name not in STYLES:
        raise InputError(f"prompt style {name!r} is unknown: choose one of {', '.join(STYLES)} and template.")
    return STYLES[name]
