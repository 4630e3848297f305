"""From encoded examples to batches: right-padded rows with a loss weight for each target.

Lengths tell padding from tokens. Token ids cannot, since the padding id may equal the end token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Batch(NamedTuple):
    """The examples of one forward pass: B rows of at most L input tokens; a tuple, which Lightning moves to a device.

    Attributes:
        input_ids: int64 (B, L).
        labels: int64 (B, L); the token that each position must predict.
        weights: float32 (B, L); weight of each label in the loss, 0 for masked labels and padding.
        response_weights: float32 (B, L); 1 for labels of a response and its end token, else 0.
        lengths: Number of input tokens of each row, without padding.
        shared_prefix: Number of leading input tokens that all rows have in common.
        entries: Number of each example's entry in its file, from 1; messages name it.
        step_weight: Σ weights over all batches of the optimizer step, in all processes; None: over this batch.
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
        """Number of tokens, with end tokens and without padding."""
        return sum(self.lengths) + len(self.lengths)


def collate(
    input_ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    is_response: Sequence[np.ndarray],
    *,
    pad_id: int = 0,
    entries: Sequence[int] = (),
    step_weight: float | None = None,
) -> Batch:
    """Make a batch of encoded examples.

    Args:
        input_ids: Integer arrays (L_i,), end token included.
        weights: Float arrays (L_i,); weight of each token as a target. The first token is never a target.
        is_response: Boolean arrays (L_i,); whether a token belongs to a response or ends one.
        pad_id: Id of the padding; any id works, since no result depends on it.
        entries, step_weight: As for `Batch`.

    Raises:
        ValueError: An example has fewer than two tokens.

    Example:
        Prompt 8 8, header 9, response 1 2 and end token 5, with masked instructions, and a shorter row:

        >>> rows = [np.array([8, 8, 9, 1, 2, 5]), np.array([8, 9, 5])]
        >>> weights = [np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 1])]
        >>> batch = collate(rows, weights, [np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1])], pad_id=5)
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
    # Token t of a row is the label of position t - 1: ids and weights move one to the left, together.
    inputs = [row[:-1] for row in rows]
    target_weights, responses = (
        [torch.as_tensor(np.asarray(values[1:]), dtype=torch.float32) for values in of_tokens]
        for of_tokens in (weights, is_response)
    )
    return Batch(
        pad_sequence(inputs, batch_first=True, padding_value=pad_id),
        pad_sequence([row[1:] for row in rows], batch_first=True),
        pad_sequence(target_weights, batch_first=True),
        pad_sequence(responses, batch_first=True),
        tuple(map(len, inputs)),
        shared_prefix_length(inputs),
        tuple(entries),
        step_weight,
    )


def shared_prefix_length(rows: Sequence[Tensor]) -> int:
    """Number of leading tokens that all rows share.

    Args:
        rows: int64 (L_i,) each.

    Returns:
        At most the length of the shortest row minus 1, so that each row keeps a token of its own; 0 for a single row.
    """
    shortest = min(len(row) for row in rows)
    if len(rows) < 2 or shortest < 2:
        return 0
    heads = torch.stack([row[: shortest - 1] for row in rows])
    differs = (heads != heads[0]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest - 1
