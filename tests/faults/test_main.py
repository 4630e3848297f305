"""The command `python -m faults`: its table and its exit status."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import __main__ as command
from faults.outcomes import Outcome, Skipped, table

GOOD = Outcome("SIGKILL", "kills:gpt2:1", survived=True, identical=True)
REFUSED = Outcome("damage", "damage:1", survived=True, identical=None)
LOST = Outcome("SIGKILL", "kills:gpt2:2", survived=False, identical=False, seen="a traceback")
DIFFERENT = Outcome("SIGKILL", "kills:gpt2:3", survived=True, identical=False, seen="a weight")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    found: dict = {}
    monkeypatch.setattr(command, "FAULTS", found)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results" / "table.md")
    return found


def test_a_row_counts_what_was_tried_what_survived_and_what_ended_alike() -> None:
    files = Outcome("files", "files:gguf", survived=True, times=9)
    rows = table([files, GOOD, LOST, GOOD, DIFFERENT, REFUSED, Skipped("disk", "needs root")]).splitlines()
    assert rows[2:] == [
        "| files | 9 | 9 | none to compare |",
        "| SIGKILL | 4 | 3 | 2 of 4 |",
        "| damage | 1 | 1 | none to compare |",
        "| disk | skipped: needs root | | |",
    ]


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [([GOOD, REFUSED, Skipped("disk", "needs root")], 0), ([GOOD, LOST], 1), ([DIFFERENT], 1)],
)
def test_the_status_is_0_only_if_all_was_survived_to_the_bit(
    faults: dict, outcomes: list, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults["mine"] = lambda options: outcomes
    page = tmp_path / "faults.md"
    page.write_text("Before.\n<!-- last run -->\nold\n<!-- end of last run -->\nAfter.\n")
    assert command.main(["mine", "--work", str(tmp_path), "--write", str(page)]) == status
    printed = capsys.readouterr().out
    assert table(outcomes) in printed
    assert table(outcomes) in (tmp_path / "results" / "table.md").read_text()
    text = page.read_text()
    assert text.startswith("Before.\n<!-- last run -->\n`python -m faults mine --seed 1`, ")
    assert text.endswith(f"{table(outcomes)}\n<!-- end of last run -->\nAfter.\n")
    assert len(list(tmp_path.glob("faults-*"))) == status  # what was lost stays, to be looked at


def test_a_fault_that_cannot_be_tried_is_not_survived(
    faults: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: object) -> Iterator[Outcome]:
        yield GOOD
        raise RuntimeError("train.py ended with 1")

    faults |= {"broken": broken, "mine": lambda options: [REFUSED]}
    assert command.main(["--work", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "train.py ended with 1" in printed.err
    assert "| broken, to be tried at all | 1 | 0 |" in printed.out
    assert "| damage | 1 | 1 |" in printed.out


def test_what_was_tried_before_ctrl_c_is_shown(
    faults: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> Iterator[Outcome]:
        yield GOOD
        signal.raise_signal(signal.SIGTERM)

    faults |= {"mine": interrupted, "other": lambda options: [REFUSED]}
    page = tmp_path / "faults.md"
    page.write_text("<!-- last run -->\nold\n<!-- end of last run -->\n")
    assert command.main(["--work", str(tmp_path), "--write", str(page)]) == 130
    printed = capsys.readouterr().out
    assert "minutes: stopped early." in printed
    assert table([GOOD]) in printed
    assert "old" in page.read_text()  # a run that is not whole is not the last run


def test_only_what_is_named_is_tried(faults: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults |= {"one": lambda options: [GOOD], "other": lambda options: [LOST] if options.wants("other:x") else []}
    assert command.main(["--only", "one:1", "--work", str(tmp_path)]) == 0
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "other:y", "--work", str(tmp_path)])
    assert ended.value.code == 2
    assert "--only other:y: there is no such fault" in capsys.readouterr().err


def test_an_unknown_fault_is_refused(faults: dict, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["earthquake"])
    assert ended.value.code == 2
    assert "no fault earthquake" in capsys.readouterr().err
