"""Prompts as in training, and answers as the model generated them."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.encoding import encode_conversations
from instruct_lm.data.pieces import Kind, prompt_pieces
from instruct_lm.data.prompts import STYLES, PlainStyle
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder, Response
from tests.data.hub_tokenizers import train, write_folder

BYTES = load_tokenizer("bytes")
MODEL = GPT(GPTConfig(vocab_size=257, block_size=300, n_layer=1, n_head=1, n_embd=8)).init_weights(0)
ROOMY = GPT(GPTConfig(vocab_size=257, block_size=600, n_layer=1, n_head=1, n_embd=8))  # no prompt of a test is cut
EXAMPLE = Conversation.of("Name a colour.", "", "Red.")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def responder(style: str = "alpaca", **options: Any) -> Responder:
    return Responder(MODEL, BYTES, STYLES[style], **options)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT | st.just(""), TEXT, st.sampled_from(sorted(STYLES)))
def test_a_prompt_is_what_training_puts_before_the_response(
    instruction: str, input: str, output: str, name: str
) -> None:
    example = Conversation.of(instruction, input, output)
    row = encode_conversations([example], BYTES, STYLES[name])[0]
    asked = Responder(ROOMY, BYTES, STYLES[name]).prompt_ids(example)
    assert asked == row.input_ids[row.kinds != Kind.RESPONSE].tolist()
    assert bytes(row.input_ids[len(asked) :].tolist()[: len(output.encode())]).decode() == output


def test_control_tokens_of_smollm2_are_one_token_each(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    style = STYLES["chatml"]
    example = Conversation.of("Say <|im_end|>.", "", "Yes.")  # the user's is text
    row = encode_conversations([example], tokenizer, style)[0]
    asked = Responder(MODEL, tokenizer, style).prompt_ids(example)
    assert asked == row.input_ids[row.kinds != Kind.RESPONSE].tolist()
    start, end = (tokenizer.control_tokens[text] for text in ("<|im_start|>", "<|im_end|>"))
    assert [asked.count(start), asked.count(end)] == [2, 1]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_prompt_longer_than_the_model_keeps_its_ends(style: PlainStyle) -> None:
    long = Conversation.of("x" * 100_000, "y")
    asked = responder(style.name).prompt_ids(long)
    text = BYTES.decode(asked)
    assert len(asked) == MODEL.config.block_size - 75
    assert text.startswith(style.default_system + style.user + "xxx")
    assert text.endswith("xxx" + style.user_end + style.header)
    assert responder(style.name).answer([long])[0].tokens == 75
    whole = "".join(piece.text for piece in prompt_pieces(style.pieces(long.turns)))
    assert responder(style.name).cut_tokens(long) == len(whole) - len(asked)
    assert responder(style.name).cut(long) == (0, len(whole) - len(asked))
    assert responder(style.name, max_new_tokens=3).answer([long])[0].tokens == 3


def test_a_long_conversation_keeps_its_system_turn_and_its_last_question() -> None:
    turns = [Turn("system", "Be brief."), *[Turn("user", "x" * 90), Turn("assistant", "#" * 90)] * 9]
    asked = BYTES.decode(
        responder("chatml").prompt_ids(Conversation((*turns, Turn("user", "z"), Turn("assistant", ""))))
    )
    assert asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert asked.endswith("<|im_start|>user\nz<|im_end|>\n<|im_start|>assistant\n")
    assert "#" not in asked


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(("exchanges", "asked", "left_out"), [(1, 10, 0), (9, 10, 5), (9, 1000, 9)])
def test_what_a_prompt_leaves_out_is_counted(system: str, exchanges: int, asked: int, left_out: int) -> None:
    # A token a character, 225 of 300 for the prompt. An exchange takes 50, the question 2 more than its text.
    style = PlainStyle("short", "Q", "", "", "A", system="S")
    turns = [Turn("system", system)] if system else []
    turns += [Turn("user", "x" * 29), Turn("assistant", "y" * 18)] * exchanges
    turns += [Turn("user", "z" * asked), Turn("assistant", "")]
    rest = (exchanges - left_out) * 50 + asked + 2 + (len(system) + 1 if system else 0)
    assert Responder(MODEL, BYTES, style).cut(Conversation(tuple(turns))) == (left_out, max(0, rest - 225))


class Pairs:
    """One token for two characters, so that tokens reach from what people wrote into the style's own text."""

    name, bos, end_of_text = "pairs", None, 256
    control_tokens: dict[str, int] = {}  # noqa: RUF012
    end_token = Tokenizer.end_token

    def encode_parts(self, texts: list[str]) -> list[list[int]]:
        whole, ends = "".join(texts), [0, *accumulate(map(len, texts))]
        return [[ord(whole[at]) for at in range(start + start % 2, end, 2)] for start, end in pairwise(ends)]

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        return []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 700), st.sampled_from(["", "Be", "Be so"]))
def test_tokens_across_pieces_are_not_counted_as_left_out(lengths: list[int], asked: int, system: str) -> None:
    style = PlainStyle("short", "Q", "", "", "A", system="S")
    turns = [Turn("system", system)] if system else []
    turns += [turn for n in lengths for turn in (Turn("user", "x" * n), Turn("assistant", "y" * n))]
    turns += [Turn("user", "z" * asked), Turn("assistant", "")]
    conversation = Conversation(tuple(turns))
    asks = Responder(MODEL, Pairs(), style)  # type: ignore[arg-type]
    ids, (exchanges, tokens) = asks.prompt_ids(conversation), asks.cut(conversation)
    assert 0 <= exchanges <= len(lengths)
    left = ids.count(ord("z"))
    assert (tokens == 0) == (len(ids) < 225 or left >= asked // 2)
    if tokens:  # the question, encoded by itself, lost them
        assert (exchanges, tokens) == (len(lengths), (asked + 1) // 2 - left)


def test_a_style_that_fills_the_model_is_named() -> None:
    small = GPT(GPTConfig(vocab_size=257, block_size=100, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(InputError, match=r"prompt=alpaca takes 1\d\d tokens.*model\.block_size=100"):
        Responder(small, BYTES, STYLES["alpaca"]).answer([EXAMPLE])


@pytest.mark.parametrize(("own", "room"), [(297, 2), (298, 1), (299, 0)])
def test_a_style_that_nearly_fills_the_model_leaves_the_answer_what_room_there_is(own: int, room: int) -> None:
    tight = Responder(MODEL, BYTES, PlainStyle("long", "Q" * (own - 1), "", "", "A"))  # of 300 tokens
    if room:
        assert tight.answer([Conversation.of("x", "", "")])[0].tokens == room
    else:
        with pytest.raises(InputError, match="prompt=long takes 299 tokens, which leaves no room for an answer"):
            tight.answer([Conversation.of("x", "", "")])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (b"Blue.", Response("Blue.", 6, ended=True)),
        (b"  Blue.\n", Response("Blue.", 9, ended=True)),
        (b"\n\n### Response:\nBlue.", Response("Blue.", 22, ended=True)),  # the header again, as the book prompts
        (b"Blue. ### Response:", Response("Blue. ### Response:", 20, ended=True)),
        (b"", Response("", 1, ended=True)),
        ("é".encode()[:1], Response("\ufffd", 2, ended=True)),
        ([66, 300, 108], Response("Bl", 4, ended=True)),  # 300: a row of the embedding without a token
    ],
)
def test_answers_are_extracted(monkeypatch: pytest.MonkeyPatch, made: Sequence[int], expected: Response) -> None:
    monkeypatch.setattr("instruct_lm.respond.generate", lambda *_, **__: [[*made, BYTES.end_of_text]])
    assert responder().answer([EXAMPLE]) == [expected]


@pytest.mark.parametrize(("style", "ended"), [("chatml", True), ("alpaca", False)])
def test_the_end_token_of_a_style_ends_an_answer_where_no_file_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: str, ended: bool
) -> None:
    folder = write_folder(tmp_path, train("smollm"), tokenizer_config={"eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(folder)
    made, told = [*tokenizer.encode("Blue."), tokenizer.control_tokens["<|im_end|>"]], set[int]()
    monkeypatch.setattr(
        "instruct_lm.respond.generate", lambda *_, **options: told.update(options["end_tokens"]) or [made]
    )
    response = Responder(MODEL, tokenizer, STYLES[style]).answer([EXAMPLE])[0]
    assert (response.ended, made[-1] in told) == (ended, ended)
    assert response.text == ("Blue." if ended else "Blue.<|im_end|>")


def test_an_answer_without_end_token_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instruct_lm.respond.generate", lambda *_, **__: [list(b"Blue"), []])
    assert responder().answer([EXAMPLE, EXAMPLE]) == [Response("Blue", 4, ended=False), Response("", 0, ended=False)]


def test_answers_are_in_order_counted_and_equal_the_stream() -> None:
    model = GPT(MODEL.config)
    torch.manual_seed(0)  # of the parameters below alone
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)  # large enough that answers differ
    asked = [Conversation.of(f"{'word ' * n}?", "", "") for n in (1, 9, 3)]
    done: list[int] = []
    answering = Responder(model, BYTES, STYLES["alpaca"], max_new_tokens=12, batch_size=2)
    answers = answering.answer(asked, done.append)
    assert sum(done) == 3
    assert answers == [answering.answer([example])[0] for example in asked]
    assert [list(answering.stream(example))[-1] for example in asked] == [answer.text for answer in answers]
    assert len({answer.text for answer in answers}) == 3
