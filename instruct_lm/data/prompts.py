"""Instruction entries and the prompt styles that turn one into text.

A training text is `opening + body + closing` (the prompt), the response header, the response. The pieces are encoded
apart: the style's own text may hold control tokens such as `<|im_start|>`, the user's text never does, and a prompt has
the same ids whether a response follows (training) or not (generation).
"""

from dataclasses import dataclass

from instruct_lm.errors import InputError


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction entry; `input` is empty where the instruction needs none."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class PromptStyle:
    """How an `Example` becomes text: the constant text around the user's.

    Attributes:
        name: The choice in the configuration group `prompt`.
        opening: Text before the instruction, the same for every example.
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
        """The user's part of the prompt: the instruction and, if there is one, the input."""
        return example.instruction + (self.input_lead + example.input if example.input else "")

    def prompt(self, example: Example) -> str:
        """The text up to, but without, the response header."""
        return self.opening + self.body(example) + self.closing

    def response(self, example: Example) -> str:
        """The text to be learned; the tokenizer's end token follows it."""
        return example.output

    def full(self, example: Example) -> str:
        """Prompt, header and response, without the end token."""
        return self.prompt(example) + self.header + self.response(example)


ALPACA = PromptStyle(  # "Build a Large Language Model From Scratch", chapter 7, `format_input`
    name="alpaca",
    opening="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    input_lead="\n\n### Input:\n",
    closing="",
    header="\n\n### Response:\n",
)
PHI3 = PromptStyle(  # the same chapter, exercise 7.1
    name="phi3",
    opening="<|user|>\n",
    input_lead="\n",
    closing="",
    header="\n<|assistant|>:\n",
)
# SmolLM2-Instruct's own chat template without its system turn. The user's `<|im_end|>` closes the prompt, so it is
# weighted as prompt; a trained response ends with the tokenizer's end token, as in every style.
CHATML = PromptStyle(
    name="chatml",
    opening="<|im_start|>user\n",
    input_lead="\n",
    closing="<|im_end|>\n",
    header="<|im_start|>assistant\n",
)

STYLES = {style.name: style for style in (ALPACA, PHI3, CHATML)}


def get_style(name: str) -> PromptStyle:
    """Returns the prompt style of that name.

    Raises:
        InputError: If there is no such style.
    """
    if name not in STYLES:
        raise InputError(f"prompt style {name!r} is unknown: choose one of {', '.join(STYLES)}.")
    return STYLES[name]


def extract_response(generated: str, style: PromptStyle) -> str:
    """Returns the response in the text that a model wrote after a prompt, stripped of whitespace.

    The header is removed where the model wrote it itself (the book prompts without it) and is not missed where it was
    part of the prompt. Only a leading header is removed: one later on is the model's own mistake and stays visible.
    """
    return generated.strip().removeprefix(style.header.strip()).strip()
