"""The keys and values that generation keeps. Shapes: B rows, K heads of keys and values, L tokens, D = head_dim."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for B rows of at most ``capacity`` tokens, right-padded; see `GPT.new_cache`.

    Args:
        shape: (n_layer, B, 2K, capacity, D).
        dtype, device: Of the keys and values.

    Attributes:
        kv: Of that shape; the K heads of keys, then the K heads of values.
        lengths: int64 (B,); number of tokens that each row holds.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, since attention multiplies masked values by 0, and 0 · NaN would be NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(shape[1], dtype=torch.long, device=device)

    def append(self, layer: int, kv: Tensor) -> None:
        """Store (B, 2K, L, D) behind the tokens of each row; the caller raises ``lengths`` after the last layer."""
        rows = torch.arange(len(self.lengths), device=kv.device)[:, None]  # (B, 1)
        columns = self.lengths[:, None] + torch.arange(kv.shape[2], device=kv.device)  # (B, L)
        self.kv[layer][rows, :, columns] = kv.transpose(1, 2).to(self.kv.dtype)  # autocast makes another one

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 (b,)."""
        self.lengths = self.lengths[rows]
        longest = int(self.lengths.max())
        for layer in self.kv:  # one layer at a time, since all of them copied would double the memory
            layer[: len(rows), :, :longest] = layer[rows, :, :longest]
        self.kv = self.kv[:, : len(rows)]
