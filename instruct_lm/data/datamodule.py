"""From a data source to batches, as a LightningDataModule."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from instruct_lm.data.batching import Batch, collate, shared_prefix_length
from instruct_lm.data.dataset import Splits, duplicates_between, load_conversations, split
from instruct_lm.data.encoded import EncodedDataset, loss_weights
from instruct_lm.data.encoding import encode_cached
from instruct_lm.data.near_duplicates import removed_message, without_near_duplicates
from instruct_lm.data.pieces import Kind
from instruct_lm.data.prompts import get_style
from instruct_lm.data.sampling import MicroBatch, StepLoader, StepSampler
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher

log = logging.getLogger(__name__)


class BatchDataset(Dataset[Batch]):
    """Makes a batch of each planned micro-batch.

    Args:
        encoded: The encoded entries of a split.
        prompt_loss_weight, mask_header: As for `instruct_lm.data.encoded.loss_weights`.
    """

    def __init__(self, encoded: EncodedDataset, prompt_loss_weight: float, mask_header: bool) -> None:
        self.encoded = encoded
        self.weights = [loss_weights(row, prompt_loss_weight, mask_header) for row in encoded]

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        rows = [self.encoded[i] for i in micro_batch.rows]
        counts = not micro_batch.idle
        return collate(
            [row.input_ids for row in rows],
            [self.weights[i] * counts for i in micro_batch.rows],
            [(row.kinds == Kind.RESPONSE) & counts for row in rows],
            entries=[int(self.encoded.entries[i]) for i in micro_batch.rows],
            step_weight=micro_batch.step_weight,
        )


@dataclass(eq=False, repr=False)
class InstructionDataModule(pl.LightningDataModule):
    """Downloads, splits, encodes and batches instruction entries.

    Attributes:
        encoded: Split name → its encoded entries, once `setup` has made them.
        step_size: As for `StepSampler`; a run that goes on sets its own.

    Args:
        source: A source string (see `instruct_lm.io.sources.FORMS`; ``sample`` for the embedded entries), a path, or a
            list of entries.
        tokenizer: The model's tokenizer.
        style: The prompt style: ``alpaca``, ``phi3``, ``chatml``, or ``template`` for the model's own chat template.
        block_size: Longest row that the model takes, in tokens.
        fetcher: Downloads the source; None: a `Fetcher` with its defaults.
        sha256: Hash that the source must have; None: no check.
        prompt_loss_weight, mask_header: As for `instruct_lm.data.encoded.loss_weights`.
        train_fraction, test_fraction, shuffle, seed: As for `instruct_lm.data.dataset.split`.
        batch_size, group_by_length: As for `StepSampler`, which takes the accumulation from the trainer.
        max_length, overlong: As for `instruct_lm.data.encoding.encode_conversations`, with ``block_size`` for None.
        num_workers: Number of processes that make batches; 0: this process makes them, which is seldom slower.
        limit, columns, unusable, clean: As for `instruct_lm.data.dataset.load_conversations`.
        deduplicate: Similarity to a test or validation entry from which a training entry is left out; None: none is.
        cache_dir: Folder of the token cache; None: no cache.
    """

    source: str | Path | Sequence[dict[str, Any]]
    tokenizer: Tokenizer
    style: str = "alpaca"
    _: KW_ONLY
    block_size: int = 1024
    fetcher: Fetcher = Fetcher()  # noqa: RUF009  (frozen)
    sha256: str | None = None
    prompt_loss_weight: float = 1.0
    mask_header: bool = False
    train_fraction: float = 0.85
    test_fraction: float = 0.10
    shuffle: bool = False
    seed: int = 123
    batch_size: int = 8
    group_by_length: bool = False
    max_length: int | None = None
    overlong: str = "drop"
    num_workers: int = 0
    limit: int | None = None
    columns: Mapping[str, str] | None = None
    unusable: Literal["drop", "error"] = "drop"
    clean: bool = False
    deduplicate: float | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.prompt_style = get_style(self.style, self.tokenizer)
        self.encoded: dict[str, BatchDataset] = {}
        self.step_size = 0
        # A row's last token is no input, so a row of block_size + 1 fits; block_size keeps room for one in generation.
        self.max_length = self.max_length or self.block_size

    def prepare_data(self) -> None:
        """Download the source; Lightning calls this method once per machine."""
        self._local()

    def _local(self) -> str | Path | Sequence[dict[str, Any]]:
        """The source as a local file, or unchanged if it is a list."""
        if isinstance(self.source, (str, Path)):
            return self.fetcher.fetch(str(self.source), sha256=self.sha256)
        return self.source

    def setup(self, stage: str | None = None) -> None:
        """Split the entries and encode the splits that a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all of them.

        Raises:
            InputError: Entries are malformed, a split is empty, or none of its entries can be used.
        """
        needed = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ()}
        for name in needed.get(stage or "", Splits._fields):
            if name not in self.encoded:
                self.encoded[name] = self._encode(name)

    @cached_property
    def splits(self) -> Splits:
        """The entries, loaded and split on first use.

        Raises:
            InputError: Entries are malformed, or a split is empty.
        """
        conversations = load_conversations(
            self._local(), self.limit, columns=self.columns, unusable=self.unusable, clean=self.clean
        )
        splits = split(conversations, self.train_fraction, self.test_fraction, self.shuffle, self.seed)
        if self.deduplicate is not None:
            splits, removed = without_near_duplicates(splits, self.deduplicate)
            log.info("%s", removed_message(removed, self.deduplicate))
        log.info("splits: train %d, test %d, validation %d", *map(len, splits))
        if duplicates := duplicates_between(splits):
            numbers = ", ".join(str(number) for found in duplicates[0].places.values() for number in found)
            log.warning("%d prompts stand in more than one split, the first in entries %s", len(duplicates), numbers)
        return splits

    def _encode(self, name: str) -> BatchDataset:
        conversations, settings = self.splits._asdict()[name], (self.max_length, self.overlong, self.cache_dir)
        try:
            encoded = encode_cached(conversations, self.tokenizer, self.prompt_style, *settings)
        except InputError as error:
            raise InputError(f"{name} split: {error}") from error
        if too_long := encoded.dropped + encoded.truncated:
            log.warning(
                "%s split: %d of %d entries are longer than %d tokens: %d dropped, %d truncated (data.overlong=%s)",
                *(name, too_long, len(conversations), self.max_length),
                *(encoded.dropped, encoded.truncated, self.overlong),
            )
        responses = int((encoded.kinds == Kind.RESPONSE).sum())
        log.info(
            "%s split: %d rows of %d tokens, %d of them in responses",
            *(name, len(encoded), len(encoded.input_ids), responses),
        )
        return BatchDataset(encoded, self.prompt_loss_weight, self.mask_header)

    @property
    def shared_prefix(self) -> int:
        """Number of tokens that the first rows of the training split have in common, up to 32 of them."""
        encoded = self.encoded["train"].encoded
        rows = [torch.from_numpy(encoded[i].input_ids) for i in range(min(32, len(encoded)))]
        return shared_prefix_length(rows)

    def train_dataloader(self) -> StepLoader:
        """Batches of the training split, in a new order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> StepLoader:
        """Batches of the validation split; rows of similar length share a batch, which changes no sum."""
        return self._loader("validation")

    def test_dataloader(self) -> StepLoader:
        """Batches of the test split, as for validation."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Lists of test entries to answer, in file order."""
        return DataLoader(self.splits.test, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def _loader(self, name: str) -> StepLoader:
        dataset, shuffle, trainer = self.encoded[name], name == "train", self.trainer
        sampler = StepSampler(
            dataset.encoded.lengths,
            np.array([weights.sum(dtype=np.float64) for weights in dataset.weights]),
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer and shuffle else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            step_size=self.step_size if shuffle else 0,
            shuffle=shuffle,
            seed=self.seed,
            group_by_length=self.group_by_length or not shuffle,
        )
        return StepLoader(dataset, sampler, self.num_workers)
