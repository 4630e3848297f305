"""From a data file to batches, planned a whole optimizer step at a time.

The entries are encoded before training starts, so the weight of every step is known before its first micro-batch: the
plan hands it to each `Batch`, and the loss of a step is a ratio of sums whatever its accumulation and ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from instruct_lm.data.batching import Batch, collate
from instruct_lm.data.dataset import Splits, duplicates_between, load_examples, split
from instruct_lm.data.encoding import EncodedDataset, encode_cached, loss_weights
from instruct_lm.data.prompts import Example, PromptStyle
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError

log = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """The rows of one forward pass, and the weight of the optimizer step it belongs to."""

    rows: list[int]
    step_weight: float


class StepSampler(Sampler[MicroBatch]):
    """Plans the micro-batches of an epoch, step by step, the same for a seed and epoch on every machine.

    A step takes ``batch_size * accumulate * world_size`` rows; the last one of an epoch takes what is left, in as few
    and as even micro-batches as fit. Within a step, rows of similar length share a micro-batch.

    Args:
        lengths: int (n,); tokens of each row.
        weights: float (n,); weight of each row in the loss.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of a step on each rank.
        rank, world_size: which of how many processes this is.
        shuffle: draw a new order each epoch.
        seed: of the order.
        group_by_length: put rows of similar length into the same step too, which changes what a step sees.

    Raises:
        InputError: fewer rows than processes, or a step without any weight.
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
        self.start = 0  # micro-batches of this epoch already done

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans; called by Lightning."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self._step_size)
        return full * self.accumulate + self._micro_batches(rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        done = 0
        for rows in self.steps():
            count = self._micro_batches(len(rows))
            weight = float(self.weights[rows].sum())
            if not weight > 0:
                raise InputError(f"no token of a step counts in the loss; its training entries are {rows.tolist()}")
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            shares = np.array_split(rows, count * self.world_size)[self.rank :: self.world_size]
            for share in shares:
                if done >= start:
                    yield MicroBatch(share.tolist(), weight)
                done += 1

    def steps(self) -> list[np.ndarray]:
        """The rows of each optimizer step of this epoch, all ranks together."""
        order = np.arange(len(self.lengths))
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle:
            rng.shuffle(order)
        if self.group_by_length:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        steps = np.split(order, range(self._step_size, len(order), self._step_size))
        if len(steps[-1]) < self.world_size:  # too few for a row on every rank: they join the step before
            steps[-2:] = [np.concatenate(steps[-2:])]
        if self.group_by_length and self.shuffle:
            steps = [steps[i] for i in (*rng.permutation(len(steps) - 1), len(steps) - 1)]
        return steps

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    def _micro_batches(self, rows: int) -> int:
        """Micro-batches on each rank for a step of that many rows: as few as fit, and none of them empty."""
        return min(self.accumulate, -(-rows // (self.batch_size * self.world_size)), rows // self.world_size)


class BatchDataset(Dataset[Batch]):
    """Turns planned micro-batches into batches.

    Args:
        encoded: the rows.
        prompt_loss_weight, mask_header: as for `instruct_lm.data.encoding.loss_weights`.
        layout: ``packed`` or ``padded``.
    """

    def __init__(self, encoded: EncodedDataset, prompt_loss_weight: float, mask_header: bool, layout: str) -> None:
        self.encoded = encoded
        self.prompt_loss_weight, self.mask_header, self.layout = prompt_loss_weight, mask_header, layout

    def row_weights(self) -> np.ndarray:
        """Σ w of each row, float64 (n,)."""
        return np.array([self._weights(i).sum(dtype=np.float64) for i in range(len(self.encoded))])

    def _weights(self, row: int) -> np.ndarray:
        return loss_weights(self.encoded[row], self.prompt_loss_weight, self.mask_header)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        rows = [self.encoded[i] for i in micro_batch.rows]
        batch = collate(
            [row.input_ids for row in rows],
            [self._weights(i) for i in micro_batch.rows],
            [row.prompt_length + row.header_length for row in rows],
            layout=self.layout,
            entries=[int(self.encoded.entries[i]) for i in micro_batch.rows],
        )
        return replace(batch, step_weight=micro_batch.step_weight)


class StepLoader(DataLoader[Batch]):
    """A loader of planned batches that a checkpoint can continue in the middle of an epoch."""

    def __init__(self, dataset: BatchDataset, sampler: StepSampler, num_workers: int = 0) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)
        self.plan = sampler
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own private iterator
        self.done = self.plan.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch; called by Lightning for each checkpoint."""
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches of ``state``."""
        self.plan.start = state["done"]


class InstructionDataModule(pl.LightningDataModule):
    """Loads, splits, encodes and batches instruction entries.

    Args:
        path: the data file, or ``sample``.
        tokenizer: encodes the entries.
        style: the prompt style.
        block_size: most tokens of a row that the model takes.
        prompt_loss_weight, mask_header: as for `instruct_lm.data.encoding.loss_weights`.
        train_fraction, test_fraction, shuffle, seed: as for `instruct_lm.data.dataset.split`.
        batch_size, accumulate, group_by_length: as for `StepSampler`.
        max_length, overlong: as for `instruct_lm.data.encoding.encode_examples`.
        layout: ``packed`` or ``padded``.
        num_workers: processes that make batches; 0 makes them in this one, which is seldom slower.
        limit: use the first entries only.
        cache_dir: folder of the token cache; None: encode each time.
    """

    def __init__(
        self,
        path: Path | str,
        tokenizer: Tokenizer,
        style: PromptStyle,
        block_size: int,
        *,
        prompt_loss_weight: float = 1.0,
        mask_header: bool = False,
        train_fraction: float = 0.85,
        test_fraction: float = 0.10,
        shuffle: bool = False,
        seed: int = 123,
        batch_size: int = 8,
        accumulate: int = 1,
        group_by_length: bool = False,
        max_length: int | None = None,
        overlong: str = "drop",
        layout: str = "packed",
        num_workers: int = 0,
        limit: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self.path, self.tokenizer, self.style = path, tokenizer, style
        self.prompt_loss_weight, self.mask_header, self.layout = prompt_loss_weight, mask_header, layout
        self.train_fraction, self.test_fraction, self.shuffle, self.seed = train_fraction, test_fraction, shuffle, seed
        self.batch_size, self.accumulate, self.group_by_length = batch_size, accumulate, group_by_length
        # A row's last token is no input, so a row of block_size + 1 fits; block_size keeps room for one in generation.
        self.max_length, self.overlong = max_length or block_size, overlong
        self.num_workers, self.limit, self.cache_dir = num_workers, limit, cache_dir

    @cached_property
    def splits(self) -> Splits:
        """The entries, loaded and split when first asked for.

        Raises:
            InputError: malformed entries, or an empty split.
        """
        examples = load_examples(self.path, self.limit)
        splits = split(examples, self.train_fraction, self.test_fraction, self.shuffle, self.seed)
        sizes = (len(splits.train), len(splits.test), len(splits.validation))
        log.info("data: %d entries: train %d, test %d, validation %d", len(examples), *sizes)
        if duplicates := duplicates_between(splits):
            example = duplicates[0].example.instruction
            log.warning("%d entries stand in more than one split, for example: %s", len(duplicates), example)
        return splits

    @cached_property
    def train(self) -> BatchDataset:
        """The training split, encoded."""
        return self._encode(self.splits.train, "train")

    @cached_property
    def validation(self) -> BatchDataset:
        """The validation split, encoded."""
        return self._encode(self.splits.validation, "validation")

    def setup(self, stage: str | None = None) -> None:
        """Load, split and encode now, rather than at the first batch.

        Raises:
            InputError: as for `splits`, or nothing left of a split.
        """
        _ = self.train, self.validation

    def _encode(self, examples: Sequence[Example], name: str) -> BatchDataset:
        try:
            encoded = encode_cached(
                examples, self.tokenizer, self.style, self.max_length, self.overlong, self.cache_dir
            )
        except InputError as error:
            raise InputError(f"{name} split: {error}") from error
        if encoded.dropped or encoded.truncated:
            log.warning(
                "%s split: %d of %d entries are longer than %d tokens: %d dropped, %d truncated (data.overlong=%s)",
                name, encoded.dropped + encoded.truncated, len(examples), self.max_length, encoded.dropped,
                encoded.truncated, self.overlong,
            )  # fmt: skip
        return BatchDataset(encoded, self.prompt_loss_weight, self.mask_header, self.layout)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Optimizer steps of an epoch on that many processes."""
        full, rest = divmod(len(self.train.encoded), self.batch_size * self.accumulate * world_size)
        return max(1, full + (rest >= world_size))

    def train_dataloader(self) -> StepLoader:
        """Micro-batches of the training split, in a new order each epoch."""
        return self._loader(self.train, self.accumulate, shuffle=True)

    def val_dataloader(self) -> StepLoader:
        """The validation split, rows of similar length together: its losses are sums, so batches do not matter."""
        return self._loader(self.validation, 1, shuffle=False)

    def _loader(self, dataset: BatchDataset, accumulate: int, shuffle: bool) -> StepLoader:
        sampler = StepSampler(
            dataset.encoded.lengths,
            dataset.row_weights(),
            batch_size=self.batch_size,
            accumulate=accumulate,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            shuffle=shuffle,
            seed=self.seed,
            group_by_length=self.group_by_length or not shuffle,
        )
        return StepLoader(dataset, sampler, self.num_workers)
