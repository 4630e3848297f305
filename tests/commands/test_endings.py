"""What a training run says at its end: what is there, and commands that can be given."""

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from instruct_lm.commands import launch
from instruct_lm.commands.endings import explained
from instruct_lm.errors import RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.run_files import BEST, LAST
from instruct_lm.training.divergence import DivergedError
from tests.run_commands import typed


def run_with(folder: Path, *names: str) -> Any:
    """A run's configuration; its folder holds such checkpoints, of step 4."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": {}, "global_step": 4}, folder / name)
    return typed("train", "model=gpt2-tiny", f"output_dir={folder}")


def said(config: Any, error: BaseException) -> BaseException:
    with pytest.raises((RunError, SystemExit)) as raised, explained(config):
        raise error
    return raised.value


@pytest.mark.parametrize("names", [(), (LAST,), (BEST,), (LAST, BEST)])
def test_after_a_divergence_the_weights_that_are_there_can_be_used(tmp_path: Path, names: tuple[str, ...]) -> None:
    text = str(said(run_with(tmp_path, *names), DivergedError("train/loss is nan.")))
    assert text.startswith("train/loss is nan.\n")
    assert ("No checkpoint was written" in text) == (not names)
    assert [f"{Path(name).name} of step 4" in text for name in names] == [True] * len(names)
    assert ("evaluate.py run=" in text) == (BEST in names)
    assert "resume=" not in text  # it would diverge again
    assert "Lower optimizer.lr" in text


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoppedError("Stopped after step 4.", signal.SIGUSR1), 128 + signal.SIGUSR1),
        (processes.SignalReceived(signal.SIGTERM), 128 + signal.SIGTERM),
        (SystemExit(1), 128 + signal.SIGINT),  # Lightning's
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (launch.ProcessError("Process 1 of 2 was ended by SIGKILL."), 1),
    ],
)
def test_it_goes_on_where_it_was_or_starts_again(
    tmp_path: Path, error: BaseException, status: int, begun: bool
) -> None:
    ended = said(run_with(tmp_path, *[LAST] * begun), error)
    assert getattr(ended, "status", 1) == status
    assert f"train.py resume={tmp_path}" in str(ended)
    assert (" of step 4" in str(ended) or "ontinue with" in str(ended)) == begun
    assert ("tart again with" in str(ended)) != begun


@pytest.mark.parametrize("own", [True, False])
def test_a_lost_connection_is_told_by_whoever_started_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    for name in (processes.LAUNCHED, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(processes.LAUNCHED if own else "TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = said(run_with(tmp_path, LAST), RuntimeError("[gloo] Connection closed by peer"))
    if own:
        assert isinstance(ended, SystemExit)
        assert ended.code == launch.LOST
    else:
        assert "Another process of this run has ended.\nKept: " in str(ended)


def test_a_bug_stays_one(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(run_with(tmp_path)):
        raise ZeroDivisionError
