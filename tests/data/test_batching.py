"""Batches against hand computations and the book's collate functions."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from instruct_lm.data.batching import Batch, collate
from tests.data import responses


def labels(batch: Batch) -> list[list[int]]:
    """The labels that count, −100 elsewhere."""
    return torch.where(batch.weights > 0, batch.labels, -100).tolist()


# Sentinel ids: 8 and 9 stand for prompt and header, so that a swap cannot pass; 5 ends a row and pads it as well.
ROWS = [np.array([8, 8, 9, 1, 2, 5]), np.array([8, 9, 5])]
UNMASKED = [np.array([0, 1, 1, 1, 1, 1.0]), np.array([0, 1, 1.0])]
MASKED = [np.array([0, 0, 1, 1, 1, 1.0]), np.array([0, 1, 1.0])]
RESPONSES = responses(ROWS, [3, 2])


def test_padded_rows_train_exactly_one_end_token() -> None:
    batch = collate(ROWS, UNMASKED, RESPONSES, pad_id=5)
    assert batch.input_ids.tolist() == [[8, 8, 9, 1, 2], [8, 9, 5, 5, 5]]
    assert labels(batch) == [[8, 9, 1, 2, 5], [9, 5, -100, -100, -100]]
    assert batch.lengths == (5, 2)
    assert batch.n_tokens == 9


def test_masked_targets_are_left_out() -> None:
    batch = collate(ROWS, MASKED, RESPONSES, pad_id=5)
    assert labels(batch) == [[-100, 9, 1, 2, 5], [9, 5, -100, -100, -100]]
    assert batch.response_weights.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate(ROWS, MASKED, RESPONSES, entries=[7, 9], step_weight=2.5)
    batch = pl.LightningDataModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(batch, Batch)
    assert batch.input_ids.is_meta
    assert batch.response_weights.is_meta
    assert (batch.lengths, batch.shared_prefix, batch.entries, batch.step_weight) == ((5, 2), 1, (7, 9), 2.5)


def test_a_row_without_a_target_is_named() -> None:
    with pytest.raises(ValueError, match="entry 41 has 1 token"):
        collate([np.array([1, 2]), np.array([1])], [np.ones(2), np.ones(1)], [np.ones(2), np.ones(1)], entries=[40, 41])


@pytest.mark.parametrize("masked", [False, True])
def test_labels_equal_the_books(masked: bool) -> None:
    chapter = pytest.importorskip("llms_from_scratch.ch07", reason="the book's package is not installed")
    rows = [[8, 8, 9, 1, 2], [8, 9], [8, 8, 8, 9, 3, 3]]
    prompts = [2, 1, 3]
    inputs, targets = chapter.custom_collate_fn(rows, pad_token_id=5)
    if masked:  # the line that exercise 7.2 adds to the function, which the package does not carry
        for row, prompt in zip(targets, prompts, strict=True):
            row[: prompt - 1] = -100
    weights = [np.array([0.0] + [float(not masked or i >= p) for i in range(1, len(row) + 1)])
               for row, p in zip(rows, prompts, strict=True)]  # fmt: skip
    ended = [np.array([*row, 5]) for row in rows]
    batch = collate(ended, weights, responses(ended, prompts), pad_id=5)
    assert batch.input_ids.tolist() == inputs.tolist()
    assert labels(batch) == targets.tolist()
