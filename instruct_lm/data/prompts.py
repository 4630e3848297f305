"""Instruction entries and the prompt styles that turn an entry into text.

A training text is the prompt (`opening + body + closing`), the response header and the response. The pieces are encoded
separately, for two reasons. The style's own text may hold control tokens such as `<|im_start|>`; the user's text never
does. And a prompt has the same ids whether a response follows (training) or not (generation).
"""

from dataclasses import dataclass
from typing import NamedTuple

from instruct_lm.errors import InputError


class Example(NamedTuple):
    """One instruction entry; `input` is empty if the instruction needs none. A tuple, so that Lightning can move it."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class PromptStyle:
    """The constant text around the user's own text.

    Attributes:
        name: The name in the configuration group `prompt`.
        opening: Text before the instruction.
        input_lead: Text between the instruction and a non-empty input.
        closing: Text that ends the prompt.
        header: Text that announces the response.
    """

    name: str
    opening: str
    input_lead: str
    closing: str
    header: str

    def body(self, example: Example) -> str:
        """The user's part of the prompt: the instruction, and the input if there is one."""
        return example.instruction + (self.input_lead + example.input if example.input else "")

    def prompt(self, example: Example) -> str:
        """The text before the response header."""
        return self.opening + self.body(example) + self.closing

    def full(self, example: Example) -> str:
        """Prompt, header and response, without the end token."""
        return self.prompt(example) + self.header + example.output


# "Build a Large Language Model From Scratch", chapter 7, `format_input`.
ALPACA = PromptStyle(
    "alpaca",
    opening="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    input_lead="\n\n### Input:\n",
    closing="",
    header="\n\n### Response:\n",
)
# The same chapter, exercise 7.1.
PHI3 = PromptStyle("phi3", opening="<|user|>\n", input_lead="\n", closing="", header="\n<|assistant|>:\n")
# SmolLM2-Instruct's own chat template without its system turn. The `<|im_end|>` of the user's turn is weighted as
# prompt; a trained response ends with the tokenizer's end token, as in every style.
CHATML = PromptStyle(
    "chatml", opening="<|im_start|>user\n", input_lead="\n", closing="<|im_end|>\n", header="<|im_start|>assistant\n"
)

STYLES = {style.name: style for style in (ALPACA, PHI3, CHATML)}


def get_style(name: str) -> PromptStyle:
    """Return a prompt style by its name.

    Raises:
        InputError: There is no such style.
    """
    if name not in STYLES:
        raise InputError(f"prompt style {name!r} is unknown: choose one of {', '.join(STYLES)}.")
    return STYLES[name]


def extract_response(generated: str, style: PromptStyle) -> str:
    r"""Return the response in a text that a model generated, without the response header and surrounding whitespace.

    A generated text begins with the header if the prompt did not end with it, as in the book. A header further on is
    the model's mistake, so it stays.

    Example:
        >>> extract_response("\n\n### Response:\nBlue.\n", ALPACA), extract_response("Blue. ### Response:", ALPACA)
        ('Blue.', 'Blue. ### Response:')
    """
    return generated.strip().removeprefix(style.header.strip()).strip()
