"""Several processes of a command: what is refused, and how their ends become one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import evaluate
from instruct_lm.commands import launch
from instruct_lm.commands.folders import record_dir, train_dir
from instruct_lm.errors import InputError, RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.locks import LOCK, own
from instruct_lm.io.run_files import CONFIG_FILE
from tests.run_commands import typed


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "SLURM_NTASKS", processes.LAUNCHED):
        monkeypatch.delenv(name, raising=False)


def by_torchrun(monkeypatch: pytest.MonkeyPatch, number: int, here: int) -> None:
    values = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": here, "RANK": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["device.devices=2", "optimizer.in_backward=true"], ["in_backward", "device.devices=1"]),
        (["device.devices=2", "device.strategy=fsdp2", "optimizer=adafactor"], ["adafactor", "device.strategy=ddp"]),
        (["device.devices=2", "device.strategy=fsdp2", "device.precision=16-mixed"], ["16-mixed", "bf16-mixed"]),
        (["device.num_nodes=2", "device.devices=3"], ["device.num_nodes=2", "torchrun --nnodes=2 --nproc-per-node=3"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_that_works(settings: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        launch.check(typed("train", *settings))
    assert all(word in str(refused.value) for word in words)


def test_one_process_may_do_all_that(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check(typed("train", "optimizer.in_backward=true"))
    launch.check(typed("train", "device.strategy=fsdp2", "optimizer=adafactor"))
    by_torchrun(monkeypatch, 4, 2)
    launch.check(typed("train", "device.devices=2", "device.num_nodes=2"))
    launch.check(typed("train", "device.devices=auto", "device.num_nodes=2"))


@pytest.mark.parametrize(
    ("devices", "environment", "expected"),
    [
        ("1", {}, "cuda:0"),
        ("0,2", {}, "cuda:0"),  # the process that starts the others
        ("2", {processes.LAUNCHED: "1", "RANK": "1", "LOCAL_RANK": "1"}, "cuda:1"),
        ("0,2", {processes.LAUNCHED: "1", "RANK": "1", "LOCAL_RANK": "1"}, "cuda:2"),
        ("2", {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, "cuda:1"),
        ("auto", {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, "cuda:0"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, devices: str, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device = typed("train", f"device.devices={devices!r}").device
    assert launch.own_device(device, "gpu") == expected
    assert launch.own_device(device, "cpu") == "cpu"


def test_torchrun_and_the_configuration_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torchrun(monkeypatch, 4, 2)
    with pytest.raises(InputError, match=r"started 4 processes.*give device.devices=2 device.num_nodes=2"):
        launch.check(typed("train"))
    with pytest.raises(InputError, match="output_dir=<folder>"):
        train_dir(None, None, "outputs/now")
    with pytest.raises(InputError, match="one machine"):
        launch.check_answering(typed("evaluate", "device.devices=2").device)


def test_only_the_first_of_torchruns_processes_records_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It owns the folder, or is refused; the others would write into a run of somebody else meanwhile."""
    run = tmp_path / "run"
    assert record_dir(str(run), "now") == ".hydra"
    (run / CONFIG_FILE).parent.mkdir(parents=True)
    (run / CONFIG_FILE).touch()
    assert record_dir(str(run), "now") == ".hydra/resumed/now"
    by_torchrun(monkeypatch, 2, 2)
    assert record_dir(str(run), "now") is None


def test_answers_are_not_sharded() -> None:
    with pytest.raises(InputError, match="whole model"):
        launch.check_answering(typed("evaluate", "device.strategy=fsdp2").device)


def test_an_evaluation_that_lost_a_process_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def died(number: int, folder: Path, precision: str | None) -> int:
        raise launch.ProcessError(f"Process 1 of {number} was ended by SIGKILL.")

    monkeypatch.setattr(launch, "run_processes", died)
    config = typed("evaluate", "model=gpt2-tiny", "data=sample", "device=cpu", "device.devices=2")
    with pytest.raises(RunError, match=r"of 2 was ended by SIGKILL\.\nThe answers so far are kept: repeat"):
        evaluate.respond(config, None, {})


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "srun"),
        ({"SLURM_NTASKS": "2"}, None),  # a batch script, which runs once
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", processes.LAUNCHED: "1"}, "own"),
    ],
)
def test_what_has_started_a_process_is_told_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kind: str | None
) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.launcher() == kind


@pytest.mark.parametrize(("devices", "number"), [(1, 1), ("4", 4), ("0,3", 2), ("5,6,7", 3)])
def test_devices_are_a_number_or_a_list(monkeypatch: pytest.MonkeyPatch, devices: int | str, number: int) -> None:
    device = typed("train").device.model_copy(update={"devices": devices})
    assert launch.processes_to_start(device, "gpu") == number
    by_torchrun(monkeypatch, 4, 2)
    assert launch.processes_to_start(device, "gpu") == 1  # they run already


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, number: int = 2) -> int:
    """Runs a Python script as several processes; it knows its number as `rank`."""
    script = folder / "script.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(launch, "GRACE", 1.0)
    return launch.run_processes(number, folder)


def test_the_ends_of_all_become_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = "open(os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + os.environ['MASTER_ADDR'])"
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, tmp_path, write, 3) == 0
    assert [Path(name).read_text() for name in "012"] == ["3127.0.0.1"] * 3
    assert run(monkeypatch, tmp_path, f"sys.exit(2 if rank == 0 else {launch.LOST})") == 2
    with pytest.raises(RunError, match=r"Process 1 of 2 was ended by SIGKILL"):
        run(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")
    with pytest.raises(RunError, match=r"(?s)Process 1 of 2 ended with status 1:\nno such device"):
        run(monkeypatch, tmp_path, f"sys.exit('no such device' if rank else {launch.LOST})")


@pytest.mark.skipif(os.name != "posix", reason="a lock is inherited with its file descriptor")
def test_a_folder_stays_locked_while_one_of_the_processes_lives(tmp_path: Path) -> None:
    """The process that owns it was killed, and those that it has started still write."""
    (tmp_path / "script.py").write_text("import sys, time\nprint('ready', flush=True)\nsys.stdin.read()\n")
    lines = [
        f"import sys; sys.argv = ['{tmp_path}/script.py']",
        "from pathlib import Path; from instruct_lm.commands import launch; from instruct_lm.io.locks import own",
        f"own(Path('{tmp_path}/run')); launch.run_processes(2, Path('{tmp_path}/run'))",
    ]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines)], **pipes) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(InputError, match="in use"):
            own(tmp_path / "run")
        parent.stdin.close()  # which ends the others
    with FileLock(tmp_path / "run" / LOCK, timeout=60):  # it waits until they have gone
        pass


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_reaches_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: int) -> None:
    """The first process tells the one that started it, as a user or a scheduler would."""
    code = (
        "signal.signal(signal.SIGTERM, lambda n, f: sys.exit(128 + n))\nopen(f'ready{rank}', 'w')\n"
        f"while not (os.path.exists('ready0') and os.path.exists('ready1')): time.sleep(0.01)\n"
        f"if rank == {told}: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, tmp_path, code) == 128 + signal.SIGTERM


def test_signals_become_errors_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM") as stopped, processes.stopping(), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)  # what suppresses errors, as around a damaged file, does not suppress it
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_signal_that_nohup_ignores_ends_no_command() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.stopping():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
