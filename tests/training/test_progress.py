"""What the bar shows at 80 columns."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
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
