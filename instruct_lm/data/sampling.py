"""The plan of an epoch: which rows share an optimizer step, and which of them a forward pass.

All entries are encoded before training starts, so the weight of every optimizer step is known before its first
micro-batch. The plan hands it to each batch. So the loss of a step is a ratio of sums, whatever the accumulation and
the number of processes.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from instruct_lm.data.batching import Batch
from instruct_lm.errors import InputError


class MicroBatch(NamedTuple):
    """The rows of one forward pass, and Σ weights of its optimizer step.

    An idle one stands in for a process that has no rows left in a step: it holds a row of it that counts nothing.
    """

    rows: list[int]
    step_weight: float
    idle: bool = False


@dataclass(eq=False)
class StepSampler(Sampler[MicroBatch]):
    """Plans the micro-batches of an epoch; the same seed and epoch give the same plan on every machine.

    Args:
        lengths: int (n,); number of tokens of each row.
        weights: float (n,); Σ weights of each row.
        batch_size: Most rows of a micro-batch.
        accumulate: Number of micro-batches of an optimizer step in each process.
        rank, world_size: Number of this process, from 0, and number of processes.
        step_size: Number of rows of an optimizer step in all processes together; 0: ``batch_size`` times
            ``accumulate`` times ``world_size``. A run that goes on with another number of processes gives its own, and
            ``accumulate`` follows.
        shuffle: Whether each epoch has a new order.
        seed: Seed of the order.
        group_by_length: Whether rows of similar length share an optimizer step, which changes what a step sees.

    Attributes:
        epoch: The epoch that the next iteration plans, from 0.
        start: Number of micro-batches that the next iteration skips.

    Raises:
        InputError: While iterating: all weights of a step are 0.

    Example:
        With ``batch_size=2`` and ``accumulate=2`` a step takes four of these five rows. Of their 3, 7, 5 and 9 tokens,
        the two longest share a micro-batch, so that there is less padding. The fifth row is a step of its own:

        >>> lengths, weights = np.array([3, 7, 5, 9, 4]), np.ones(5)
        >>> [m.rows for m in StepSampler(lengths, weights, batch_size=2, accumulate=2, shuffle=False)]
        [[3, 1], [2, 0], [4]]

        The same steps on two processes; the first one has the longer rows:

        >>> def rows(rank: int) -> list[list[int]]:
        ...     plan = StepSampler(lengths, weights, batch_size=2, step_size=4, shuffle=False, rank=rank, world_size=2)
        ...     return [m.rows for m in plan if not m.idle]
        >>> rows(0), rows(1)
        ([[3, 1], [4]], [[2, 0]])
    """

    lengths: np.ndarray
    weights: np.ndarray
    _: KW_ONLY
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    step_size: int = 0
    shuffle: bool = True
    seed: int = 123
    group_by_length: bool = False
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.step_size = self.step_size or self.batch_size * self.accumulate * self.world_size
        self.accumulate = self._micro_batches(self.step_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration plans; Lightning calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.step_size)
        return full * self.accumulate + self._micro_batches(rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        done = 0
        for rows in self._steps():
            weight = float(self.weights[rows].sum())
            if not weight > 0:
                raise InputError(f"all loss weights of a step are 0; its training entries are {rows.tolist()}")
            # Sort from long to short, so that rows of similar length share a micro-batch. Neighbouring parts go to
            # different processes, which then need about the same time for a micro-batch.
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            parts = np.array_split(rows, self._micro_batches(len(rows)) * self.world_size)
            for part in parts[self.rank :: self.world_size]:
                if done >= start:
                    idle = len(part) == 0
                    yield MicroBatch((rows[:1] if idle else part).tolist(), weight, idle)
                done += 1

    def _steps(self) -> list[np.ndarray]:
        """The rows of each optimizer step of the epoch, for all processes together."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        if self.group_by_length:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        steps = np.split(order, range(self.step_size, len(order), self.step_size))
        if self.group_by_length and self.shuffle:  # the last step stays last, since it may be smaller
            steps = [steps[i] for i in (*rng.permutation(len(steps) - 1), len(steps) - 1)]
        return steps

    def _micro_batches(self, rows: int) -> int:
        """Number of micro-batches of each process for a step of so many rows."""
        return -(-rows // (self.batch_size * self.world_size))


class StepLoader(DataLoader[Batch]):
    """Loads planned batches, and can resume from a checkpoint in the middle of an epoch."""

    def __init__(self, dataset: Dataset[Batch], sampler: StepSampler, num_workers: int = 0) -> None:
        # A generator of its own: an iterator would otherwise draw from torch's global random numbers.
        generator = torch.Generator().manual_seed(sampler.seed)
        super().__init__(dataset, sampler=sampler, batch_size=None, num_workers=num_workers, generator=generator)
        self.plan = sampler
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own private iterator
        self.done = self.plan.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of optimizer steps handed out in this epoch; Lightning stores it in each checkpoint.

        A step is the same rows on any number of processes. Checkpoints are written between steps.
        """
        return {"steps": self.done % len(self) // self.plan.accumulate}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the steps that ``state`` counts."""
        self.plan.start = state["steps"] * self.plan.accumulate
