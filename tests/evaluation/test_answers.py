"""Answers that are kept as they are made: whatever is interrupted, shared or damaged, the answers are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from instruct_lm.data.conversation import Conversation
from instruct_lm.data.prompts import ALPACA
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.evaluation.answers import answer_entries, forget_answers
from instruct_lm.model.generation import Sampling
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder, Response

MADE_BY = {"model": "tiny", "seed": 1}
EXAMPLES = [Conversation.of(f"{'Count. ' * (i % 4)}Add {i} and 3.", "", "It is.") for i in range(11)]


@pytest.fixture(scope="module")
def responder() -> Responder:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=257, block_size=400, n_layer=1, n_head=2, n_embd=16)
    sampling = Sampling(temperature=1.0, seed=5)
    return Responder(GPT(config).init_weights(3), load_tokenizer("bytes"), ALPACA, 6, sampling, batch_size=3)


@pytest.fixture(scope="module")
def expected(responder: Responder) -> list[Response]:
    return responder.answer(EXAMPLES)


def answered(
    responder: Responder, folder: Path, made_by: Any = MADE_BY, examples: Any = EXAMPLES, **options: Any
) -> tuple[Any, list[int]]:
    """The answers, and how many there were each time."""
    done: list[int] = []
    return answer_entries(responder, examples, folder, made_by, on_done=done.append, **options), done


def test_all_at_once_they_are_the_responders_own(
    responder: Responder, expected: list[Response], tmp_path: Path
) -> None:
    answers, done = answered(responder, tmp_path / "new")
    assert (answers, sum(done)) == (expected, 11)
    assert len({answer.text for answer in expected}) > 5
    assert answered(responder, tmp_path / "new") == (expected, [11])  # none is made twice
    forget_answers(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_interrupted_call_goes_on_to_the_same_answers(
    responder: Responder, expected: list[Response], tmp_path: Path
) -> None:
    seen: list[int] = []

    def stop(n: int) -> None:
        seen.append(n)
        if len(seen) % 2 == 0:  # after the first batch of each call
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            answer_entries(responder, EXAMPLES, tmp_path, MADE_BY, on_done=stop)
    assert seen == [0, 3, 3, 3]
    answers, done = answered(responder, tmp_path)
    assert (answers, done) == (expected, [6, 3, 2])


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_cut_file_costs_the_cut_batches(
    responder: Responder, expected: list[Response], tmp_path: Path, cut: int
) -> None:
    answered(responder, tmp_path)
    file = tmp_path / "answers.0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    answers, done = answered(responder, tmp_path)
    assert (answers, sum(done)) == (expected, 11)
    assert 4 < done[0] < 12


@pytest.mark.parametrize("key", ["text", "tokens", "index", "fingerprint", "check"])
def test_a_damaged_answer_is_made_again(
    responder: Responder, expected: list[Response], tmp_path: Path, key: str
) -> None:
    answered(responder, tmp_path)
    file = tmp_path / "answers.0.jsonl"
    lines = file.read_text().splitlines()
    place = lines[4].index(f'"{key}": ') + len(key) + 5
    lines[4] = lines[4][:place] + chr(ord(lines[4][place]) ^ 1) + lines[4][place + 1 :]
    file.write_text("\n".join(lines) + "\n")
    answers, done = answered(responder, tmp_path)
    assert (answers, done[0]) == (expected, 10)


def test_answers_of_something_else_do_not_count(responder: Responder, tmp_path: Path) -> None:
    answered(responder, tmp_path)
    assert answered(responder, tmp_path, {**MADE_BY, "seed": 2})[1][0] == 0
    fingerprints = {json.loads(line)["fingerprint"] for line in (tmp_path / "answers.0.jsonl").read_text().splitlines()}
    assert len(fingerprints) == 1
    assert answered(responder, tmp_path, {**MADE_BY, "seed": 2}, EXAMPLES[::-1])[1][0] == 0


def test_processes_share_them_whatever_their_number(
    responder: Responder, expected: list[Response], tmp_path: Path
) -> None:
    assert answered(responder, tmp_path, rank=1, world_size=3)[0] is None
    assert answered(responder, tmp_path, rank=0, world_size=3)[0] is None
    assert answered(responder, tmp_path, rank=0, world_size=2)[0] == expected  # stopped, and gone on with two
    assert answered(responder, tmp_path) == (expected, [11])
