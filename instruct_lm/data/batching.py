"""Encoded examples to batches: right-padded rows, with a loss weight for each target.

Padding is known by lengths, never by token id, since the padding id equals the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass: B rows of at most L input tokens.

    Attributes:
        input_ids: int64 (B, L).
        labels: int64 (B, L); the token that each position is to predict.
        weights: float32 (B, L); weight of each label in the loss. 0: masked, or padding.
        response_weights: float32 (B, L); 1 for labels of the response and its end token, else 0.
        lengths: Input tokens of each row, without padding.
        shared_prefix: Input tokens that all rows begin with.
        entries: Number of each example in its split, from 0; for messages.
        step_weight: Σ weights over all batches of the same optimizer step, all processes included; None: over this one.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    response_weights: Tensor
    lengths: tuple[int, ...]
    shared_prefix: int = 0
    entries: tuple[int, ...] = ()
    step_weight: float | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the examples, end tokens included, padding not."""
        return sum(self.lengths) + len(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``; Lightning calls it."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def collate(
    input_ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    response_starts: Sequence[int],
    *,
    pad_id: int = 0,
    entries: Sequence[int] = (),
    step_weight: float | None = None,
) -> Batch:
    """Make a batch of encoded examples.

    Args:
        input_ids: int arrays (L_i,), end token included.
        weights: float arrays (L_i,); weight of each token as a target. The first token is never one.
        response_starts: Index of each response's first token.
        pad_id: Fills the rows; any id does, for nothing depends on it.
        entries, step_weight: As in `Batch`.

    Raises:
        ValueError: An example of fewer than two tokens.

    Example:
        Prompt 8 8, header 9, response 1 2, end token 5, with masked instructions; and a shorter row:

        >>> rows = [np.array([8, 8, 9, 1, 2, 5]), np.array([8, 9, 5])]
        >>> batch = collate(rows, [np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 1])], [3, 2], pad_id=5)
        >>> batch.input_ids.tolist()  # a row's last token predicts nothing, so it is no input
        [[8, 8, 9, 1, 2], [8, 9, 5, 5, 5]]
        >>> batch.labels.tolist()  # each label is the token that follows
        [[8, 9, 1, 2, 5], [9, 5, 0, 0, 0]]
        >>> batch.weights.tolist()  # the end token 5 counts once in each row, its copies in the padding never
        [[0.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]]
        >>> batch.response_weights.tolist()
        [[0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0]]
        >>> batch.lengths, batch.shared_prefix
        ((5, 2), 1)
    """
    rows = [torch.as_tensor(np.asarray(ids), dtype=torch.long) for ids in input_ids]
    for row, entry in zip(rows, entries or range(len(rows)), strict=True):
        if len(row) < 2:
            raise ValueError(f"entry {entry} has {len(row)} token(s); at least 2 are needed to predict one")
    lengths = [len(row) - 1 for row in rows]
    shape = (len(rows), max(lengths))
    inputs, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    label_weights, response_weights = torch.zeros(shape), torch.zeros(shape)
    for i, (row, weight, start, n) in enumerate(zip(rows, weights, response_starts, lengths, strict=True)):
        # Token t of a row is the label of position t - 1: ids and weights move one to the left, together.
        inputs[i, :n], labels[i, :n] = row[:-1], row[1:]
        label_weights[i, :n] = torch.as_tensor(np.asarray(weight[1:]), dtype=torch.float32)
        response_weights[i, max(start - 1, 0) : n] = 1.0
    return Batch(
        inputs,
        labels,
        label_weights,
        response_weights,
        tuple(lengths),
        shared_prefix_length([row[:-1] for row in rows]),
        tuple(entries),
        step_weight,
    )


def shared_prefix_length(rows: Sequence[Tensor]) -> int:
    """Tokens that all rows, int64 (L_i,), begin with; each row keeps at least one of its own. 0 for a single row."""
    shortest = min(len(row) for row in rows)
    if len(rows) < 2 or shortest < 2:
        return 0
    heads = torch.stack([row[: shortest - 1] for row in rows])
    differs = (heads != heads[0]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest - 1
