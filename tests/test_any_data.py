"""Any instruction data from the outside: chat data through training and evaluation, data that change under a run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evaluate
import train
from tests.conftest import ROOT
from tests.run_commands import commands

TINY = ["model=gpt2-tiny", "trainer.max_steps=2", "data.batch_size=4", "trainer.progress=false", "device=cpu"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command in this process, in a folder of its own."""
    mains = {"train": train.main, "evaluate": evaluate.main}
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield lambda name, *args: run(name, *args, main=mains[name])[:2]


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def sums(n: int = 40) -> list[dict[str, Any]]:
    return [{"instruction": f"Add {i} and {i + 3}.", "output": f"It is {2 * i + 3}."} for i in range(n)]


def test_the_entries_that_come_with_the_package_are_recorded_too(command: Any, tmp_path: Path) -> None:
    assert command("train", *TINY, "data=sample", "data.limit=40", "output_dir=run")[0] == 0
    record = json.loads((tmp_path / "run" / "made_from.json").read_text())["data"]
    file = ROOT / "instruct_lm" / "data" / "sample.json"
    assert record == {"source": "sample", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_data_that_change_under_a_run_are_refused(command: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "data.json", sums())
    assert command("train", *TINY, f"data.source={data}", "output_dir=run")[0] == 0
    record = json.loads((tmp_path / "run" / "made_from.json").read_text())
    assert record["data"]["source"] == str(data)
    summary = (tmp_path / "run" / "summary.json").read_bytes()

    write(data, sums(30))
    for name, arguments in (("train", ["resume=run", "trainer.max_steps=3"]), ("evaluate", ["run=run"])):
        status, err = command(name, *arguments)
        assert status == 2
        assert f"{data} has changed since the run" in err
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary
    # Another file is another data set, and may be answered.
    other = write(tmp_path / "other.json", sums(30))
    assert command("evaluate", "run=run", f"data.source={other}", "generation.max_new_tokens=2")[0] == 0

    write(data, sums())
    assert command("train", "resume=run", "trainer.max_steps=3")[0] == 0
    assert command("evaluate", "run=run", "generation.max_new_tokens=2")[0] == 0


def test_a_folder_that_holds_no_run_yet_takes_other_data(command: Any, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint leaves its record; the same command starts anew."""
    data = write(tmp_path / "data.json", sums())
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "made_from.json", {"data": {"source": str(data), "sha256": "0" * 64}})
    assert command("train", *TINY, f"data.source={data}", "output_dir=run")[0] == 0
    assert json.loads((tmp_path / "run" / "made_from.json").read_text())["data"]["sha256"] != "0" * 64
