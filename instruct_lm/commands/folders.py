"""Where a command writes: the folders that `conf/` asks for, each with one owner."""

import hashlib
import logging
import re
import shutil
from pathlib import Path

from instruct_lm.commands.own_files import check_no_run
from instruct_lm.commands.pasting import command
from instruct_lm.commands.runs import find_run, is_begun
from instruct_lm.errors import InputError
from instruct_lm.io import processes
from instruct_lm.io.locks import LOCK, OWNER, claim, own
from instruct_lm.io.run_files import CONFIG_FILE, JOBS, MADE_FROM, RESPONSES, evaluation_dir

_RECORDS = (LOCK, OWNER, MADE_FROM, JOBS, "multirun.yaml")  # the last is Hydra's; JOB says how a job ended
_made: list[Path] = []  # folders that were not there before this command, the innermost first


def train_dir(output_dir: str | None, resume: str | None, default: str, *, start: bool = True) -> str:
    """Return the folder that a training run writes into.

    Args:
        output_dir: As given.
        resume: As given.
        default: Taken where neither is given; where it exists, a name of its own after it.
        start: Whether the command will run, so that this process must own the folder; not for `--cfg` and the like.

    Raises:
        InputError: A folder to resume that holds no run, one to write into that holds other results already, or one
            that another process owns.
    """
    if resume is not None:
        run = find_run(resume)
        if output_dir is not None and Path(output_dir).expanduser().resolve() != run:
            raise InputError(f"resume={resume} goes on in its own folder: leave out output_dir={output_dir}.")
        return _taken(run, start)
    if output_dir is None:
        if (kind := processes.launcher()) is not None:
            raise InputError(f"{kind} starts processes that would each make a folder: give them output_dir=<folder>.")
        return _claimed(default, start)
    folder = Path(output_dir).expanduser()
    check_no_run(folder, holds_run=False)
    if (folder / RESPONSES).exists():
        raise InputError(f"output_dir={output_dir} holds an evaluation: give another folder.")
    _check_no_multirun(folder)
    taken = _taken(folder, start)  # first: a run in use may have a checkpoint, and is not to be continued
    if is_begun(folder):
        way = command("train.py", resume=folder)
        raise InputError(f"output_dir={output_dir} holds a run. Delete it, or continue it with: {way}")
    return taken


def evaluate_dir(
    output_dir: str | None, run: str | None, split: str, checkpoint: str, default: str, *, start: bool = True
) -> str:
    """Return the folder that an evaluation writes into: by default inside the run.

    Raises:
        InputError: `run` is no run folder, `output_dir` holds a run or a multirun, or another process owns it.
    """
    if output_dir is not None:
        folder = Path(output_dir).expanduser()
        check_no_run(folder)
        _check_no_multirun(folder)
        return _taken(folder, start)
    if run is None:
        return _claimed(default, start)
    return _taken(evaluation_dir(find_run(run), split, checkpoint), start)


def sweep_dir(output_dir: str | None, default: str, *, start: bool = True) -> str:
    """Return the folder of a multirun, in which each job has a folder of its own.

    Raises:
        InputError: It is a run's own folder, or another process owns it.
    """
    if output_dir is None:
        return _claimed(default, start)
    check_no_run(Path(output_dir))
    return _taken(Path(output_dir).expanduser(), start)


def record_dir(folder: str, now: str) -> str | None:
    """Where in its folder a command records its settings, once; None: nowhere, another process does so.

    Of several processes that another program starts, those but the first do not own the folder. They must write nothing
    before the first one does: it may be refused.
    """
    if not processes.is_first():
        return None
    return f".hydra/resumed/{now}" if Path(folder, CONFIG_FILE).exists() else ".hydra"


def _check_no_multirun(folder: Path) -> None:
    if (folder / JOBS).exists():
        raise InputError(f"output_dir={folder} holds a multirun. Give another folder, or go on with it by -m.")


def _taken(folder: Path, start: bool) -> str:
    if start and processes.is_first():
        missing = _missing(folder)
        own(folder)
        _made.extend(missing)
    return str(folder)


def _claimed(default: str, start: bool) -> str:
    if not start or not processes.is_first():
        return default
    missing = _missing(Path(default).parent)
    name = claim(default)
    _made.extend([Path(name).resolve(), *missing])
    return name


def _missing(folder: Path) -> list[Path]:
    """A folder and those above it that are not there yet, the innermost first."""
    folder = folder.resolve()
    return [each for each in (folder, *folder.parents) if not each.exists()]


def drop_unused() -> None:
    """Delete the folder that this command has made, if it holds settings and messages alone.

    For a command that was refused: what it says stands on the terminal, and it has begun nothing. A folder that was
    there before stays, whatever it holds.
    """
    for folder in _made:
        if not folder.is_dir():
            continue
        if not all(_says_nothing(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()):
            break
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder):
                handler.close()  # Windows deletes no open file
                logging.getLogger().removeHandler(handler)
        shutil.rmtree(folder, ignore_errors=True)
    _made.clear()


def _says_nothing(file: Path) -> bool:
    return ".hydra" in file.parts or file.suffix == ".log" or file.name in _RECORDS


def file_name(text: object) -> str:
    """A text as part of a path: without special characters, and where it is cut with a hash of the whole."""
    name = re.sub(r"[^\w.+-]+", "-", str(text))
    return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
