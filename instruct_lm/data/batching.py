"""Token ids and loss weights to batches: padded rows, or one packed sequence with the shared prefix once.

Both layouts are the same mathematics: the tests compare their losses and gradients. Padding is known by lengths, never
by token id, since the padding id equals the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instruct_lm.fast.packing import Packing, common_prefix_length, pack


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass, and the targets that count in its loss.

    Attributes:
        input_ids: int64, (B, L) padded or (T,) packed.
        position_ids: int64, shaped like ``input_ids``.
        target_positions: int64 (M,); index into the flattened ``input_ids`` of the position that predicts a target.
        target_ids: int64 (M,); the token to predict there.
        target_weights: float32 (M,); its weight in the loss, never 0.
        response_weights: float32 (M,); 1 for targets of the response and its end token, 0 for others.
        entries: the numbers of the examples in their split, from 0.
        packing: the rows of a packed batch; None for a padded one.
        n_tokens: tokens of the examples without padding, each counted in full.
        step_weight: sum of ``target_weights`` over all batches of the same optimizer step; None: over this one.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    target_weights: Tensor
    response_weights: Tensor
    entries: tuple[int, ...]
    packing: Packing | None = None
    n_tokens: int = 0
    step_weight: float | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {}  # a tensor or a packing each
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Packing)):
                moved[name] = value.to(device)
        return replace(self, **moved)


def collate(
    input_ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    response_starts: Sequence[int],
    *,
    layout: str = "packed",
    pad_id: int = 0,
    entries: Sequence[int] = (),
) -> Batch:
    """Make a batch of encoded examples.

    Args:
        input_ids: int arrays (L_i,), end token included.
        weights: float arrays (L_i,); weight of each token as a target. The first token is never one.
        response_starts: index of each response's first token.
        layout: ``padded`` or ``packed``.
        pad_id: fills rows of the padded layout; any id does, for nothing depends on it.
        entries: the examples' numbers, for messages.

    Raises:
        ValueError: an example with fewer than two tokens.
    """
    rows = [torch.as_tensor(np.asarray(ids), dtype=torch.long) for ids in input_ids]
    for row, entry in zip(rows, entries or range(len(rows)), strict=True):
        if len(row) < 2:
            raise ValueError(f"entry {entry} has {len(row)} token(s); at least 2 are needed to predict one")
    # The last token of a row predicts nothing, so it is no input.
    lengths = torch.tensor([len(row) - 1 for row in rows])
    columns = torch.arange(int(lengths.max()))
    valid = columns < lengths[:, None]  # (B, L)
    inputs = torch.full(valid.shape, pad_id)
    targets = torch.zeros_like(inputs)
    target_weights = torch.zeros(valid.shape)
    response_weights = torch.zeros(valid.shape)
    for i, (row, weight, start) in enumerate(zip(rows, weights, response_starts, strict=True)):
        inputs[i, : lengths[i]] = row[:-1]
        targets[i, : lengths[i]] = row[1:]
        target_weights[i, : lengths[i]] = torch.as_tensor(np.asarray(weight[1:]), dtype=torch.float32)
        response_weights[i, max(start - 1, 0) : lengths[i]] = 1.0

    position_ids = columns.expand(valid.shape)
    packing = None
    positions = torch.arange(inputs.numel()).view(valid.shape)  # index into the flattened input
    if layout == "packed":
        packing = pack(lengths, common_prefix_length([row[:-1] for row in rows]))
        positions = packing.rows
        inputs, position_ids = inputs.flatten()[packing.columns], position_ids.flatten()[packing.columns]
        # Within the prefix all rows predict the same token: the first row's target carries the sum of their weights.
        shared = max(packing.prefix_length - 1, 0)
        for summed in (target_weights, response_weights):
            summed[0, :shared] = summed[:, :shared].sum(0)
            summed[1:, :shared] = 0

    counted = valid & (target_weights > 0)
    return Batch(
        input_ids=inputs,
        position_ids=position_ids,
        target_positions=positions[counted],
        target_ids=targets[counted],
        target_weights=target_weights[counted],
        response_weights=response_weights[counted],
        entries=tuple(entries),
        packing=packing,
        n_tokens=int(lengths.sum()) + len(rows),
    )
