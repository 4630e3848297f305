"""What counts as a different end of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from faults.compare import curves, differences


def make_run(folder: Path) -> Path:
    """A folder with what a run leaves behind."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = {"w": torch.tensor([1.0, float("nan")]), "b": torch.zeros(1)}
    checkpoint = {"state_dict": weights, "epoch": 2, "global_step": 5, "callbacks": {"path": str(folder)}}
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    torch.save({**checkpoint, "optimizer_states": [{"m": weights["w"] * 2}]}, folder / "checkpoints" / "last.ckpt")
    log(folder, {0: 3.0, 1: 2.5})
    summary = {"before": {"val/loss": 3.0}, "after": {"val/loss": 2.5}, "steps": 5, "seconds": hash(folder) % 100}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def log(run: Path, points: dict[int, float], tag: str = "train/loss") -> None:
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step, value in points.items():
            writer.add_scalar(tag, value, step)


def change(run: Path, name: str, edit: Callable[[dict], object]) -> None:
    checkpoint = torch.load(run / "checkpoints" / name, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, run / "checkpoints" / name)


def next_float(checkpoint: dict) -> None:
    weight = checkpoint["state_dict"]["w"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the last bit of a weight": (lambda run: change(run, "best.ckpt", next_float), "best.ckpt: /state_dict/w"),
    "a zero's sign": (lambda run: change(run, "last.ckpt", lambda c: c["state_dict"]["b"].neg_()), "/state_dict/b"),
    "an optimizer's state": (
        lambda run: change(run, "last.ckpt", lambda c: c["optimizer_states"][0]["m"].add_(1)),
        "/optimizer_states/0/m",
    ),
    "a missing state": (lambda run: change(run, "last.ckpt", lambda c: c.pop("optimizer_states")), "is missing"),
    "the step": (lambda run: change(run, "last.ckpt", lambda c: c.update(global_step=6)), "/global_step is 6, not 5"),
    "no checkpoint": (lambda run: (run / "checkpoints" / "best.ckpt").unlink(), "best.ckpt"),
    "a point more": (lambda run: log(run, {2: 1.0}), "train/loss at 1 steps, first 2: [1.0] and []"),
    "a step logged again, otherwise": (lambda run: log(run, {1: 2.25}), "train/loss at 1 steps, first 1"),
    "another curve": (lambda run: log(run, {1: 1.0}, "val/loss"), "val/loss"),
    "another loss": (
        lambda run: (run / "summary.json").write_text((run / "summary.json").read_text().replace("2.5", "2.25")),
        "/after/val/loss is 2.25, not 2.5",
    ),
    "a part": (lambda run: (run / "checkpoints" / "last.ckpt.7.part").touch(), "left behind: last.ckpt.7.part"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_difference_is_noticed(tmp_path: Path, what: str) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    assert differences(run, other) == []
    edit, message = CHANGES[what]
    edit(run)
    [difference] = differences(run, other)
    assert message in difference


def test_what_is_measured_and_what_is_logged_twice_alike_is_no_difference(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    log(run, {1: 2.5})
    log(run, {1: 100.0}, "train/tokens_per_second")
    assert curves(run) == {"train/loss": {0: {(3.0).hex()}, 1: {(2.5).hex()}}}
    assert differences(run, other) == []


def test_without_its_curves_the_rest_is_compared(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    log(run, {2: 1.0})
    assert differences(run, other, with_curves=False) == []
