"""The keys and values that generation keeps. Shapes: B rows, K heads of keys and values, L tokens, D = head_dim."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for B rows of at most ``capacity`` tokens, right-padded; see `GPT.new_cache`.

    Args:
        n_layer: Number of layers.
        shape: (B, K, capacity, D).
        dtype, device: Of the keys and values.

    Attributes:
        keys, values: One (B, K, capacity, D) tensor per layer.
        lengths: int64 (B,); number of tokens that each row holds.
    """

    def __init__(self, n_layer: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.lengths = torch.zeros(shape[0], dtype=torch.long, device=device)

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the first (B, K, L, D) of a layer."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached[:, :, : new.shape[2]] = new
            cached[:, :, new.shape[2] :] = 0  # masked values are multiplied by 0, so they must not be NaN

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store (B, K, 1, D) behind the tokens of each row; the caller raises ``lengths`` after the last layer."""
        rows = torch.arange(len(self.lengths), device=keys.device)
        self.keys[layer][rows, :, self.lengths] = keys[:, :, 0]
        self.values[layer][rows, :, self.lengths] = values[:, :, 0]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 (b,)."""
        longest = int(self.lengths[rows].max())
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                kept = tensor[:, :, :longest].index_select(0, rows)
                tensors[layer] = tensor[: len(rows)]
                tensors[layer][:, :, :longest] = kept
        self.lengths = self.lengths[rows]
