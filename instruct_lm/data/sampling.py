"""Which rows share an optimizer step and a forward pass, planned an epoch at a time.

All entries are encoded before training starts, so the weight of every optimizer step is known before its first
micro-batch. The plan hands it to each batch, and the loss of a step is a ratio of sums whatever its accumulation and
number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from instruct_lm.data.batching import Batch
from instruct_lm.errors import InputError


class MicroBatch(NamedTuple):
    """The rows of one forward pass, and Σ weights of the optimizer step that it belongs to."""

    rows: list[int]
    step_weight: float


class StepSampler(Sampler[MicroBatch]):
    """Plans the micro-batches of an epoch; the same seed and epoch give the same plan on every machine.

    Args:
        lengths: int (n,); tokens of each row.
        weights: float (n,); Σ weights of each row.
        batch_size: Rows of a micro-batch.
        accumulate: Micro-batches of an optimizer step in each process.
        rank, world_size: This process and the number of processes.
        shuffle: Draw a new order each epoch.
        seed: Of the order.
        group_by_length: Put rows of similar length into the same step, which changes what a step sees.

    Raises:
        InputError: Fewer rows than processes, or (while iterating) a step without any weight.

    Example:
        Five rows, ``batch_size=2, accumulate=2``: a step takes 4 rows. Of 3, 7, 5 and 9 tokens, the two long rows share
        a micro-batch, so that they pad each other less. The one row left is a step of a single micro-batch:

        >>> lengths, weights = np.array([3, 7, 5, 9, 4]), np.ones(5)
        >>> [m.rows for m in StepSampler(lengths, weights, batch_size=2, accumulate=2, shuffle=False)]
        [[3, 1], [2, 0], [4]]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        weights: np.ndarray,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 123,
        group_by_length: bool = False,
    ) -> None:
        if len(lengths) < world_size:
            raise InputError(f"{len(lengths)} training entries cannot be shared by {world_size} processes")
        self.lengths, self.weights = lengths, weights
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.group_by_length = shuffle, seed, group_by_length
        self.epoch = 0
        self.start = 0  # micro-batches of this epoch that the next iteration skips

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self._step_size)
        return full * self.accumulate + self._micro_batches(rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        done = 0
        for rows in self._steps():
            weight = float(self.weights[rows].sum())
            if not weight > 0:
                raise InputError(f"no token of a step counts in the loss; its training entries are {rows.tolist()}")
            # Longest first, so that rows of similar length share a micro-batch. Neighbours go to different processes,
            # which then finish a micro-batch at about the same time.
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            parts = np.array_split(rows, self._micro_batches(len(rows)) * self.world_size)
            for part in parts[self.rank :: self.world_size]:
                if done >= start:
                    yield MicroBatch(part.tolist(), weight)
                done += 1

    def _steps(self) -> list[np.ndarray]:
        """The rows of each optimizer step of this epoch, of all processes together."""
        order = np.arange(len(self.lengths))
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle:
            rng.shuffle(order)
        if self.group_by_length:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        steps = np.split(order, range(self._step_size, len(order), self._step_size))
        if len(steps[-1]) < self.world_size:  # fewer rows than processes: they join the step before
            steps[-2:] = [np.concatenate(steps[-2:])]
        if self.group_by_length and self.shuffle:  # the last step stays last, since it may be smaller
            steps = [steps[i] for i in (*rng.permutation(len(steps) - 1), len(steps) - 1)]
        return steps

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    def _micro_batches(self, rows: int) -> int:
        """Micro-batches in each process for a step of that many rows: as few as fit, and none of them empty."""
        return min(self.accumulate, -(-rows // (self.batch_size * self.world_size)), rows // self.world_size)


class StepLoader(DataLoader[Batch]):
    """A loader of planned batches that a checkpoint can continue in the middle of an epoch."""

    def __init__(self, dataset: Dataset[Batch], sampler: StepSampler, num_workers: int = 0) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)
        self.plan = sampler
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own private iterator
        self.done = self.plan.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch; Lightning calls it for each checkpoint."""
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches of ``state``."""
        self.plan.start = state["done"]
