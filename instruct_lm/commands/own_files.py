"""What a run's folder holds by itself, and nothing else may write over."""

from pathlib import Path

from instruct_lm.errors import InputError
from instruct_lm.io.files import shown
from instruct_lm.io.run_files import CONFIG_FILE, JOB, JOBS, MADE_BY, MADE_FROM, RESPONSES, SCORES, SUMMARY

_OWN_FOLDERS = (".hydra", "checkpoints", "tensorboard")
_OWN_FILES = (SUMMARY, MADE_FROM, RESPONSES, MADE_BY, SCORES, JOB, JOBS, "train.log", "evaluate.log")
"""What `train.py` and `evaluate.py` write, and nothing else may."""


def check_no_run(folder: Path, *, holds_run: bool = True, key: str = "output_dir") -> None:
    """Refuse a folder to write into that is a run's own.

    Args:
        folder: The folder.
        holds_run: Whether a folder that holds a run is refused; if not, only those that a run fills by itself.
        key: What a message calls the folder.

    Raises:
        InputError: It is a run's own.
    """
    path = folder.expanduser().resolve()
    if holds_run and (path / CONFIG_FILE).is_file():
        remedy = f"Leave it out, or give another, such as {shown(path / 'evaluation' / 'second')}"
        raise InputError(f"{key}={folder} holds a run, whose files would be replaced. {remedy}.")
    for run in path.parents:
        if path.relative_to(run).parts[0] in _OWN_FOLDERS and (run / CONFIG_FILE).is_file():
            raise InputError(f"{key}={folder} belongs to the run {shown(run)} alone. Give another folder.")


def check_output_file(file: Path, key: str) -> None:
    """Refuse a file to write that a run or an evaluation has written.

    Raises:
        InputError: It is one.
    """
    check_no_run(file, holds_run=False, key=key)
    if file.name in _OWN_FILES and file.exists():
        raise InputError(f"{key} {file} would replace a file of a run or an evaluation. Give another name.")
