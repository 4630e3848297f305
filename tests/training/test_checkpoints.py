"""Checkpoint files: what is damaged is recognised, and something to go on from is always there."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from instruct_lm.errors import InputError
from instruct_lm.io.run_files import BEST, LAST, PREVIOUS
from instruct_lm.training.checkpoints import AtomicCheckpointIO, kept, load_checkpoint, sound_checkpoint


def write(path: Path, step: int = 1, run_id: str | None = "mine") -> Path:
    generator = torch.Generator().manual_seed(step)
    state = {name: torch.randn(5, generator=generator) for name in ("model.a", "model.b")}
    loops = {"fit_loop": {"epoch_progress": {"current": {"completed": 1}}}}
    AtomicCheckpointIO(run_id).save_checkpoint({"state_dict": state, "global_step": step, "loops": loops}, path)
    return path


def flat(checkpoint: dict[str, Any]) -> tuple[Any, ...]:
    weights = {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()}
    return weights, checkpoint["global_step"], checkpoint["loops"], checkpoint["run"]


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    content, loaded = path.read_bytes(), flat(load_checkpoint(path))
    found = 0
    for place in range(0, len(content), 5):  # in headers, names, the pickle, tensors and the directory
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert flat(load_checkpoint(path)) == loaded, place
        except InputError as error:
            assert "last.ckpt is no readable checkpoint" in str(error)  # noqa: PT017
            found += 1
    assert found > len(content) / 15  # the rest is dates, and what fills up to a round address


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_checkpoint_is_found(tmp_path: Path, length: float) -> None:
    path = write(tmp_path / "last.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if 0 < length < 1 else int(length)])
    with pytest.raises(InputError, match="is no readable checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / LAST)
    assert load_checkpoint(path, "mine")["run"] == "mine"
    for read in (lambda: load_checkpoint(path, "other"), lambda: sound_checkpoint(tmp_path, "other")):
        with pytest.raises(InputError, match=r"belongs to another run \(mine, not other\)"):
            read()


def test_the_one_before_is_used_where_the_last_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sound_checkpoint(tmp_path) is None
    last, previous = write(tmp_path / LAST, 6), write(tmp_path / PREVIOUS, 4)
    assert sound_checkpoint(tmp_path, "mine") == (last, 6, 1)
    assert kept(tmp_path) == f"{last} of step 6"
    assert not caplog.records
    last.write_bytes(last.read_bytes()[:-30])
    assert sound_checkpoint(tmp_path, "mine") == (previous, 4, 1)
    assert "last.ckpt is no readable checkpoint" in caplog.text
    assert "goes on from" in caplog.text
    assert kept(tmp_path) == f"{previous} of step 4"
    previous.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"(?s)last\.ckpt is no readable .*previous\.ckpt is no readable .*cannot go on"
    ):
        sound_checkpoint(tmp_path)


def test_a_kill_between_two_renames_leaves_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    previous = write(tmp_path / PREVIOUS, 4)
    assert sound_checkpoint(tmp_path) == (previous, 4, 1)
    assert not caplog.records


def test_checkpoints_of_an_older_version_are_not_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / BEST).parent.mkdir()
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / LAST)
    load_checkpoint(tmp_path / LAST, "mine")  # its weights can be evaluated
    with pytest.raises(InputError, match="of an older version"):
        sound_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [[], {"weights": 1}, {"state_dict": {"a": 1}}])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="is no readable checkpoint"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "last.ckpt")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, 2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
