"""Prompts as training has them, answers as the model meant them, and files that say how they were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.data.encoding import encode_examples
from instruct_lm.data.prompts import STYLES, Example, PromptStyle
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.evaluation import responses as module
from instruct_lm.evaluation.responses import (
    answer_statistics,
    copy_responses,
    find_responses,
    load_responses,
    save_responses,
)
from instruct_lm.io.files import file_stamps
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder, Response

BYTES = load_tokenizer("bytes")
MODEL = GPT(GPTConfig(vocab_size=257, block_size=300, n_layer=1, n_head=1, n_embd=8)).init_weights(0)
EXAMPLE = Example("Name a colour.", "", "Red.")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def responder(style: str = "alpaca", **options: Any) -> Responder:
    return Responder(MODEL, BYTES, STYLES[style], **options)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT | st.just(""), TEXT, st.sampled_from(sorted(STYLES)))
def test_a_prompt_is_what_training_puts_before_the_response(
    instruction: str, input: str, output: str, name: str
) -> None:
    example = Example(instruction, input, output)
    row = encode_examples([example], BYTES, STYLES[name])[0]
    asked = responder(name).prompt_ids(example)
    assert asked == row.input_ids[: row.prompt_length + row.header_length].tolist()
    assert bytes(row.input_ids[len(asked) : -1].tolist()).decode() == output


def test_control_tokens_of_smollm2_are_one_token_each(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    style = STYLES["chatml"]
    example = Example("Say <|im_end|>.", "", "Yes.")  # the user's is text
    row = encode_examples([example], tokenizer, style)[0]
    asked = Responder(MODEL, tokenizer, style).prompt_ids(example)
    assert asked == row.input_ids[: row.prompt_length + row.header_length].tolist()
    start, end = (tokenizer.encoding.encode_single_token(text) for text in ("<|im_start|>", "<|im_end|>"))
    assert [asked.count(start), asked.count(end)] == [2, 1]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_prompt_longer_than_the_model_keeps_its_ends(style: PromptStyle) -> None:
    asked = responder(style.name).prompt_ids(Example("x" * 100_000, "y", ""))
    text = BYTES.decode(asked)
    assert len(asked) == MODEL.config.block_size - 75
    assert text.startswith(style.opening + "xxx")
    assert text.endswith("xxx" + style.closing + style.header)
    assert responder(style.name).answer([Example("x" * 100_000, "y", "")])[0].tokens == 75
    assert responder(style.name).cut_tokens(Example("x" * 100_000, "y", "")) == len(
        style.opening + style.body(Example("x" * 100_000, "y", "")) + style.closing + style.header
    ) - len(asked)
    assert responder(style.name, max_new_tokens=3).answer([Example("x" * 100_000, "y", "")])[0].tokens == 3


def test_a_style_that_fills_the_model_is_named() -> None:
    small = GPT(GPTConfig(vocab_size=257, block_size=100, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(InputError, match=r"prompt=alpaca takes 1\d\d tokens.*model\.block_size=100"):
        Responder(small, BYTES, STYLES["alpaca"]).answer([EXAMPLE])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (b"Blue.", Response("Blue.", 6, ended=True)),
        (b"  Blue.\n", Response("Blue.", 9, ended=True)),
        (b"\n\n### Response:\nBlue.", Response("Blue.", 22, ended=True)),  # the header again, as the book prompts
        (b"Blue. ### Response:", Response("Blue. ### Response:", 20, ended=True)),
        (b"", Response("", 1, ended=True)),
        ("é".encode()[:1], Response("\ufffd", 2, ended=True)),
    ],
)
def test_answers_are_extracted(monkeypatch: pytest.MonkeyPatch, made: bytes, expected: Response) -> None:
    monkeypatch.setattr("instruct_lm.respond.generate", lambda *_, **__: [[*made, BYTES.end_of_text]])
    assert responder().answer([EXAMPLE]) == [expected]


def test_an_answer_without_end_token_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instruct_lm.respond.generate", lambda *_, **__: [list(b"Blue"), []])
    assert responder().answer([EXAMPLE, EXAMPLE]) == [Response("Blue", 4, ended=False), Response("", 0, ended=False)]


def test_answers_are_in_order_counted_and_equal_the_stream() -> None:
    torch.manual_seed(0)
    model = GPT(MODEL.config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)  # large enough that answers differ
    asked = [Example(f"{'word ' * n}?", "", "") for n in (1, 9, 3)]
    done: list[int] = []
    answering = Responder(model, BYTES, STYLES["alpaca"], max_new_tokens=12, batch_size=2)
    answers = answering.answer(asked, done.append)
    assert sum(done) == 3
    assert answers == [answering.answer([example])[0] for example in asked]
    assert [list(answering.stream(example))[-1] for example in asked] == [answer.text for answer in answers]
    assert len({answer.text for answer in answers}) == 3


MADE_BY = {"model": {"name": "gpt2"}, "seed": 1}
ANSWERS = [Response("Blue.", 3, ended=True), Response("Gre", 6, ended=False)]


def save(folder: Path, made_by: dict[str, Any] = MADE_BY) -> Path:
    save_responses(folder, [EXAMPLE, EXAMPLE], ANSWERS, made_by)
    return folder / "responses.json"


def test_saved_responses_are_the_books_list(tmp_path: Path) -> None:
    path = save(tmp_path)
    entry = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    assert load_responses(path) == [{**entry, "model_response": "Blue."}, {**entry, "model_response": "Gre"}]
    assert answer_statistics(path) == {"mean_tokens": 4.5, "ended": 0.5}


def test_responses_are_found_where_all_that_decides_them_is_equal(tmp_path: Path) -> None:
    save(tmp_path / "a")
    assert find_responses(tmp_path / "a", MADE_BY) == tmp_path / "a"
    assert find_responses(tmp_path / "b", MADE_BY) == tmp_path / "a"
    assert find_responses(tmp_path / "b", {**MADE_BY, "seed": 2}) is None
    (tmp_path / "a" / "responses.json").unlink()
    assert find_responses(tmp_path / "a", MADE_BY) is None


def test_copied_responses_keep_their_own_record_and_no_other(tmp_path: Path) -> None:
    other = save(tmp_path / "other", {**MADE_BY, "seed": 2})
    save(tmp_path / "here")
    copy_responses(other, load_responses(other), tmp_path / "here")
    assert find_responses(tmp_path / "here", MADE_BY) is None
    assert answer_statistics(tmp_path / "here" / "responses.json")["ended"] == 0.5
    foreign = tmp_path / "here" / "answers.json"
    foreign.write_text("[]")
    copy_responses(foreign, [{"model_response": "x"}], tmp_path / "here")
    assert answer_statistics(tmp_path / "here" / "responses.json") == {}
    assert answer_statistics(foreign) == {}


def test_stopped_between_the_two_files_nothing_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a")
    write = module.write_json

    def stop(value: Any, path: Path) -> None:
        if path.name == "responses.made.json":
            raise KeyboardInterrupt
        write(value, path)

    monkeypatch.setattr(module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a", {**MADE_BY, "seed": 2})
    assert find_responses(tmp_path / "a", MADE_BY) is None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{}", "expected a JSON list"),
        (b"[1,", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (None, "No such file"),
    ],
)
def test_a_file_that_holds_no_responses_is_named(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"answers\.json.*{part}"):
        load_responses(path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps([{"output": "é"}]), encoding="utf-8-sig")
    assert load_responses(tmp_path / "answers.json") == [{"output": "é"}]


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("one")
    before = file_stamps(path, None, "hf:a/b/c", tmp_path / "none")
    assert before == {str(path): [3, path.stat().st_mtime_ns]}
    path.write_text("other")
    assert file_stamps(path) != before
