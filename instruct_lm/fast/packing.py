"""Sequences of different lengths as one, with the prefix that all begin with standing once.

A causal model gives equal prefixes equal hidden states, so they need computing once. Linear layers and norms see the
packed tokens alone: no padding, no repeated prefix. Only attention sees rows (`Packing.rows`), so its cost is that of
the padded batch, never the square of the packed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed sequence stand in the rows that attend to themselves.

    The packed sequence is a prefix of P tokens that every row begins with, then each row's remainder.

    Attributes:
        rows: int64 (B, L); the packed index of each row's tokens, right-padded with any valid index.
        columns: int64 (T,); the flat index (row * L + column) at which each packed token stands in ``rows``.
        prefix_length: P, the packed tokens that stand in every row.
    """

    rows: Tensor
    columns: Tensor
    prefix_length: int

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on ``device``."""
        return Packing(self.rows.to(device), self.columns.to(device), self.prefix_length)


def pack(lengths: Tensor, prefix_length: int) -> Packing:
    """The packing of rows of these lengths, int64 (B,), whose first ``prefix_length`` tokens are the same."""
    grid = torch.arange(int(lengths.max())).expand(len(lengths), -1)  # (B, L)
    kept = grid < lengths[:, None]
    kept[1:] &= grid[1:] >= prefix_length
    own = kept.clone()
    own[0, :prefix_length] = False
    columns = torch.cat((torch.arange(prefix_length), own.flatten().nonzero()[:, 0]))
    rows = torch.zeros_like(kept, dtype=torch.long)
    rows.view(-1)[columns] = torch.arange(len(columns))
    rows[:, :prefix_length] = torch.arange(prefix_length)
    return Packing(rows, columns, prefix_length)


def common_prefix_length(rows: Sequence[Tensor]) -> int:
    """Tokens that all rows begin with; each row keeps at least one of its own. 0 for a single row."""
    shortest = min(len(row) for row in rows)
    if len(rows) < 2 or shortest < 2:
        return 0
    heads = torch.stack([row[: shortest - 1] for row in rows])
    differs = (heads != heads[0]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest - 1


class Unpack(torch.autograd.Function):
    """(T, C) → (B, L, C). Padding sends back no gradient, the shared prefix the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        """Copy the packed tokens to their rows."""
        ctx.packing = packing
        return x.index_select(0, packing.rows.flatten()).view(*packing.rows.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(B, L, C) → (T, C)."""
        prefix_length = ctx.packing.prefix_length
        out = grad.flatten(0, 1).index_select(0, ctx.packing.columns)
        if prefix_length:
            torch.sum(grad[:, :prefix_length], 0, out=out[:prefix_length])
        return out, None


class Pack(torch.autograd.Function):
    """(B, L, C) → (T, C), reading the shared prefix from the first row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        """Copy the tokens of the rows to their packed places."""
        ctx.packing = packing
        return x.flatten(0, 1).index_select(0, packing.columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(T, C) → (B, L, C)."""
        batch_size, length = ctx.packing.rows.shape
        out = grad.new_zeros(batch_size * length, grad.shape[-1])
        return out.index_copy_(0, ctx.packing.columns, grad).view(batch_size, length, -1), None
