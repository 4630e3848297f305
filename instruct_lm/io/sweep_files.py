"""What a multirun records of its jobs: their list in its own folder, and in each job's folder how it ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from instruct_lm.errors import without_secrets
from instruct_lm.io.records import read_record, write_record
from instruct_lm.io.run_files import JOB, JOBS

State = Literal["running", "complete", "failed", "stopped"]


class Unfinished(NamedTuple):
    """A job that is not complete.

    Attributes:
        name: Of its folder.
        words: What became of it, such as ``failed with status 1``.
        message: One line of its error; empty where there was none.
        status: The exit status of a job that failed; None for the others.
    """

    name: str
    words: str
    message: str = ""
    status: int | None = None


def write_jobs(sweep: Path, jobs: Mapping[str, Sequence[str]]) -> None:
    """Record the jobs of a multirun: the name of each one's folder → its overrides."""
    shown = {name: [without_secrets(override) for override in overrides] for name, overrides in jobs.items()}
    write_record({"jobs": shown}, sweep / JOBS)


def swept_keys(folder: Path) -> list[str]:
    """The keys and groups that a multirun varies, from the folder of one of its jobs; none for another run's."""
    jobs = (read_record(folder.parent / JOBS) or {}).get("jobs", {})
    return varied_keys(list(jobs.values())) if folder.name in jobs else []


def varied_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys and groups of those overrides that not all jobs have."""
    varied = [each for job in jobs for each in job if not all(each in other for other in jobs)]
    return list(dict.fromkeys(override.partition("=")[0].lstrip("+") for override in varied))


def write_job(folder: Path, state: State, **details: Any) -> None:
    """Record the state of a job: of a failed one with its `status`, `message` and `overrides`."""
    write_record({"state": state, **details}, folder / JOB)


def read_job(folder: Path) -> dict[str, Any]:
    """What `write_job` recorded; empty for a job that has not begun."""
    return read_record(folder / JOB) or {}


def unfinished_jobs(sweep: Path) -> list[Unfinished]:
    """The jobs of the last command in a multirun's folder that are not complete, in their order."""
    found = []
    for name in (read_record(sweep / JOBS) or {}).get("jobs", {}):
        job = read_job(sweep / name)
        state, status = job.get("state"), job.get("status")
        words = {
            None: "not begun",
            "running": "killed, or still running",
            "stopped": "stopped",
            "failed": f"failed with status {status}",
        }
        if state in words:
            found.append(Unfinished(name, words[state], headline(job.get("message", "")), status))
    return found


def headline(message: str) -> str:
    """One line of an error's message, at most 200 characters: the first, of a traceback the last.

    Example:
        >>> headline("The loss is nan: training diverged.\\nLower optimizer.lr.")
        'The loss is nan: training diverged.'
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    line = lines[-1 if lines[0].startswith("Traceback") else 0] if lines else ""
    return line if len(line) <= 200 else f"{line[:199]}…"
