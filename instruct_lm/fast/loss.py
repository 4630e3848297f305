"""Head and loss in pieces, so that no full matrix of logits is held, and the embedding's gradient in place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.data.batching import Batch
from instruct_lm.fast.linear import product, product_dtype, weight_gradient
from instruct_lm.fast.packing import PackedGPT, pack
from instruct_lm.fast.rounding import first_half

SOFTMAX_ROWS = 32
"""Targets whose probabilities a CPU makes at once: 6 MB for GPT-2's vocabulary, which a cache holds."""

HEAD_PART = 8192
"""Rows of the head that are widened at once, where products need it wider."""

GRADIENT_PART = 2048
"""Rows of the head's gradient that are made at once where it has another dtype than products."""


ACCELERATOR_LOGITS = 2**28
"""Bytes of the fp32 logits that an accelerator holds at once; it needs large pieces to be busy. Not measured."""


def targets_at_once(device: str, dtype: torch.dtype, vocab_size: int) -> int:
    """Targets whose logits are held at once: on a CPU with GPT-2's vocabulary 26 MB in fp32.

    In a 16-bit dtype each piece costs a pass over the head's fp32 gradient, so pieces are larger: 51 MB.
    """
    if device != "cpu":
        return max(128, ACCELERATOR_LOGITS // (4 * vocab_size))
    return 128 if dtype.itemsize > 2 else 512


def packed_loss(model: PackedGPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sums of `instruct_lm.training.loss.batch_loss`, of the batch as one packed sequence.

    Within the shared prefix all rows predict the same token from the same hidden state, so one target carries the sum
    of their weights. The prefix's last position predicts each row's own next token: a target a row.

    Example:
        Rows a b c and a b d with all weights 1: the prefix is a b. Position 0 predicts b with weight 2; position 1
        predicts c with weight 1 and d with weight 1.
    """
    packing = pack(batch.lengths, batch.shared_prefix, batch.input_ids.device)
    weights, response_weights = batch.weights.clone(), batch.response_weights.clone()  # (B, L)
    shared = max(batch.shared_prefix - 1, 0)
    for summed in (weights, response_weights):
        summed[0, :shared] = summed[:, :shared].sum(0)
        summed[1:, :shared] = 0
    counted, labels, weights, response_weights = _counted(batch.labels, weights, response_weights)
    hidden = model.packed_states(batch.input_ids, packing)  # (T, C)
    hidden = hidden.index_select(0, packing.rows.flatten()[counted])  # (M, C)
    weighted, nll = linear_cross_entropy(hidden, model.head_weight, labels, weights)
    return weighted, (response_weights * nll).sum()


def chunked_loss(model: PackedGPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sums of `instruct_lm.training.loss.batch_loss`, of padded rows."""
    counted, labels, weights, response_weights = _counted(batch.labels, batch.weights, batch.response_weights)
    hidden = model.hidden_states(batch.input_ids).flatten(0, 1).index_select(0, counted)  # (M, C)
    weighted, nll = linear_cross_entropy(hidden, model.head_weight, labels, weights)
    return weighted, (response_weights * nll).sum()


def _counted(labels: Tensor, weights: Tensor, response_weights: Tensor) -> tuple[Tensor, ...]:
    """The flat places of the M labels with a weight, int64 (M,), and the three there.

    A GPU is waited for to count them: before the forward pass, when it has nothing else to do yet.
    """
    counted = (weights > 0).flatten().nonzero()[:, 0]
    return counted, *(x.flatten()[counted] for x in (labels, weights, response_weights))


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the negative log likelihoods of labels, without holding their logits.

    Args:
        hidden: float (M, C); hidden states of the positions whose prediction counts.
        head: float (V, C); logits are ``hidden @ head.T``.
        labels: int64 (M,).
        weights: float32 (M,).

    Returns:
        Σ w · nll in nats, a float32 scalar with gradients to ``hidden`` and ``head``; and each nll, float32 (M,),
        without gradients.
    """
    # Inside a Function gradients are always off, and needs_input_grad does not know of no_grad.
    return _LinearCrossEntropy.apply(hidden, head, labels, weights, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while the logits are at hand (the idea of Liger Kernel)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, wants_grad: bool
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_head = (needed and wants_grad for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:  # the gradients made here are not scaled yet, and fp16 would lose small ones
            dtype = hidden.dtype
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        head_grad = torch.empty_like(head) if of_head else None
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        size = targets_at_once(device, dtype, len(head))
        block = SOFTMAX_ROWS if device == "cpu" else size
        with torch.autocast(device, enabled=False):
            matrix = head
            if head.itemsize > dtype.itemsize:
                if head_grad is not None and len(labels) <= size:
                    matrix = first_half(head_grad).copy_(head)  # of no more use once the gradient is written
                else:
                    matrix = head.to(dtype)
            for start in range(0, len(labels), size):
                inputs = hidden[start : start + size].to(dtype)
                logits = _times_head(inputs, matrix)  # (piece, V)
                for i, rows in enumerate(logits.split(block)):
                    place = slice(start + i * block, start + i * block + len(rows))
                    targets, weight = labels[place, None], weights[place, None]
                    wide = rows.float()  # (block, V); of fp32 logits the same memory
                    picked, largest = wide.gather(1, targets), wide.amax(1, keepdim=True)
                    exponentials = wide.sub_(largest).exp_()
                    total = exponentials.sum(1, keepdim=True)
                    losses[place] = (total.log() + largest - picked)[:, 0]
                    if of_hidden or of_head:
                        # d(w · nll) / d(logits) = w · (softmax − one-hot), in the place of the logits
                        rows.copy_(exponentials.mul_(weight / total).scatter_add_(1, targets, -weight))
                if hidden_grad is not None:
                    hidden_grad[start : start + size] = _times_head(logits, matrix, transposed=True)
                if head_grad is not None:
                    _put_gradient(head_grad, logits, inputs, adds=start > 0)
        if head_grad is not None and not len(labels):
            head_grad.zero_()
        ctx.grads, ctx.head = (hidden_grad, head_grad), head
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = (g if g is None else g.mul_(grad) for g in ctx.grads)
        ctx.grads = None
        if of_head is not None and _adds_in_place(ctx.head):
            ctx.head.grad = of_head if ctx.head.grad is None else ctx.head.grad.add_(of_head)
            of_head = None
        return of_hidden, of_head, None, None, None


def _put_gradient(total: Tensor, grad: Tensor, inputs: Tensor, adds: bool) -> None:
    """Put ``grad.T @ inputs`` (V, C) into ``total``, or add it; of another dtype than ``total``, a part at a time."""
    if total.dtype == grad.dtype and adds:
        total.addmm_(grad.T, inputs)
    elif total.dtype == grad.dtype:
        torch.mm(grad.T, inputs, out=total)
    else:
        for part, columns in zip(total.split(GRADIENT_PART), grad.split(GRADIENT_PART, dim=1), strict=True):
            made = weight_gradient(columns.contiguous(), inputs)  # oneDNN would copy columns of a wider matrix slowly
            part.add_(made) if adds else part.copy_(made)


def _times_head(x: Tensor, head: Tensor, transposed: bool = False) -> Tensor:
    """``x @ head.T``, or ``x @ head``; a head to be widened is so a part at a time, never as a whole."""
    wide = product_dtype(x)
    if head.dtype == wide:
        return product(x, head.T if transposed else head)
    starts = range(0, len(head), HEAD_PART)
    if transposed:
        parts = (product(x[:, i : i + HEAD_PART].to(wide), head[i : i + HEAD_PART].to(wide).T) for i in starts)
        return sum(parts, start=x.new_zeros(len(x), head.shape[1], dtype=wide)).to(x.dtype)
    out = x.new_empty(len(x), len(head))
    for i in starts:
        out[:, i : i + HEAD_PART] = product(x.to(wide), head[i : i + HEAD_PART].to(wide))
    return out


def _adds_in_place(weight: Tensor) -> bool:
    """Whether the head and the embedding add to ``weight.grad`` themselves: for DDP, autograd must see the gradient."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return weight.is_leaf and weight.requires_grad and not distributed


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ctx.ids.flatten(), grad.flatten(0, -2).to(weight.dtype))
        return None, None


class InPlaceEmbedding(nn.Embedding):
    """`torch.nn.Embedding` that adds its gradient to what is in ``grad``: if tied, to what the head has left there.

    Autograd would make a second matrix of the vocabulary's size and add the two: 3% of the peak memory of GPT-2 355M.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) → (..., embedding_dim)."""
        if torch.is_grad_enabled() and _adds_in_place(self.weight):
            return _Lookup.apply(ids, self.weight)
        return super().forward(ids)
