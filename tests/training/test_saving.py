"""What takes whose place among checkpoints, and from which loss on a run has diverged."""

import math
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instruct_lm.errors import StoppedError
from instruct_lm.training import saving
from instruct_lm.training.divergence import DivergedError, Divergence
from instruct_lm.training.saving import SaveBest, SaveLast
from instruct_lm.training.signals import StopSignals


def test_the_first_of_equally_good_weights_is_kept(tmp_path: Path) -> None:
    saved: list[tuple[int, Path, bool]] = []
    trainer: Any = SimpleNamespace(
        save_checkpoint=lambda path, weights_only=False: saved.append((trainer.global_step, path, weights_only))
    )
    best, module = SaveBest(tmp_path / "best.ckpt"), Any
    for step, loss in enumerate([1.0, 3.0, 2.0, 2.0, 2.5, 1.5]):  # the first is before training
        trainer.global_step, trainer.callback_metrics = step, {"val/response_loss": loss}
        best.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert saved == [(step, best.path, True) for step in (1, 2, 5)]


@pytest.mark.parametrize("content", [None, "damaged", "whole"])
def test_best_weights_that_are_lost_do_not_keep_out_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    best, trainer = SaveBest(tmp_path / "best.ckpt"), SimpleNamespace(global_step=4, callback_metrics={})
    if content == "whole":
        torch.save({"state_dict": {}}, best.path)
    elif content is not None:
        best.path.write_text(content)
    best.load_state_dict({"value": 2.0})
    best.on_train_start(trainer, None)  # type: ignore[arg-type]
    lost = content != "whole"
    assert (best.value, "The next validation gives new best weights" in caplog.text) == (
        math.inf if lost else 2.0,
        lost,
    )
    assert best.state_dict() == {"value": best.value}


def test_a_model_that_starts_worse_than_a_blind_guess_has_not_diverged_at_once() -> None:
    divergence, module = Divergence(), SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=50)))
    assert divergence.bound(module) == 2 * math.log(50)  # type: ignore[arg-type]
    divergence.before = {"val/loss": 30.0, "val/perplexity": math.exp(30.0)}
    assert divergence.bound(module) == pytest.approx(60.0)  # type: ignore[arg-type]


class Tuner(torch.nn.Linear):
    """What divergence knows of a tuner: parameters, and a model with its vocabulary."""

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=50))


def told(metrics: dict[str, float], accumulate: int = 1) -> Any:
    """A trainer after its third step."""
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, all: mine and not all)  # the others say no
    known = {"callback_metrics": metrics, "accumulate_grad_batches": accumulate, "strategy": strategy}
    return SimpleNamespace(**known, global_step=3, world_size=1, progress_bar_callback=None)


@pytest.mark.parametrize("loss", [30.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["val/loss", "val/response_loss"])
def test_a_base_may_be_bad_but_not_unusable(name: str, loss: float) -> None:
    divergence, tuner, losses = Divergence(), Tuner(2, 2), {"val/loss": 1.0, "val/response_loss": 1.0, name: loss}
    trainer = told(losses)
    trainer.global_step = 0

    def validate(*_: object, verbose: bool) -> list[dict[str, float]]:
        divergence.on_validation_end(trainer, tuner)  # as Lightning does
        return [losses]

    trainer.validate = validate
    unusable = rf"The weights are unusable: {name} is {loss} before the first step"
    with nullcontext() if math.isfinite(loss) else pytest.raises(DivergedError, match=unusable):
        divergence.validate_before(trainer, tuner, None)  # type: ignore[arg-type]
    assert divergence.before == losses
    assert divergence.after == {}


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "val/response_loss"])
@pytest.mark.parametrize(
    ("loss", "good"),
    [(math.nan, False), (math.inf, False), (2.001 * math.log(50), False), (1.999 * math.log(50), True)],
)
def test_a_run_ends_where_any_loss_is_not_finite_or_explodes(name: str, loss: float, good: bool) -> None:
    divergence, tuner, trainer = Divergence(), Tuner(2, 2), told({"train/loss": 1.0, "val/loss": 1.0, name: loss})
    with nullcontext() if good else pytest.raises(DivergedError, match=f"at step 3: {name} is {loss:.4g}"):
        if name == "train/loss":
            divergence.on_train_batch_end(trainer, tuner, None, None, 0)  # type: ignore[arg-type]
        else:
            divergence.on_validation_end(trainer, tuner)


def test_the_entries_of_the_step_alone_are_named() -> None:
    divergence, tuner = Divergence(), Tuner(2, 2)
    tuner.bias.data[1] = math.nan
    trainer = told({}, accumulate=2)
    for i, entries in enumerate([(1, 2), (3, 4), (5, 6), (7,)]):
        divergence.on_train_batch_start(trainer, tuner, SimpleNamespace(entries=entries), i)  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match=r"weights are no longer finite. The step's entries: 5, 6, 7\.$"):
        divergence.on_save_checkpoint(trainer, tuner, {})


def test_a_damaged_last_checkpoint_never_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    last.write_text("damaged")
    previous.write_text("good")
    unfinished = tmp_path / f"last.ckpt.{2**22 + 1}.part"  # of a dead process: Linux has no such number
    unfinished.touch()
    progress = SimpleNamespace(current=SimpleNamespace(ready=1))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer: Any = SimpleNamespace(ckpt_path=previous, global_step=1, is_global_zero=True, fit_loop=loop)
    trainer.save_checkpoint = lambda path: path.write_text(f"step {trainer.global_step}")
    save = SaveLast(last, previous, StopSignals())
    save.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert not unfinished.exists()
    for step, kept in ((2, "good"), (3, "step 2")):
        trainer.global_step = step
        save.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
        assert (last.read_text(), previous.read_text()) == (f"step {step}", kept)


def test_the_first_process_alone_moves_files(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(global_step=1, is_global_zero=False, save_checkpoint=lambda path: path.touch())
    save = SaveLast(tmp_path / "last.ckpt", tmp_path / "previous.ckpt", StopSignals())
    save.path.write_text("of the first process")
    save._saved_step, save._last_is_good = 0, True
    save._save(trainer, 1)
    assert save.path.read_text() == "of the first process"
    assert not save.previous.exists()


def test_a_signal_is_answered_with_a_checkpoint_after_the_step_under_way(tmp_path: Path) -> None:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, all: mine)
    trainer: Any = SimpleNamespace(global_step=0, accumulate_grad_batches=2, is_global_zero=True, strategy=strategy)
    trainer.save_checkpoint = lambda path: path.write_text(f"step {trainer.global_step}")
    save = SaveLast(tmp_path / "last.ckpt", tmp_path / "previous.ckpt", StopSignals())
    save._note(trainer)
    save._last_is_good = True
    save.signals.requested = signal.SIGUSR1
    trainer.global_step = 1
    save.on_train_batch_start(trainer, None, None, 3)  # type: ignore[arg-type]  # in the middle of a step
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoppedError, match="after step 1") as stopped:
        save.on_train_batch_start(trainer, None, None, 2)  # type: ignore[arg-type]
    assert stopped.value.signal == signal.SIGUSR1
    assert save.path.read_text() == "step 1"


@pytest.mark.parametrize(
    ("steps", "minutes", "expected"), [(None, 2, [3, 6]), (2, 60, [2, 4, 6]), (4, 2, [3, 6]), (None, 60, [])]
)
def test_a_checkpoint_is_due_after_its_steps_or_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None, minutes: float, expected: list[int]
) -> None:
    progress = SimpleNamespace(current=SimpleNamespace(ready=1))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, all: mine and not all)  # the others' clocks say no
    trainer: Any = SimpleNamespace(
        ckpt_path=None, global_step=0, accumulate_grad_batches=1, is_global_zero=True, fit_loop=loop, strategy=strategy
    )
    saved: list[int] = []
    trainer.save_checkpoint = lambda path: path.touch() or saved.append(trainer.global_step)
    save = SaveLast(tmp_path / "last.ckpt", tmp_path / "previous.ckpt", StopSignals(), steps, minutes)
    for step in range(8):
        now = step * 50.0  # seconds
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda now=now: now))
        trainer.global_step = step
        if step == 0:
            save.on_train_start(trainer, None)  # type: ignore[arg-type]
        save.on_train_batch_start(trainer, None, None, step)  # type: ignore[arg-type]
    assert saved == expected
