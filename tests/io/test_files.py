"""Atomic writes: the old content or the new, and nothing left beside it."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from instruct_lm.errors import InputError
from instruct_lm.io.files import CONTENTS, clear_parts, content_hash, new_folder, replacing, sha256_of, write_json


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


def test_the_hash_of_a_folder_is_that_of_what_is_read_from_it(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    listed = [[name, hashlib.sha256(name.encode()).hexdigest()] for name in ("config.json", "model.safetensors")]
    expected = [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (listed, listed[:1])]
    assert [content_hash(tmp_path), content_hash(tmp_path, weights=False)] == expected
    (tmp_path / "README.md").write_text("other")
    assert content_hash(tmp_path) == expected[0]
    (tmp_path / "model.safetensors").write_text("other")
    assert content_hash(tmp_path) != expected[0]
    assert content_hash(tmp_path, weights=False) == expected[1]
    assert content_hash(tmp_path / "README.md") == hashlib.sha256(b"other").hexdigest()


def test_a_failed_write_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as failed, replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failed.value.filename == str(tmp_path / "a.json")


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"

    def write_and_stop() -> None:
        with new_folder(path, overwrite=True) as part:
            (part / "file").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []  # parents that it made are gone too
    with new_folder(path) as part:
        (part / "file").write_text("whole", encoding="utf-8")
        assert not path.exists()
    assert sorted(file.name for file in path.iterdir()) == [CONTENTS, "file"]
    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert (path / "file").read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_of_two_that_make_one_folder_the_second_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def late() -> None:
        with new_folder(path):
            path.mkdir()
            (path / "file").write_text("the other's", encoding="utf-8")

    with pytest.raises(InputError, match="holds file already"):
        late()
    assert (path / "file").read_text(encoding="utf-8") == "the other's"


def test_the_folder_that_was_there_comes_back_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / "out.99999999.old").mkdir()  # no such process: pids end before
    (tmp_path / "out.99999999.old" / "mine").touch()
    with pytest.raises(InputError, match="holds mine already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("record", [5, "model.safetensors", None, {"model.safetensors": 1}])
def test_a_damaged_record_gives_no_leave_to_replace(tmp_path: Path, record: object) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"mine")
    write_json({"files": record}, folder / CONTENTS)
    with pytest.raises(InputError, match="which no export wrote there"), new_folder(folder, overwrite=True):
        pass
    assert (folder / "model.safetensors").read_bytes() == b"mine"


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for length in (250, 300):
        with pytest.raises(InputError, match="File name too long"), new_folder(tmp_path / ("a" * length)):
            pass


def test_unfinished_files_of_dead_processes_go(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above Linux's largest process id
    names = [f"last.ckpt.{pid}.part" for pid in (dead, os.getpid(), os.getppid())]
    for name in [*names, f"best.ckpt.{dead}.part", "last.ckpt", "mine.part"]:
        (tmp_path / name).touch()
    clear_parts(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {names[2], "last.ckpt", "mine.part"}
