"""A run that is killed anywhere and resumed ends as one that nothing has disturbed: weights, curves and best weights."""

import json
import math
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as program
from instruct_lm.commands import build
from instruct_lm.commands.endings import explained
from instruct_lm.commands.runs import clear_dead_start
from instruct_lm.config import TrainConfig
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError, RunError
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.run_files import BEST, PREVIOUS, SUMMARY
from instruct_lm.training.callbacks import Throughput
from instruct_lm.training.checkpoints import Resumable, load_checkpoint, sound_checkpoint
from instruct_lm.training.divergence import DivergedError, Divergence
from instruct_lm.training.saving import SaveBest, SaveLast
from instruct_lm.training.trainer import check_limits, epochs_done, make_trainer, why_ended
from tests.run_commands import typed

SCALARS = ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/response_loss")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.json"
    entries = [{"instruction": f"Say {'very ' * (i % 5)}{i}.", "output": f"{i * i}!"} for i in range(32)]
    path.write_text(json.dumps(entries))
    return path


def tiny(data_file: Path, folder: Path, *overrides: str) -> TrainConfig:
    """27 entries to train on, in batches of 5: 6 micro-batches an epoch."""
    sizes = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=256", "vocab_size=257", "tokenizer=bytes"]
    config = [f"model.{size}" for size in sizes] + ["data.batch_size=5", "trainer.progress=false", "optimizer.lr=0.01"]
    given = [
        f"data.source={data_file}",
        "data.sha256=null",
        f"output_dir={folder}",
        "device=cpu",
        "cache_dir=null",
        *config,
        *overrides,
    ]
    return typed("train", "model=gpt2-tiny", *given)


class Killed(BaseException):
    """What SIGKILL would do, in a process that goes on."""


class Killer(pl.Callback):
    """Ends training at the n-th of its hooks."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.hooks = at, 0

    def _count(self, *_: Any) -> None:
        self.hooks += 1
        if self.hooks == self.at:
            raise Killed

    on_train_batch_start = on_before_optimizer_step = on_train_batch_end = on_train_epoch_end = _count
    on_validation_start = on_validation_batch_end = on_validation_end = on_train_end = _count


def train(config: TrainConfig, first: Sequence[pl.Callback] = (), last: Sequence[pl.Callback] = ()) -> dict[str, Any]:
    """What `train.py` does, up to its summary; callbacks before and after its own. Returns the final weights."""
    fetcher = Fetcher(None, offline=True)
    tokenizer = load_tokenizer("bytes")
    pl.seed_everything(config.seed, verbose=False)
    data = build.build_datamodule(config, tokenizer, fetcher)
    data.setup("fit")
    tuner = build.build_tuner(config, build.build_model(config, fetcher), tokenizer)
    checkpoint = sound_checkpoint(config.folder)
    divergence = Divergence()
    callbacks = [divergence, Throughput(0.0), *first]
    trainer = make_trainer(config, "cpu", callbacks, None, checkpoint.step if checkpoint else 0)
    trainer.callbacks.extend(last)
    if checkpoint is None:
        divergence.validate_before(trainer, tuner, data)
    trainer.fit(tuner, data, ckpt_path=checkpoint and checkpoint.path, weights_only=True)
    return {
        "weights": tuner.state_dict(),
        "divergence": divergence.state_dict(),
        "steps": trainer.global_step,
        "ended": why_ended(trainer),
        "epochs": epochs_done(trainer),
    }


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    # Files are read in the order of their names: time in seconds, host, process, and a number that is not padded. Here
    # runs begin within one second, in one process.
    files = sorted(
        (folder / "tensorboard").glob("*tfevents*"), key=lambda file: [int(file.name.split(".")[i]) for i in (3, -1)]
    )
    ordered = folder / "ordered"
    shutil.rmtree(ordered, ignore_errors=True)
    ordered.mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, ordered / f"events.out.tfevents.{i:04}")
    events = EventAccumulator(str(ordered), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in SCALARS if tag in events.Tags()["scalars"]}


def assert_same_end(folder: Path, end: dict[str, Any], whole_folder: Path, whole: dict[str, Any], why: object) -> None:
    """Bit for bit: weights, validation losses, every logged value exactly once, and the best weights."""
    for name in ("steps", "epochs", "ended"):
        assert end[name] == whole[name], why
    assert end["divergence"] == whole["divergence"], why
    pairs = [(end["weights"], whole["weights"])]
    pairs += [tuple(torch.load(each / BEST)["state_dict"] for each in (folder, whole_folder))]  # type: ignore[list-item]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), why
    assert curves(folder) == curves(whole_folder), why


def killed_until_done(data_file: Path, folder: Path, *overrides: str, seed: int = 0) -> int:
    """Kills a run at random hooks and resumes it until it ends; compares it with one that is not. Returns the kills."""
    whole = train(tiny(data_file, folder / "whole", *overrides))
    config, rng = tiny(data_file, folder / "killed", *overrides), random.Random(seed)
    for kills in range(40):
        # Before or after the callbacks that save; later and later, so that it comes to an end.
        where, killer = rng.choice(["first", "last"]), Killer(rng.randint(8, 24 + 8 * kills))
        if sound_checkpoint(config.folder) is None:
            clear_dead_start(config.folder)
        try:
            end = train(config, **{where: [killer]})
        except Killed:
            continue
        assert_same_end(config.folder, end, folder / "whole", whole, (kills, overrides))
        return kills
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint_steps=1", "val_interval=0.16"],  # a checkpoint and a validation after every step
        ["checkpoint_steps=2", "val_interval=0.3", "accumulate=2", "max_steps=5", "max_epochs=null"],
        ["checkpoint_steps=3", "val_interval=1.5", "accumulate=3", "max_epochs=4"],
    ],
)
def test_a_run_that_is_killed_anywhere_logs_every_value_once(
    data_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    assert killed_until_done(data_file, tmp_path, *[f"trainer.{key}" for key in overrides]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dropout=0.1", "data.layout=padded", "optimizer.schedule=cosine", "optimizer.warmup_steps=3"],
        ["lora=r16", "lora.rank=2", "fast=false", "trainer.accumulate=2", "optimizer.name=adafactor"],
        ["device.precision=bf16-mixed", "optimizer.in_backward=true", "data.group_by_length=true"],
    ],
)
def test_kinds_of_runs_end_alike_when_they_are_killed(data_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    assert killed_until_done(data_file, tmp_path, "trainer.checkpoint_steps=1", *overrides) > 0


def test_patience_ends_a_run_and_its_count_is_kept(data_file: Path, tmp_path: Path) -> None:
    settings = ["trainer.patience=2", "trainer.val_interval=0.16", "trainer.max_epochs=9", "optimizer.lr=1e-12"]
    config = tiny(data_file, tmp_path, *settings)
    ends = [train(config)]  # such steps change no loss: the first validation is the best
    ends += [train(config)]  # a resumed run does not go on …
    ends += [train(tiny(data_file, tmp_path, *settings[1:], "trainer.patience=5"))]  # … but with more
    assert [(end["steps"], end["epochs"], end["ended"]) for end in ends] == [
        (3, 0.5, "patience"),
        (3, 0.5, "patience"),
        (6, 1, "patience"),
    ]


@pytest.mark.parametrize(("epochs", "steps", "limit"), [(1, "null", "epochs"), ("null", 6, "steps"), (1, 7, "epochs")])
def test_a_run_says_which_limit_ended_it(data_file: Path, tmp_path: Path, epochs: Any, steps: Any, limit: str) -> None:
    end = train(tiny(data_file, tmp_path, f"trainer.max_epochs={epochs}", f"trainer.max_steps={steps}"))
    assert (end["steps"], end["ended"]) == (6, f"max_{limit}")


@pytest.mark.parametrize(("unit", "done"), [("epochs", 2), ("steps", 12)])
def test_a_run_cannot_become_shorter_than_it_is(data_file: Path, tmp_path: Path, unit: str, done: int) -> None:
    checkpoint = Resumable(tmp_path, step=12, epochs=2)
    check_limits(tiny(data_file, tmp_path, f"trainer.max_{unit}={done}"), checkpoint)
    with pytest.raises(
        InputError, match=rf"max_{unit}={done - 1}: the run has done {done} {unit} already\. Give {done}"
    ):
        check_limits(tiny(data_file, tmp_path, f"trainer.max_{unit}={done - 1}"), checkpoint)


@pytest.mark.parametrize("ruin", [math.nan, 1e6])
def test_a_ruined_state_is_never_kept(data_file: Path, tmp_path: Path, ruin: float) -> None:
    class Ruin(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 6:  # the last of the epoch, after which a checkpoint and a validation are due
                module.model.ln_f.weight.data[3] = ruin

    config = tiny(data_file, tmp_path, "trainer.checkpoint_steps=1")
    with pytest.raises(DivergedError, match=r"at step 6: .* The step's entries: \d+"):
        train(config, last=[Ruin()])
    last = sound_checkpoint(config.folder)
    assert last is not None
    assert last.step == 5
    assert load_checkpoint(tmp_path / PREVIOUS)["global_step"] == 4
    assert load_checkpoint(tmp_path / BEST)["global_step"] == 3


def test_what_judges_a_state_stands_before_what_keeps_it(data_file: Path, tmp_path: Path) -> None:
    callbacks = make_trainer(tiny(data_file, tmp_path), "cpu", [Divergence()]).callbacks  # type: ignore[attr-defined]
    kinds = [type(callback) for callback in callbacks]
    assert kinds.index(Divergence) < kinds.index(SaveBest) < kinds.index(SaveLast) == len(kinds) - 1


def test_a_run_that_goes_on_has_no_summary_until_it_ends(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    (tmp_path / SUMMARY).write_text("of fewer epochs")
    monkeypatch.setattr("instruct_lm.training.trainer.make_trainer", kill)
    with pytest.raises(Killed):
        program.train(tiny(data_file, tmp_path))
    assert not (tmp_path / SUMMARY).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte: a checkpoint has 80 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_to_go_on(data_file: Path, small_disk: Path) -> None:
    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                with suppress(OSError), (small_disk / "fill").open("wb", 0) as file:
                    while file.write(bytes(4096)):
                        pass

    config = tiny(data_file, small_disk / "run", "trainer.checkpoint_steps=2")
    with (
        pytest.raises(RunError, match=r"No room is left(.|\n)*Kept: .*last\.ckpt of step 4(.|\n)*resume="),
        explained(config),
    ):
        train(config, first=[Fill()])
    (small_disk / "fill").unlink()
    last = sound_checkpoint(config.folder)
    assert last is not None
    assert last.step == 4
    assert train(config)["steps"] == 12
