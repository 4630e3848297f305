"""Growing texts of a model made safe to show."""

import doctest
import itertools
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.decoders import ByteFallback

from instruct_lm.commands import chat_text
from instruct_lm.commands.chat_text import Marks, growing, visible
from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.prompts import ALPACA, CHATML, PHI3
from instruct_lm.respond import Responder
from tests.test_respond import BYTES, MODEL

NO_MARKS = Marks("", ())
# Bidi_Control of https://www.unicode.org/Public/UCD/latest/ucd/PropList.txt
BIDI_CONTROLS = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
# Format characters that are seen: Prepended_Concatenation_Mark of the same file, and what stacks hieroglyphs.
SEEN = {*map(chr, range(0x600, 0x606)), *"\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
SEEN |= set(map(chr, range(0x13430, 0x13440)))
SPECIAL = (
    "\x00\x07\x08\x1b[]0;m\r\n\t\x7f\x85\x9b\xad\u061c\u200b\u200c\u200d\u200e\u2028\u202e\u2066\ufe0f\ufeff\ufffd"
)
PARTS = st.characters(exclude_categories=[]) | st.sampled_from(
    [*SPECIAL, *"\ud800\uffff\U000e0041\U000e007f\U000e0100 aé👩\U0001f3fd🇩🏴م", "### Response:", "### Instruction:"]
)
HOSTILE = st.lists(PARTS, max_size=40).map("".join)
LEGITIMATE = [
    "👩‍👩‍👧‍👦 👩🏽‍🔬 ❤️ ☎︎ 1️⃣ 🇨🇴🇩🇪 🏳️‍🌈 🏴‍☠️",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f Scotland",
    "e\u0301 ñ Việt, Z͑͗a",
    "שָׁלוֹם مرحبا",
    "می\u200cخواهم",  # Persian
    "क्\u200dष श्री\u200c",  # Hindi
    "葛\U000e0100城",
    "a\tb\n  c",
    "<b>&amp;</b> ![a](http://x) $x^2$ \\u001b",
]


def forbidden(text: str) -> set[str]:
    """What must never be shown."""
    return {
        c
        for c in text
        if (unicodedata.category(c) == "Cc" and c not in "\n\t")
        or unicodedata.category(c) == "Cs"
        or c in BIDI_CONTROLS
    }


def test_every_character_that_is_not_seen_is_dropped() -> None:
    for i in range(0x110000):
        character = chr(i)
        shown = visible(f"a{character}b")
        category, kept = unicodedata.category(character), shown == f"a{character}b"
        if category in ("Cc", "Zl", "Zp"):
            line = character in "\n\r\v\f\x85\u2028\u2029"
            assert shown == ("a\tb" if character == "\t" else "a\nb" if line else "ab"), hex(i)
        elif category == "Cf":
            assert kept == (character in SEEN), hex(i)
        elif category == "Cs":
            assert shown == "a\ufffdb", hex(i)
        elif category == "Cn":
            hidden = 0xE0000 <= i <= 0xE0FFF or i in (0xFFFE, 0xFFFF) or 0xFDD0 <= i <= 0xFDEF
            assert kept != (hidden or i == 0x2065 or 0xFFF0 <= i <= 0xFFF8), hex(i)  # others: newer than this Python
        else:
            assert kept, hex(i)


@pytest.mark.parametrize("text", LEGITIMATE)
def test_text_of_people_stays(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "]8;;http://x\\link]8;;\\"),
        ("safe\rEVIL", "safe\nEVIL"),
        ("pass\u200dword\u200c", "password"),
        ("😀\ufe0f\ufe0f\u200d\u200d\u200c😀", "😀\ufe0f\u200d😀"),
        (" \ufe0f\u200dx", " x"),
        ("🏴\U000e0067\U000e0062x", "🏴x"),  # no flag: tags that hide something
        ("hi\U000e0068\U000e0069", "hi"),
    ],
)
def test_hidden_text_and_commands_of_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(HOSTILE)
def test_nothing_forbidden_is_shown_and_once_is_enough(text: str) -> None:
    shown = visible(text)
    assert not forbidden(shown)
    assert visible(shown) == shown


def prefixes(text: str, cuts: Sequence[int]) -> list[str]:
    """What a byte-level tokenizer decodes after each token."""
    whole = text.encode(errors="replace")
    return [
        whole[:cut].decode(errors="replace") for cut in (*sorted(cut % (len(whole) + 1) for cut in cuts), len(whole))
    ]


@given(HOSTILE, st.lists(st.integers(0, 200), max_size=40), st.sampled_from([NO_MARKS, Marks.of(ALPACA)]))
def test_a_growing_text_is_never_taken_back(text: str, cuts: list[int], marks: Marks) -> None:
    shown = list(growing(prefixes(text, cuts), marks))
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert not any(mark in shown[-1] for mark in marks.all)
    assert not forbidden(shown[-1])
    if marks == NO_MARKS:
        assert shown[-1].strip() == visible(text.encode(errors="replace").decode().rstrip("\ufffd")).strip()


@given(st.binary(max_size=20))
def test_bytes_that_are_decoded_anew_are_not_taken_back(data: bytes) -> None:
    # As TinyLlama's tokenizer: a run of bytes becomes U+FFFD each when one that is not UTF-8 joins it.
    texts = ["".join(ByteFallback().decode([f"<0x{b:02X}>" for b in data[:n]])) for n in range(len(data) + 1)]
    shown = list(growing(texts, NO_MARKS))
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))


@pytest.mark.parametrize(
    "emoji", ["👩‍👩‍👧‍👦", "🇨🇴", "❤️", "👩🏽‍🔬", "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"]
)
def test_no_half_of_an_emoji_is_shown(emoji: str) -> None:
    text = f"a {emoji}{emoji} b"
    shown = set(growing(prefixes(text, range(200)), NO_MARKS))
    assert shown == {"", "a", f"a {emoji}", f"a {emoji}{emoji}", text}


def test_an_emoji_at_the_end_is_shown_when_the_answer_ends() -> None:
    assert list(growing(["ok", "ok 👍"], NO_MARKS)) == ["ok", "ok", "ok 👍"]
    assert list(growing([], NO_MARKS)) == [""]


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("### Response:\nBlue.", "Blue."),
        ("\n### Response:\n\n### Response: Blue.", "Blue."),
        ("Blue.\n\n### Response:\nRed.", "Blue."),
        ("Blue. ### Instruction:\nName another.\n\n### Response:\nRed.", "Blue."),
        ("### Instruction:\nName another.", ""),
        ("Blue ###\u200b Response: Red", "Blue"),
        ("C# and ### Res", "C# and ### Res"),  # the answer ended there: no mark
        ("## Response\nBlue.", "## Response\nBlue."),
    ],
)
def test_a_model_that_writes_both_sides(says: str, shown: str) -> None:
    grown = list(growing(prefixes(says, range(200)), Marks.of(ALPACA)))
    assert grown[-1] == shown
    assert all(shown.startswith(text) for text in grown)


def test_nothing_is_generated_after_a_mark() -> None:
    read = []
    texts = (read.append(text) or text for text in ["Blue", "Blue<|user|>", "more"])  # type: ignore[func-returns-value]
    assert list(growing(texts, Marks.of(PHI3))) == ["Blue", "Blue"]
    assert read == ["Blue", "Blue<|user|>"]


def test_the_marks_of_templates() -> None:
    llama = (
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    )
    style = TemplateStyle(llama, {}, ["<|start|>", "<|end|>", "<|eot|>"])
    assert Marks.of(style) == Marks(
        "<|start|>assistant<|end|>", ("<|eot|>", "<|start|>user<|end|>", "<|start|>system<|end|>")
    )
    mistral = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    assert Marks.of(TemplateStyle(mistral, {}, ["</s>"])) == Marks("[/INST]", ("</s>", "[INST]"))
    assert Marks.of(TemplateStyle(mistral, {}, ["</s>"]), ["</s>"]) == Marks("[/INST]", ("[INST]",))
    named = "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Bot' }}: {{ m.content }}\n{% endfor %}"
    marks = Marks.of(TemplateStyle(named, {}, []))
    assert (marks.header, "User:" in marks.others) == ("Bot:", True)
    assert list(growing(["A FAQ for User: none.\nUser: hi"], marks))[-1] == "A FAQ for User: none."
    assert Marks.of(CHATML).header == "<|im_start|>assistant"


def test_the_examples_are_true() -> None:
    assert doctest.testmod(chat_text).failed == 0


def test_every_answer_of_a_model_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    answering = Responder(MODEL, BYTES, ALPACA, max_new_tokens=50)
    from instruct_lm.commands.chat_session import Chat

    chat = Chat(answering, history=False)
    shown = list(chat.answer(chat.conversation("Name a colour.")))
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert not forbidden(shown[-1])
