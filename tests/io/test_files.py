"""Atomic writes: the old content or the new, and nothing left beside it."""

import hashlib
import json
from pathlib import Path

import pytest

from instruct_lm.io.files import file_stamps, replacing, sha256_of, write_json


def test_a_replaced_file_appears_at_the_end_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with replacing(path) as part:
        part.write_bytes(b"content")
        assert part.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_replacement_keeps_the_old_content(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write_and_fail() -> None:
        with replacing(path) as part:
            part.write_bytes(b"ne")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file.bin"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_its_letters(tmp_path: Path) -> None:
    write_json({"é": ["\u2028", 1.5, None]}, tmp_path / "file.json")
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": ["\u2028", 1.5, None]}
    assert "é" in text


def test_sha256_of_several_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file.bin").write_bytes(content)
    assert sha256_of(tmp_path / "file.bin") == hashlib.sha256(content).hexdigest()


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("one")
    before = file_stamps(path, None, "hf:a/b/c", tmp_path / "none")
    assert before == {str(path): [3, path.stat().st_mtime_ns]}
    path.write_text("other")
    assert file_stamps(path) != before
