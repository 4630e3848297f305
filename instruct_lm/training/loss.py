"""Token-weighted cross entropy as a ratio of sums, computed in pieces so that no full logit matrix is ever held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instruct_lm.fast.gradients import add_product, is_kept
from instruct_lm.fast.products import linear

CHUNK_SIZE = 128
"""Targets whose logits are held at once: 26 MB for GPT-2's vocabulary in fp32."""

HEAD_PART = 8192
"""Rows of a head in a smaller dtype that are widened at once."""


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while the logits are at hand (the idea of Liger Kernel)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, weights: Tensor, wants_grad: bool
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_head = (needed and wants_grad for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        ctx.kept = is_kept(head) and of_head
        head_grad = torch.empty_like(head) if of_head and not ctx.kept else None
        losses = hidden.new_empty(len(target_ids), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            matrix = head if head.itemsize < dtype.itemsize else head.to(dtype)
            for start in range(0, len(target_ids), CHUNK_SIZE):
                piece = slice(start, start + CHUNK_SIZE)
                inputs, targets = hidden[piece].to(dtype), target_ids[piece, None]
                logits = _times_head(inputs, matrix).float()  # (chunk, V)
                picked, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
                exponentials = logits.sub_(largest).exp_()
                total = exponentials.sum(1, keepdim=True)
                losses[piece] = (total.log() + largest - picked)[:, 0]
                if not (of_hidden or of_head):
                    continue
                # d(w · nll) / d(logits) = w · (softmax − one-hot)
                weight = weights[piece, None]
                grad = exponentials.mul_(weight / total)
                grad = grad.scatter_add_(1, targets, -weight).to(dtype)
                if hidden_grad is not None:
                    hidden_grad[piece] = _times_head(grad, matrix, transposed=True)
                if ctx.kept:
                    add_product(head, grad.T, inputs)
                elif head_grad is not None:
                    _accumulate(head_grad, grad.T, inputs, first=start == 0)
        ctx.grads = hidden_grad, head_grad
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept and abs(float(grad) - 1) > 1e-4:
            raise RuntimeError(f"the head's gradient is written for a loss of weight 1, not of {float(grad)}")
        return (*(g if g is None else g.mul_(grad) for g in ctx.grads), None, None, None)


def _times_head(x: Tensor, head: Tensor, transposed: bool = False) -> Tensor:
    """``x @ head.T``, or ``x @ head``; a head of a smaller dtype is widened a part at a time, never as a whole."""
    if head.dtype == x.dtype:
        return linear(x, head.T if transposed else head)
    starts = range(0, len(head), HEAD_PART)
    if transposed:
        parts = (linear(x[:, i : i + HEAD_PART], head[i : i + HEAD_PART].to(x.dtype).T) for i in starts)
        return sum(parts, start=x.new_zeros(len(x), head.shape[1]))
    out = x.new_empty(len(x), len(head))
    for i in starts:
        out[:, i : i + HEAD_PART] = linear(x, head[i : i + HEAD_PART].to(x.dtype))
    return out


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def linear_cross_entropy(hidden: Tensor, head: Tensor, target_ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the negative log likelihoods of targets, without holding their logits.

    Args:
        hidden: float (M, C); hidden states of the positions whose prediction counts.
        head: float (V, C); logits are ``hidden @ head.T``.
        target_ids: int64 (M,).
        weights: float32 (M,).

    Returns:
        Σ w · nll in nats, a float32 scalar with gradients to ``hidden`` and ``head``; and the M single nll, without.
        A ``head`` whose gradient is kept (`instruct_lm.fast.gradients`) gets it in this call already, as for a loss
        that is this very sum: scale the weights instead.
    """
    # Inside a Function gradients are always off, and needs_input_grad does not know of no_grad.
    return _LinearCrossEntropy.apply(hidden, head, target_ids, weights, torch.is_grad_enabled())
