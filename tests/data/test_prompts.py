import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data.prompts import ALPACA, CHATML, PHI3, STYLES, Example, extract_response, get_style
from instruct_lm.errors import InputError

WITH_INPUT = Example("Fix the spelling.", "freind", "friend")
WITHOUT_INPUT = Example("Name a colour.", "", "Red.")

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


@pytest.mark.parametrize(("style", "example", "text"), FULL_TEXTS)
def test_full_text_is_literal(style, example, text):
    assert style.full(example) == text


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("example", [WITH_INPUT, WITHOUT_INPUT])
def test_prompt_ends_before_the_header(style, example):
    assert style.full(example) == style.prompt(example) + style.header + example.output
    assert style.header not in style.prompt(example)


def test_chatml_prompt_closes_the_users_turn_and_leaves_the_end_token_to_the_encoder():
    assert CHATML.prompt(WITH_INPUT).endswith("<|im_end|>\n")
    assert CHATML.full(WITH_INPUT).count("<|im_end|>") == 1


def test_get_style_knows_three_names_and_lists_them_for_a_fourth():
    assert [get_style(name) for name in ("alpaca", "phi3", "chatml")] == [ALPACA, PHI3, CHATML]
    with pytest.raises(InputError, match=r"'vicuna' is unknown.*alpaca, phi3, chatml"):
        get_style("vicuna")


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
