import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.pieces import extract_response, prompt_text
from instruct_lm.data.prompts import ALPACA, CHATML, PHI3, STYLES, get_style
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError

WITH_INPUT = Conversation.of("Fix the spelling.", "freind", "friend")
WITHOUT_INPUT = Conversation.of("Name a colour.", "", "Red.")

FULL_TEXTS = [
    (
        ALPACA,
        WITH_INPUT,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nFix the spelling.\n\n### Input:\nfreind\n\n### Response:\nfriend",
    ),
    (
        ALPACA,
        WITHOUT_INPUT,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\nRed.",
    ),
    (PHI3, WITH_INPUT, "<|user|>\nFix the spelling.\nfreind\n<|assistant|>:\nfriend"),
    (PHI3, WITHOUT_INPUT, "<|user|>\nName a colour.\n<|assistant|>:\nRed."),
    (CHATML, WITH_INPUT, "<|im_start|>user\nFix the spelling.\nfreind<|im_end|>\n<|im_start|>assistant\nfriend"),
    (CHATML, WITHOUT_INPUT, "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nRed."),
]


def text_of(style, turns):
    return "".join("$" if piece.ends else piece.text for piece in style.pieces(turns))


@pytest.mark.parametrize(("style", "example", "text"), FULL_TEXTS)
def test_full_text_is_literal(style, example, text):
    assert text_of(style, example.turns) == text + "$" + style.after


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("example", [WITH_INPUT, WITHOUT_INPUT])
def test_prompt_ends_before_the_header(style, example):
    prompt = prompt_text(style, example.turns)
    assert text_of(style, example.turns) == prompt + style.header + example.reference + "$" + style.after
    assert style.header not in prompt


CHAT = (Turn("system", "S"), Turn("user", "A", "B"), Turn("assistant", "C"), Turn("user", "D"), Turn("assistant", "E"))
SEVERAL_TURNS = {
    "alpaca": "S\n\n### Instruction:\nA\n\n### Input:\nB\n\n### Response:\nC$"
    "\n\n### Instruction:\nD\n\n### Response:\nE$",
    "phi3": "<|system|>\nS\n<|user|>\nA\nB\n<|assistant|>:\nC$\n<|user|>\nD\n<|assistant|>:\nE$",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA\nB<|im_end|>\n<|im_start|>assistant\nC$\n"
    "<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\nE$\n",
}


@pytest.mark.parametrize("style", STYLES)
def test_several_turns_are_literal(style):
    assert text_of(STYLES[style], CHAT) == SEVERAL_TURNS[style]


def test_get_style_knows_its_names_and_lists_them_for_another():
    tokenizer = load_tokenizer("bytes")
    names = ", ".join(STYLES)
    assert [get_style(name, tokenizer) for name in ("alpaca", "phi3", "chatml")] == [ALPACA, PHI3, CHATML]
    with pytest.raises(InputError, match=rf"'absent' is unknown.*{names} and template"):
        get_style("absent", tokenizer)
    with pytest.raises(InputError, match=rf"bytes comes without a chat template. Choose one of {names}"):
        get_style("template", tokenizer)


@pytest.mark.parametrize(
    ("generated", "response"),
    [
        ("\n\n### Response:\nfriend\n", "friend"),  # the book: the model writes the header
        ("friend", "friend"),  # the header was part of the prompt
        ("", ""),
        ("\n\n### Response:\n", ""),
        ("a\n\n### Response:\nb", "a\n\n### Response:\nb"),
    ],
)
def test_extract_response(generated, response):
    assert extract_response(generated, ALPACA) == response


@given(st.sampled_from(list(STYLES.values())), st.text(st.characters(exclude_characters="#<")))
def test_extract_response_inverts_header_and_response(style, text):
    assert extract_response(style.header + text, style) == text.strip()
    assert extract_response(text, style) == text.strip()
