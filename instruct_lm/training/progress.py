"""The progress bar: loss and tokens per second within 80 columns, and what a pause is for."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

_SHORT = {"train/loss": ("loss", "{:.3f}"), "train/tokens_per_second": ("tokens/s", "{:.0f}")}
_SHORT |= {"val/response_loss": ("val", "{:.3f}")}


class Progress(TQDMProgressBar):
    """Lightning's bar with short names, in the order of what matters when the terminal is narrow.

    Example::

        epoch 1/2:  43%|███▍    | 50/117 [00:59<01:20, loss=0.540, tokens/s=870, val=0.761]
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What follows the bar."""
        found = trainer.progress_bar_metrics
        return {short: form.format(found[name]) for name, (short, form) in _SHORT.items() if name in found}

    @property
    def validation_description(self) -> str:
        """What stands before the bar of a validation."""
        before = self.trainer.state.fn == "validate" and self.trainer.global_step == 0
        return "validating before the first step" if before else "validating"

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show the epoch that is resumed: Lightning begins none in its middle."""
        super().on_train_start(trainer, *args)
        if trainer.fit_loop.restarted_mid_epoch:
            # Not `completed`: a checkpoint that is written in on_train_batch_end does not count its batch as such yet.
            self._show_epoch(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            self.train_progress_bar.refresh()

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count the batches of this epoch, and its time."""
        self._show_epoch(trainer, 0)
        self.train_progress_bar.reset()

    def _show_epoch(self, trainer: pl.Trainer, done: int) -> None:
        """Name the epoch, of which so many batches were done before a resume; it may end in its middle."""
        bar, total = self.train_progress_bar, self.total_train_batches
        if trainer.max_steps > 0:
            total = min(total, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        bar.total = None if math.isinf(total) else total
        bar.n = bar.initial = done
        last = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        bar.set_description(f"epoch {trainer.current_epoch + 1}{last}", refresh=False)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Name the bar, without the number of a data loader."""
        super().on_validation_batch_start(trainer, module, batch, batch_idx, *args)
        if batch_idx == 0:
            self.val_progress_bar.set_description(self.validation_description)

    @contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """Let the bar say what it waits for while the block runs."""
        bars = (self._val_progress_bar, self._train_progress_bar)
        bar = next((bar for bar in bars if bar is not None and not bar.disable), None)
        if bar is None:
            yield
            return
        description = bar.desc
        bar.set_description(what)
        try:
            yield
        finally:
            bar.set_description_str(description)


def saying(trainer: pl.Trainer, what: str) -> AbstractContextManager[None]:
    """The same with the bar of a trainer, if it has one."""
    bar = trainer.progress_bar_callback
    return bar.saying(what) if isinstance(bar, Progress) else nullcontext()
