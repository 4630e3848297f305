"""What the bar shows at 80 columns."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from tqdm import tqdm

from instruct_lm.training.progress import Progress, saying

METRICS = {"val/loss": 1.0, "val/response_loss": 0.7611, "train/loss": 0.5401, "train/tokens_per_second": 870.4}


@pytest.mark.parametrize(("elapsed", "total"), [(59, 117), (7 * 3600, 13000)])
def test_loss_and_tokens_per_second_stand_within_80_columns(elapsed: int, total: int) -> None:
    metrics = Progress().get_metrics(SimpleNamespace(progress_bar_metrics=METRICS), None)  # type: ignore[arg-type]
    postfix = ", ".join(f"{name}={value}" for name, value in metrics.items())  # as tqdm joins them
    line = tqdm.format_meter(
        total // 2, total, elapsed, ncols=80, prefix="epoch 1/2", postfix=postfix, bar_format=Progress.BAR_FORMAT
    )
    assert len(line) <= 80
    assert "loss=0.540, tokens/s=870" in line


def test_validation_metrics_alone_are_shown_before_the_first_step() -> None:
    trainer: Any = SimpleNamespace(progress_bar_metrics={"val/response_loss": 2.0, "val/loss": 3.0})
    assert Progress().get_metrics(trainer, None) == {"val": "2.000"}  # type: ignore[arg-type]


def test_a_bar_says_what_it_waits_for_and_goes_on_as_before() -> None:
    bar, shown = Progress(), io.StringIO()
    bar._train_progress_bar = tqdm(total=4, file=shown, ncols=80, desc="epoch 1/2")  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(progress_bar_callback=bar)
    with saying(trainer, "saving checkpoint"):
        assert shown.getvalue().rpartition("\r")[2].startswith("saving checkpoint: ")
    assert shown.getvalue().rpartition("\r")[2].startswith("epoch 1/2: ")
    bar.train_progress_bar.close()
    before = shown.getvalue()
    with saying(trainer, "answering"), saying(SimpleNamespace(progress_bar_callback=None), "answering"):  # type: ignore[arg-type]
        assert shown.getvalue() == before


class _Initial(pl.Callback):
    """What the bar holds as done before its first step, from which it takes the remaining time."""

    def __init__(self, checkpoint: Path) -> None:
        self.found: list[int] = []
        self.checkpoint = checkpoint

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found.append(trainer.progress_bar_callback.train_progress_bar.initial)  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.checkpoint)


def _fit(checkpoint: Path, steps: int, resume: bool = False) -> list[int]:
    initial = _Initial(checkpoint)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, max_steps=steps, limit_train_batches=4, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Progress(), initial],
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=checkpoint if resume else None)
    return initial.found


def _shown(text: str) -> list[str]:
    """`epoch: done/total`, as the bar goes through them."""
    found = [f"{epoch}: {counted}" for epoch, counted in re.findall(r"(epoch \d/3): [^[]*? (\d/\d) \[", text)]
    return [one for i, one in enumerate(found) if i == 0 or one != found[i - 1]]


@pytest.mark.filterwarnings("ignore")
def test_each_epoch_begins_at_zero_and_a_resumed_one_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fit(tmp_path / "middle.ckpt", 6) == [0] * 6
    first = _shown("".join(capsys.readouterr()))
    assert first == [f"epoch 1/3: {n}/4" for n in range(5)] + [f"epoch 2/3: {n}/2" for n in range(3)]
    assert _fit(tmp_path / "middle.ckpt", 11, resume=True) == [2, 2, 0, 0, 0]
    second = _shown("".join(capsys.readouterr()))
    assert second == [f"epoch 2/3: {n}/4" for n in range(2, 5)] + [f"epoch 3/3: {n}/3" for n in range(4)]
