"""One owner for each folder, of two processes that want it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instruct_lm.errors import InputError
from instruct_lm.io import locks, processes

HOLD = "import sys\nfrom pathlib import Path\nfrom instruct_lm.io import locks, processes\n"
WAIT = "print('mine', flush=True)\nsys.stdin.read()\n"


@pytest.fixture(autouse=True)
def _nothing_owned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("INSTRUCT_LM_OWNS", raising=False)
    yield
    locks.release()


def holder(folder: Path, code: str = f"locks.own(Path(sys.argv[1]))\n{WAIT}") -> subprocess.Popen[str]:
    """Another process that owns a folder until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD + code, str(folder)], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    other = holder(tmp_path / "run")
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match=rf"run is in use by process {other.pid} on .+ \(-c .*run\)"):
        locks.own(tmp_path / "run")
    other.kill()  # a stale lock is not in the way
    other.wait()
    unfinished = tmp_path / "run" / f"summary.json.{other.pid}.part"
    unfinished.touch()
    locks.own(tmp_path / "run")
    assert not unfinished.exists()
    (tmp_path / "link").symlink_to("run")
    for same in (tmp_path / "run" / "." / "", tmp_path / "run" / ".." / "run", tmp_path / "link"):
        locks.own(same)  # of this process already
    assert (tmp_path / "run" / ".owner.json").is_file()


def test_a_child_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    """As a data loader's worker does, which is forked."""
    code = (
        "import os, signal\nlocks.own(Path(sys.argv[1]))\n"
        "if os.fork() == 0:\n    print('child', flush=True)\n    sys.stdin.read()\n    os._exit(0)\n"
        "sys.stdin.readline()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = holder(tmp_path / "run", code)
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == "child\n"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    locks.own(tmp_path / "run")
    parent.stdin.close()


def test_of_several_at_once_one_wins(tmp_path: Path) -> None:
    others = [holder(tmp_path / "run") for _ in range(3)]
    for other in others:
        assert other.stdout is not None
    first = [other.stdout.readline() if other.stdout else "" for other in others]
    assert sorted(first) == ["", "", "mine\n"]
    for other in others:
        other.communicate()
    assert sorted(other.returncode for other in others) == [0, 1, 1]


def test_what_a_process_starts_may_write_where_it_may(tmp_path: Path) -> None:
    locks.own(tmp_path / "sweep")
    name = locks.claim(str(tmp_path / "now"))
    code = (
        "locks.own(Path(sys.argv[1], 'sweep'))\nprint(locks.claim(sys.argv[1] + '/now'))\nprint(processes.is_first())"
    )
    done = holder(tmp_path, code).communicate()
    assert done[0].splitlines() == [name, "True"], done[1]


def test_a_claimed_folder_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    name = locks.claim(str(tmp_path / "now"))
    assert name == str(tmp_path / "now_2")
    assert locks.claim(str(tmp_path / "now")) == name  # Hydra asks more than once
    locks.release()
    assert "INSTRUCT_LM_OWNS" not in os.environ
    assert locks.claim(str(tmp_path / "now")) == str(tmp_path / "now_3")


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(RuntimeError, match=r"\.lock cannot be locked .*No locks available.*Give an output_dir"):
        locks.own(tmp_path)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_other_processes_of_a_training_are_not_the_first(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    assert processes.is_first()
    monkeypatch.setenv(variable, "1")
    assert not processes.is_first()
