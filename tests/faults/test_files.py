"""Hostile files of every kind: a result or a documented error; and a reader that is at fault is found."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from faults import files
from faults.options import Options
from instruct_lm.errors import InputError


def test_hostile_files_end_in_a_result_or_a_documented_error() -> None:
    rows = files.run(360, seed=7)
    assert [row.kind for row in rows] == list(files.KINDS)
    assert not any(row.faults for row in rows), [row.faults for row in rows]
    assert all(row.inputs == row.results + row.refused == 60 for row in rows)
    assert all(row.results for row in rows)
    assert all(row.refused for row in rows if row.kind != "scores")  # a reply without a score is a result


def _hangs() -> None:
    while True:
        pass


def _takes_all_memory() -> None:
    bytearray(2 * files.MEMORY)


def _ends_its_process() -> None:
    os._exit(7)


def _gives_a_traceback() -> None:
    raise KeyError("x")


def _writes_to_the_terminal() -> None:
    error = InputError("x")
    error.__class__ = type("Loud", (InputError,), {"__str__": lambda self: "\x1b[2J"})
    raise error


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (_hangs, "Hang: over"),
        (_takes_all_memory, "MemoryError"),
        (_ends_its_process, "its process ended with status 7"),
        (_gives_a_traceback, "test_files.py:.*KeyError: 'x'"),
        (_writes_to_the_terminal, "a documented error with"),
    ],
)
def test_a_reader_that_is_at_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], None], words: str
) -> None:
    def every_third(random: Random, folder: Path) -> Callable[[], object]:
        return read if random.random() < 0.34 else lambda: None

    monkeypatch.setitem(files.KINDS, "bad", every_third)
    monkeypatch.setattr(files, "SLOW", 0.2)
    row = files.run(9, seed=1, kinds=["bad"], context="fork")[0]
    assert row.inputs == 9
    assert 0 < row.n_faults < 9
    assert row.results == 9 - row.n_faults
    (found,) = row.faults
    assert re.search(words, found)
    good, bad = files.outcomes(row)
    assert (good.survived, good.times) == (True, row.results)
    assert (bad.survived, bad.times, bad.seen) == (False, row.n_faults, found)
    assert bad.name == f"files:bad:{row.faults[found][0]}"


def test_a_name_repeats_one_input(tmp_path: Path) -> None:
    [outcome] = files.files(Options(tmp_path, inputs=6000, only="files:index:17"))
    assert (outcome.name, outcome.times, outcome.survived) == ("files:index", 1, True)


def test_an_input_follows_from_its_kind_seed_and_number(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.KINDS["data"](Random("data 1 5"), tmp_path / name)
        made.append([path.read_bytes() for path in (tmp_path / name).iterdir()])
    assert made[0] == made[1]
