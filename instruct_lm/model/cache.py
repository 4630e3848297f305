"""The keys and values that generation keeps. Shapes: B rows, K heads of keys and values, L tokens, D = head_dim."""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for B rows of at most ``capacity`` tokens, right-padded; see `GPT.new_cache`.

    Args:
        shape: (n_layer, B, 2K, capacity, D).
        dtype, device: Of the keys and values.

    Attributes:
        kv: Of that shape; the K heads of keys, then the K heads of values.
        lengths: Number of tokens that each of the B rows holds: numbers of the host, so that nothing waits for a GPU.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, since attention multiplies masked values by 0, and 0 · NaN would be NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * shape[1]

    def extend(self, tokens: int) -> Tensor:
        """Make each row longer by L tokens, which `append` then stores; their columns, int64 (B, L)."""
        device = self.kv.device
        self._rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self._columns = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(tokens, device=device)
        self.lengths = [length + tokens for length in self.lengths]
        return self._columns

    def append(self, layer: int, kv: Tensor) -> None:
        """Store the (B, 2K, L, D) of a layer for the L tokens of the last `extend`."""
        self.kv[layer][self._rows, :, self._columns] = kv.transpose(1, 2).to(self.kv.dtype)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        longest = max(self.lengths)
        for layer in self.kv:  # one layer at a time, since all of them copied would double the memory
            layer[: len(rows), :, :longest] = layer[rows, :, :longest]
        self.kv = self.kv[:, : len(rows)]
