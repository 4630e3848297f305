"""Files of answers, and the records of how they were made."""

import json
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.data.conversation import Conversation
from instruct_lm.errors import InputError
from instruct_lm.evaluation import responses as module
from instruct_lm.evaluation.responses import (
    answer_statistics,
    copy_responses,
    find_responses,
    load_responses,
    save_responses,
)
from instruct_lm.respond import Response

EXAMPLE = Conversation.of("Name a colour.", "", "Red.")
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

    def stop(value: Any, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_record", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a", {**MADE_BY, "seed": 2})
    assert find_responses(tmp_path / "a", MADE_BY) is None


@pytest.mark.parametrize("name", ["responses.json", "responses.made.json"])
def test_damaged_answers_are_not_found(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    file = save(tmp_path / "a").with_name(name)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"u", b"t", 1))  # one bit
    assert find_responses(tmp_path / "a", MADE_BY) is None
    assert f"{name} is damaged" in caplog.text
    file.write_bytes(content)
    assert find_responses(tmp_path / "a", MADE_BY) == tmp_path / "a"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{}", "a JSON list of entries with model_response: it holds a dict"),
        (b"[1,", "Expecting value"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
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
