"""Checkpoint files: written atomically, checked when they are read, each with the id of its run."""

import logging
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from instruct_lm.errors import InputError
from instruct_lm.io.files import replacing, shown
from instruct_lm.io.run_files import BEST, LAST, PREVIOUS

log = logging.getLogger(__name__)

RUN = "run"
"""The key of a checkpoint that holds the id of its run, or None."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically: a reader sees the old file or the new one, never a part.

    Lightning's own writer fills a buffer in memory first, which doubles the memory that the run takes.

    Args:
        run_id: Of the run; every checkpoint carries it.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the path, sync to disk, then move into place."""
        # Through Python's file, whose errors say what is wrong with the disk; those of torch's own writer do not.
        with replacing(Path(path)) as part, part.open("wb") as file:
            torch.save({**checkpoint, RUN: self.run_id}, file)
            file.flush()


def load_checkpoint(path: Path, run_id: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, of which every byte is checked first; its tensors are mapped from the file.

    `torch.save` writes a zip file, which has a CRC-32 of each of its records.

    Args:
        path: The file.
        run_id: Of the run that it must belong to; None: any.

    Raises:
        InputError: The file is damaged or no checkpoint, or belongs to another run.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"its record {damaged} has changed")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise TypeError("it holds no state_dict")
        tensors = checkpoint["state_dict"]
        if others := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
            raise TypeError(f"{others[0]} is no tensor")
    except Exception as error:  # torch, zip and pickle raise a dozen kinds
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is no readable checkpoint ({reason}): use another, or train anew.") from error
    _check_owner(path, checkpoint, run_id)
    return checkpoint


def _check_owner(path: Path, checkpoint: dict[str, Any], run_id: str | None) -> None:
    owner = checkpoint.get(RUN)
    if None not in (owner, run_id) and owner != run_id:
        raise InputError(
            f"{path} belongs to another run ({owner}, not {run_id}): put the run's own file back, or train anew."
        )


class Resumable(NamedTuple):
    """A checkpoint from which a run can go on: its path, and how many optimizer steps and whole epochs it has done."""

    path: Path
    step: int
    epochs: int


def sound_checkpoint(run: Path, run_id: str | None = None) -> Resumable | None:
    """The checkpoint from which a run goes on: `LAST`, or `PREVIOUS` with a warning where `LAST` is damaged.

    Args:
        run: The run's folder.
        run_id: The run's id; None: not known.

    Returns:
        The checkpoint; None if the run has saved nothing.

    Raises:
        InputError: The checkpoints are damaged, of another run, or of a version of this program that kept less.
    """
    damage: list[str] = []
    for path in (run / LAST, run / PREVIOUS):
        if not path.is_file():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            damage.append(str(error))
            continue
        _check_owner(path, checkpoint, run_id)
        if RUN not in checkpoint:
            raise InputError(f"{path} is of an older version, which kept less: train anew in another output_dir.")
        step, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        if damage:
            log.warning("%s\nInstead the run goes on from %s, of step %d.", damage[0], shown(path), step)
        return Resumable(path, step, loop["epoch_progress"]["current"]["completed"])
    if damage:
        raise InputError("\n".join([*damage, "The run cannot go on: train anew in another output_dir."]))
    return None


def kept(run: Path) -> str:
    """What a message says of the checkpoints of a run; an empty text if there is none."""
    steps = {}
    for name in (LAST, PREVIOUS, BEST):
        try:
            steps[name] = torch.load(run / name, map_location="cpu", mmap=True, weights_only=True)["global_step"]
        except Exception:  # no such file, or a damaged one
            continue
    if LAST in steps:
        steps.pop(PREVIOUS, None)
    return " and ".join(f"{shown(run / name)} of step {step}" for name, step in steps.items())
