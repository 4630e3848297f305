"""The short form of `make faults`: a few of each kind, on commands that a forking server starts."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from faults.commands import Job, call
from faults.compare import differences
from faults.damage import damage
from faults.disk import disk
from faults.kills import kills
from faults.kinds import reference
from faults.options import Options
from faults.outcomes import Outcome, Skipped
from faults.owners import owners
from faults.servers import servers
from tests import run_commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals and no forking server"),
]
Fault = Callable[[Options], Iterable[Outcome | Skipped]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def test_a_forked_command_does_what_a_fresh_process_does(work: Path) -> None:
    forked = reference("gpt2", work)
    fresh = work / "fresh"
    settings = [item for item in forked.first if not item.startswith("output_dir=")]
    run_commands.call("train.py", *settings, f"output_dir={fresh}", cwd=work)
    assert differences(forked.folder, fresh) == []


def test_a_forked_command_ends_as_a_process_does(work: Path) -> None:
    ended = call("train.py", "trainer.max_epoch=2", folder=work)
    assert (ended.status, ended.refused) == (2, True)
    assert "trainer.max_epochs" in ended.said
    job = Job("train.py", "--help", folder=work)
    job.send(signal.SIGKILL)
    assert job.wait().status == -signal.SIGKILL
    assert call("faults.no_such_module", folder=work).is_clean is False


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can read what nobody may")
def test_a_limited_command_cannot_read_what_nobody_may(work: Path) -> None:
    answers = work / "answers.json"
    answers.write_text("[]")
    answers.chmod(0)
    command = ("evaluate.py", f"responses={answers}", f"output_dir={work / 'limited'}")
    assert "Permission denied" in call(*command, folder=work, limited=True).said
    assert "Permission denied" not in call(*command, folder=work).said


@pytest.mark.parametrize(
    ("fault", "only"),
    [
        (kills, "kills:llama-lora-dropout:7"),
        (disk, "disk:checkpoint:1"),
        (damage, "damage:resume:checkpoints/last.ckpt:truncated"),
        (damage, "damage:evaluate:checkpoints/best.ckpt:a bit flipped"),
        (servers, "servers:judge:says control characters"),
        (owners, "owners:seconds apart:1"),
        (owners, "owners:over the run"),
    ],
)
def test_a_fault_is_survived(work: Path, fault: Fault, only: str) -> None:
    outcomes = list(fault(Options(work, count=2, only=only)))
    assert outcomes
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            pytest.skip(outcome.reason)
        assert outcome.survived, outcome
        assert outcome.identical in (True, None), outcome
