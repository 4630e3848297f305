"""Rows of different lengths as one packed sequence, with the prefix that all begin with standing once.

A causal model gives equal prefixes equal hidden states, so they need computing once. Linear layers and norms see the
packed tokens alone: no padding, no repeated prefix. Only attention sees rows, gathered per layer into a padded grid, so
its cost is that of the padded batch, never the square of the packed length.

Nearest prior art: RadixMLP (arXiv 2601.15013, inference only), prefix sharing for DPO (2410.20305), Tree Training
(2511.00413), Prefix Grouper (2506.05433).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instruct_lm.data.batching import shared_prefix_length
from instruct_lm.fast import rounding
from instruct_lm.fast.linear import FastFrozenLinear, FastLinear, product
from instruct_lm.model.cache import KVCache
from instruct_lm.model.gpt import GPT, CausalSelfAttention


@dataclass(frozen=True)
class Packing:
    """Where T packed tokens stand in B rows of at most L tokens.

    The packed sequence is the prefix of P tokens that every row begins with, then each row's remainder.

    Attributes:
        rows: int64 (B, L); the packed index of each row's tokens, right-padded with 0.
        columns: int64 (T,); the flat index (row · L + column) at which each packed token stands in ``rows``.
        prefix_length: P.
    """

    rows: Tensor
    columns: Tensor
    prefix_length: int


def pack(lengths: Sequence[int], prefix_length: int, device: torch.device | str = "cpu") -> Packing:
    """Plan the packing of rows of these lengths whose first ``prefix_length`` tokens are the same.

    Example:
        Rows a b c d, a b e and a b f g h share the prefix a b. Packed they are a b | c d | e | f g h:

        >>> packing = pack([4, 3, 5], prefix_length=2)
        >>> packing.columns.tolist()  # c stands in row 0, column 2: 0 · 5 + 2; e in row 1, column 2: 1 · 5 + 2
        [0, 1, 2, 3, 7, 12, 13, 14]
        >>> packing.rows.tolist()  # each row finds the prefix at 0 and 1, then its own tokens; 0 fills the rest
        [[0, 1, 2, 3, 0], [0, 1, 4, 0, 0], [0, 1, 5, 6, 7]]
    """
    columns = torch.arange(max(lengths)).expand(len(lengths), -1)  # (B, L)
    own = columns < torch.tensor(lengths)[:, None]  # tokens, not padding
    own[:, :prefix_length] = False  # of the remainders alone
    places = torch.cat((torch.arange(prefix_length), own.flatten().nonzero()[:, 0]))
    rows = torch.zeros_like(own, dtype=torch.long)
    rows.view(-1)[places] = torch.arange(len(places))
    rows[:, :prefix_length] = torch.arange(prefix_length)  # every row reads the prefix that stands once
    return Packing(rows.to(device), places.to(device), prefix_length)


class _Unpack(torch.autograd.Function):
    """(T, ...) → (B, L, ...). In the backward pass, padding has no gradient, and the prefix sums those of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.rows.flatten()).unflatten(0, packing.rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        prefix_length = ctx.packing.prefix_length
        out = grad.flatten(0, 1).index_select(0, ctx.packing.columns)
        torch.sum(grad[:, :prefix_length], 0, out=out[:prefix_length])
        return out, None


class _Pack(torch.autograd.Function):
    """(B, L, C) → (T, C), reading the shared prefix from the first row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.flatten(0, 1).index_select(0, packing.columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch_size, length = ctx.packing.rows.shape
        out = grad.new_zeros(batch_size * length, grad.shape[-1])
        return out.index_copy_(0, ctx.packing.columns, grad).view(batch_size, length, -1), None


class PackedAttention(CausalSelfAttention):
    """Attention that takes a packed sequence too."""

    def attend(self, heads: Tensor, *, packing: Packing | None = None, **options: Any) -> Tensor:
        """(T, H + 2K, D) → (T, H · D) with a ``packing``, else as its base.

        On a CPU it stays in fp32 under autocast: its products are small, and each would be prepared anew in bf16.
        """
        if rounding.is_on(heads.device):
            with torch.autocast("cpu", enabled=False):
                return self.attend(heads.float(), packing=packing, **options)
        if packing is None:
            return super().attend(heads, **options)
        rows = super().attend(_Unpack.apply(heads, packing), **options)  # (B, L, H · D)
        return _Pack.apply(rows, packing)


class PackedGPT(GPT):
    """A `GPT` of such layers that computes a common prefix of prompts once.

    Attributes:
        keeps_rounded: Under autocast on a CPU, the weights' bf16 copies last until the weights change, for several
            backward passes to an optimizer step; False: each until its layer's backward pass.
    """

    keeps_rounded = False

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None, **attention: Any) -> Tensor:
        """As `GPT.hidden_states`; under autocast on a CPU it rounds all weights that have changed first."""
        if rounding.is_on(input_ids.device):
            rounding.hold(_matrices(self), self.keeps_rounded)
        return super().hidden_states(input_ids, position_ids, **attention)

    def packed_states(self, input_ids: Tensor, packing: Packing, **attention: Any) -> Tensor:
        """Hidden states (T, C) of right-padded ids, int64 (B, L)."""
        at = packing.columns
        ids, positions = input_ids.flatten()[at], at % input_ids.shape[1]
        return self.hidden_states(ids, positions, packing=packing, **attention)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """As `GPT.new_cache`; in fp32 on a CPU, as attention is."""
        with torch.autocast("cpu", enabled=False):
            return super().new_cache(batch_size, capacity)

    def prefill(self, prompts: Sequence[Tensor], cache: KVCache) -> Tensor:
        """As `GPT.prefill`."""
        lengths, device = [len(prompt) for prompt in prompts], self.wte.weight.device
        input_ids = pad_sequence(list(prompts), batch_first=True).to(device)
        packing = pack(lengths, shared_prefix_length(prompts), device)
        cache.extend(input_ids.shape[1])
        hidden = self.packed_states(input_ids, packing, cache=cache)
        cache.lengths = lengths
        last = torch.tensor(lengths, device=device) - 1
        return hidden[packing.rows[torch.arange(len(lengths), device=device), last]]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) → (..., V); under autocast on a CPU in fp32 too."""
        if rounding.is_on(hidden.device):
            with torch.autocast("cpu", enabled=False):
                return self.logits(hidden.float())
        return super().logits(hidden) if torch.is_grad_enabled() else product(hidden, self.head_weight.to(hidden.dtype))


def _matrices(model: GPT) -> list[Tensor]:
    """The weights of the blocks' linear layers, without adapters."""
    return [part.weight for part in model.h.modules() if isinstance(part, FastLinear | FastFrozenLinear)]


def round_frozen(model: GPT) -> None:
    """Store the matrices that are not trained in bf16, in place."""
    for weight in _matrices(model):
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
