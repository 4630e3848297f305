"""What follows a sweep: which evaluations are asked for, and what is said when one fails."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instruct_lm.commands import report, sweeps
from instruct_lm.errors import RunError
from tests.run_commands import commands


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield run


def sweep(command: Any, *args: str) -> Path:
    """The folders of a sweep with seeds 1 and 2, nothing trained."""
    settings = ["model=gpt2-tiny", "data=sample", "seed=1,2", "output_dir=sweep"]
    status, err, _ = command("train", "-m", *settings, *args)
    assert status == 0, err
    return Path("sweep").resolve()


@pytest.mark.parametrize(
    ("args", "models"),
    [
        ((), 1),
        (("data.batch_size=2,4",), 1),
        (("prompt=alpaca,phi3",), 2),
        (("data.limit=20,40",), 2),
        (("data.shuffle=true",), 2),
    ],
)
def test_runs_are_held_against_the_untuned_model_that_they_started_from(
    command: Any, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], models: int
) -> None:
    folder = sweep(command, *args)
    evaluated: list[Path] = []
    told: list[tuple[Any, ...]] = []

    def evaluate_run(run: Path, checkpoint: str) -> Path:
        assert checkpoint == "untuned"
        evaluated.append(run)
        return run / "evaluation"

    monkeypatch.setattr(sweeps, "evaluate_run", evaluate_run)
    monkeypatch.setattr(report, "write_report", lambda *arguments: told.append(arguments))
    sweeps.compare_runs(folder)
    assert len(evaluated) == len(set(evaluated)) == models
    ((runs, *files),) = told
    assert files == [folder / f"report.{suffix}" for suffix in ("html", "md", "svg")]
    assert runs[models:] == [str(folder)]
    names = [run.partition("=")[0] for run in runs[:models]]
    assert names == (["untuned"] if models == 1 else [f"untuned of {run.name}" for run in evaluated])


def test_a_failed_evaluation_says_how_to_go_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(sweep(command).glob("0_*"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(
        RunError, match=r"ended with status 1\. Go on .* with: python evaluate\.py run=\S+ checkpoint=best"
    ):
        sweeps.evaluate_run(run)


def test_other_processes_of_a_training_evaluate_nothing(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(sweep(command).glob("0_*"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert sweeps.evaluate_run(run) == run / "evaluation" / "test"
