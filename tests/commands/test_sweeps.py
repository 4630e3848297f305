"""A sweep as a whole: its folders, what a job that fails or is stopped leaves, its repetition, its evaluation."""

import logging
import os
import pickle
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import evaluate
import train
from instruct_lm.commands import jobs, report, sweeps
from instruct_lm.commands.hydra_app import Job
from instruct_lm.commands.jobs import ask_to_stop
from instruct_lm.commands.runs import limits
from instruct_lm.errors import InputError, RunError, StoppedError
from instruct_lm.io.sweep_files import headline, read_job, unfinished_jobs, write_job, write_jobs
from tests.run_commands import commands


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield run


def sweep(command: Any, *args: str) -> Path:
    """A complete sweep with seeds 1 and 2, nothing trained."""
    settings = ["model=gpt2-tiny", "data=sample", "seed=1,2", "output_dir=sweep"]
    status, err, _ = command("train", "-m", *settings, *args, main=leave_a_summary)
    assert status == 0, err
    return Path("sweep").resolve()


def leave_a_summary(config: Any) -> None:
    numbers = dict.fromkeys(("steps", "seconds", "train_seconds", "tokens_per_second", "peak_memory_gb"), 1)
    train.summarise(config, {**numbers, "ended": "max_epochs", "before": {}, "after": {}, "limits": limits(config)})


def states(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read_job(path.parent).get("state") for path in sorted(folder.glob("*/job.json"))}


@pytest.mark.parametrize(
    ("args", "models"),
    [
        ((), 1),
        (("data.batch_size=2,4",), 1),
        (("prompt=alpaca,phi3",), 2),
        (("data.limit=20,40",), 2),
        (("generation.max_new_tokens=8,16",), 2),
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
    assert runs == [*(str(run / "evaluation") for run in evaluated), str(folder)]


def test_a_multirun_that_has_grown_keeps_the_evaluation_of_its_untuned_model(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = sorted(run for run in sweep(command).iterdir() if run.is_dir())
    (last / "evaluation" / "test-untuned").mkdir(parents=True)
    evaluated: list[Path] = []
    monkeypatch.setattr(sweeps, "evaluate_run", lambda run, checkpoint: evaluated.append(run))
    monkeypatch.setattr(report, "write_report", lambda *arguments: None)
    sweeps.compare_runs(last.parent)
    assert evaluated == [last]


def test_a_failed_evaluation_says_how_to_go_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(sweep(command).glob("0_*"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(
        RunError, match=r"ended with status 1\. Go on with: python evaluate\.py run=\S+ checkpoint=best"
    ):
        sweeps.evaluate_run(run)


def test_other_processes_of_a_training_evaluate_nothing(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(sweep(command).glob("0_*"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert sweeps.evaluate_run(run) == run / "evaluation" / "test"


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_sweep_goes_on_after_failures_and_its_repetition_tries_them_again(command: Any, launcher: str) -> None:
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")

    def main(config: Any) -> int:
        logging.getLogger("library").warning("redirected to https://me:pw@host/a.json")
        if config.seed == 2:
            raise RunError("Training diverged.\nLower it.")
        if config.seed == 3:
            raise KeyError("a bug")
        leave_a_summary(config)
        return int(config.seed == 4)  # left undone

    args = ["train", "-m", "seed=1,2,3,4", "output_dir=sweep", "evaluate=true", f"hydra/launcher={launcher}"]
    args += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    concluded: list[Path] = []
    status, err, _ = command(*args, main=main, conclude=concluded.append)
    folder = Path("sweep").absolute()
    assert (status, concluded) == (1, [folder])
    assert states(folder) == {"0_seed-1": "complete", "1_seed-2": "failed", "2_seed-3": "failed", "3_seed-4": "failed"}
    assert "sweep/1_seed-2: failed with status 1: Training diverged.\n" in err
    assert "sweep/2_seed-3: failed with status 1: KeyError: 'a bug'\n" in err
    assert "3 of 4 jobs are not complete." in err
    assert read_job(folder / "1_seed-2")["overrides"][0] == "seed=2"
    assert "redirected to https://***@host/a.json" in (folder / "0_seed-1" / "train.log").read_text()
    if launcher == "basic":
        assert "Job 2 of the multirun failed (seed=3 output_dir=sweep evaluate=True):\nTraceback" in err

    status, err, _ = command(*args, main=leave_a_summary, conclude=concluded.append)
    assert (status, concluded) == (0, [folder, folder])
    assert set(states(folder).values()) == {"complete"}
    assert unfinished_jobs(folder) == []
    if launcher == "basic":
        assert "This job failed before: Training diverged.\nIt is tried again from the start." in err


@pytest.mark.parametrize("program", [train, evaluate])
def test_the_commands_can_be_sent_to_a_launchers_processes(program: Any) -> None:
    """By value, as what stands in the program that was started."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(program)
    try:
        job = pickle.loads(cloudpickle.dumps(Job(program.__name__, program.main)))
    finally:
        cloudpickle.unregister_pickle_by_value(program)
    assert job.main.__code__ == program.main.__code__


def test_a_failure_of_all_jobs_for_bad_input_has_status_2_and_no_report(command: Any) -> None:
    def main(config: Any) -> None:
        raise InputError("no such file")

    args = ["-m", "seed=1,2", "output_dir=sweep", "evaluate=true"]
    status, err, seen = command("train", *args, main=main, conclude=lambda folder: pytest.fail("nothing to report"))
    assert (status, len(seen)) == (2, 2)
    assert "2 of 2 jobs are not complete" in err


def test_passwords_stay_out_of_what_a_sweep_records_of_its_jobs(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address with an interpolation is refused only when it is resolved, by the job."""
    monkeypatch.setenv("FILE", "a.json")
    sources = ",".join(f"'\"https://me:{word}@host/${{oc.env:FILE}}\"'" for word in ("s3cr3t", "s4cr3t"))
    status, err, _ = command("train", "-m", f"data.source={sources}", "output_dir=sweep")
    assert status == 2
    assert "https://***@host/" in err
    recorded = [
        file.read_text() for name in ("job.json", "jobs.json", "train.log") for file in Path("sweep").rglob(name)
    ]
    assert len(recorded) == 5
    assert not [text for text in (*recorded, err) if "cr3t" in text]


def test_fail_fast_ends_a_sweep_at_its_first_failure(command: Any) -> None:
    def main(config: Any) -> None:
        if config.seed == 2:
            raise InputError("no")

    args = ["train", "-m", "seed=1,2,3", "output_dir=sweep", "fail_fast=true"]
    status, err, seen = command(*args, main=main)
    assert (status, [config.seed for config in seen]) == (1, [1, 2])
    assert "sweep/2_seed-3: not begun" in err
    status, _, seen = command(*args)
    assert (status, [config.seed for config in seen]) == (0, [1, 2, 3])


@pytest.mark.parametrize(
    ("stop", "expected"), [(StoppedError("Continue with …", signal.SIGTERM), 143), (KeyboardInterrupt(), 130)]
)
def test_a_signal_ends_a_sweep_and_no_other_job_begins(command: Any, stop: BaseException, expected: int) -> None:
    def main(config: Any) -> None:
        if config.seed == 2:
            raise stop

    status, err, seen = command(
        "train", "-m", "seed=1,2,3", "output_dir=sweep", "evaluate=true", main=main, conclude=pytest.fail
    )
    assert (status, [config.seed for config in seen]) == (expected, [1, 2])
    assert "Job 1 of the multirun was stopped (seed=2" in err
    assert [job.words for job in unfinished_jobs(Path("sweep"))] == ["stopped", "not begun"]
    assert command("train", "-m", "seed=1,2,3", "output_dir=sweep")[0] == 0


def test_a_job_that_diverged_goes_on_from_its_last_checkpoint_and_says_so(command: Any) -> None:
    def main(config: Any) -> None:
        (config.folder / "checkpoints").mkdir(exist_ok=True)
        (config.folder / "checkpoints" / "last.ckpt").touch()
        if config.resume is None:
            raise RunError("Training diverged.")

    args = ["train", "-m", "model=gpt2-tiny", "seed=1", "output_dir=sweep"]
    assert command(*args, main=main)[0] == 1
    status, err, (config,) = command(*args, main=main)
    assert (status, Path(config.resume)) == (0, config.folder)
    assert "It goes on from its last checkpoint, where the same settings may fail the same way." in err


def test_a_launchers_process_ends_with_the_launcher(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, ended = iter([1, 2]), list[int]()
    monkeypatch.setattr(jobs, "has_own_processes", lambda hydra_cfg: True)
    monkeypatch.setattr(jobs, "_stopped_by", lambda file: nullcontext())
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)

    def main(config: Any) -> None:
        raise StoppedError("Stopped.", signal.SIGTERM)

    command("train", "-m", "seed=1", "output_dir=sweep", main=main)
    assert (ended, states(Path("sweep"))) == ([143], {"0_seed-1": "stopped"})


def test_a_killed_job_counts_as_not_complete(command: Any) -> None:
    folder = sweep(command)
    run = next(folder.glob("1_*"))
    write_job(run, "running")  # what a process that is killed leaves
    assert [(job.name, job.words) for job in unfinished_jobs(folder)] == [(run.name, "killed, or still running")]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_no_other_command_writes_among_the_jobs_of_a_sweep(command: Any, name: str) -> None:
    sweep(command)
    status, err, seen = command(name, "data=sample", "output_dir=sweep")
    assert (status, seen) == (2, [])
    assert "output_dir=sweep holds a multirun" in err


def test_jobs_never_share_a_folder(command: Any) -> None:
    for name in ("a.json", "b.json"):
        Path(name).write_text("[]")
    settings = ["experiment=masking", "prompt_loss_weight=0,1", "seed=1", "evaluate=false", "output_dir=sweep"]
    status, _, seen = command("train", "-m", *settings, "data.source=a.json,b.json")
    assert status == 0
    assert len({config.output_dir for config in seen}) == 4
    assert {Path(config.output_dir).name for config in seen} == {
        f"data.source-{name}.json_prompt_loss_weight-{weight}_seed-1" for name in "ab" for weight in "01"
    }
    status, err, seen = command("train", "-m", *settings, "data.source=x/a,x-a")
    assert (status, seen) == (2, [])
    assert "Jobs 0 and 1" in err
    remedy = "hydra.sweep.subdir=${hydra.job.num}"
    assert f"'{remedy}'" in err
    assert command("train", "-m", *settings, "data.source=x/a,x-a", remedy)[0] == 0


def test_other_values_of_a_key_that_no_name_holds_are_refused(command: Any) -> None:
    args = ["train", "-m", "model=gpt2-tiny", "seed=1,2", "output_dir=sweep"]
    assert command(*args, "data.source=a.json", main=leave_a_summary)[0] == 0
    status, err, seen = command(*args, "data.source=b.json")
    assert (status, seen) == (2, [])
    assert "data.source=a.json, not b.json" in err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["output_dir=a,b"], "output_dir=a differs between the jobs"),
        (["resume=a", "seed=1,2"], "leave out -m"),
        (["seed=1,1", "hydra.sweep.subdir=x"], "Jobs 0 and 1"),
    ],
)
def test_what_no_sweep_can_do_is_refused_before_its_first_job(command: Any, args: list[str], part: str) -> None:
    status, err, seen = command("train", "-m", *args)
    assert (status, seen) == (2, [])
    assert part in err
    assert not list(Path().glob("**/.hydra"))


def test_commands_for_several_devices_run_when_pasted(command: Any) -> None:
    place = "output_dir='a b, c=d'"
    status, err, seen = command("train", "-m", "seed=1,2", "device.devices=2", "experiment=demo", place)
    assert (status, seen) == (2, [])
    printed = [shlex.split(line) for line in err.splitlines() if line.startswith("python train.py ")]
    runs = [command("train", *line[2:]) for line in printed]
    assert [(status, config.seed, config.device.devices) for status, _, (config,) in runs] == [(0, 1, 2), (0, 2, 2)]
    folders = [Path(config.output_dir) for _, _, (config,) in runs]
    assert len(set(folders)) == 2
    assert {folder.parent for folder in folders} == {Path("a b, c=d").absolute()}


@pytest.mark.parametrize(
    ("statuses", "kind"), [((2, 2), InputError), ((2, 1), RunError), ((2, None), RunError), ((1, 1), RunError)]
)
def test_a_sweep_is_bad_input_only_where_every_job_was_refused(
    tmp_path: Path, statuses: tuple[int | None, ...], kind: type[Exception]
) -> None:
    jobs = {str(i): [f"seed={i}"] for i in range(2)}
    write_jobs(tmp_path, jobs)
    for name, status in zip(jobs, statuses, strict=True):
        write_job(tmp_path / name, "complete" if status is None else "failed", status=status, message="No.")
    with pytest.raises(kind, match=rf"^{2 - statuses.count(None)} of 2 jobs are not complete") as raised:
        sweeps.conclude(sweeps.Sweep(tmp_path, jobs, evaluate=False, own_processes=False), None, None)
    assert type(raised.value) is kind


def test_the_first_reason_to_stop_is_the_status_of_a_sweep(tmp_path: Path) -> None:
    for status in (130, 1):  # a signal, and a job that fails on its account
        ask_to_stop(tmp_path, status)
    with pytest.raises(StoppedError) as raised:
        sweeps.conclude(sweeps.Sweep(tmp_path, {}, evaluate=False, own_processes=False), None, None)
    assert raised.value.status == 130
    assert not list(tmp_path.iterdir())  # the next command begins its jobs


def test_a_message_has_one_line_in_a_list() -> None:
    assert headline("") == ""
    assert headline("\n Training diverged. \nLower it.") == "Training diverged."
    assert headline("Traceback (most recent call last):\n  File …\nKeyError: 1\n") == "KeyError: 1"
    assert headline("x" * 300) == "x" * 199 + "…"


def test_a_launcher_that_is_not_installed_says_what_to_install(command: Any) -> None:
    status, err, seen = command("train", "-m", "seed=1,2", "hydra/launcher=nonesuch")
    assert (status, seen) == (2, [])
    assert "pip install -e '.[clusters]'" in err
