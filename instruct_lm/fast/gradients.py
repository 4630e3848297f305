"""Weight gradients written where they stay: by the matrix product itself, into the parameter's own ``grad``.

Autograd makes a new matrix for every weight, adds it to ``grad`` and throws it away, and the step begins by filling
``grad`` with zeros. Here the first product of a step overwrites (``beta=0``) and later ones add. The sums are the same,
but autograd sees no gradient of these weights: hooks on them never run, so use it in a single process and without an
optimizer step in the backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.fast.products import is_faster, linear

_STALE = "_kept_grad_is_stale"  # attribute of a parameter: what its gradient holds is of the step before


def keep_gradients(model: nn.Module) -> None:
    """Give the trained weights of linear layers and embeddings a ``grad`` that their backward pass writes into."""
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)) and module.weight.requires_grad:
            module.weight.grad = torch.empty_like(module.weight)
            setattr(module.weight, _STALE, True)


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Begin a step: kept gradients will be overwritten, others are filled with zeros in place."""
    for parameter in parameters:
        if is_kept(parameter):
            setattr(parameter, _STALE, True)
        elif parameter.grad is not None:
            parameter.grad.zero_()


def is_kept(parameter: Tensor) -> bool:
    """Whether `keep_gradients` was called for it."""
    return hasattr(parameter, _STALE)


def add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """``parameter.grad`` = ``left @ right``, or += if something of this step is there already."""
    grad = parameter.grad
    torch.addmm(grad, left, right, beta=0 if getattr(parameter, _STALE) else 1, out=grad)  # type: ignore[arg-type]
    setattr(parameter, _STALE, False)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # the parameter itself: activation checkpointing would hand back a copy without its `grad`
        ctx.save_for_backward(x)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        flat, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        if kept := is_kept(weight):
            add_product(weight, flat.T, inputs)
        return (
            linear(grad, weight.T) if ctx.needs_input_grad[0] else None,
            flat.T @ inputs if ctx.needs_input_grad[1] and not kept else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _Wide(threading.local):
    """Memory for one widened weight, used for all: between activations that stay, freed copies would leave holes."""

    buffer = torch.empty(0)

    def of(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight in the dtype of ``like``, until the next call."""
        if weight.dtype == like.dtype:
            return weight
        held = self.buffer
        if held.numel() < weight.numel() or held.dtype != like.dtype or held.device != weight.device:
            with torch.inference_mode(False):  # generation may be the first to ask, and training goes on with it
                self.buffer = torch.empty(weight.numel(), dtype=like.dtype, device=weight.device)
        return self.buffer[: weight.numel()].view(weight.shape).copy_(weight)


_wide = _Wide()


class _FrozenLinear(torch.autograd.Function):
    """A frozen weight, if in a small dtype widened for each product and never held wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, _wide.of(weight, x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return linear(grad, _wide.of(ctx.weight, grad).T), None, None


class Linear(nn.Linear):
    """`torch.nn.Linear` whose weight gradient can be kept in place; its parameters start uninitialised."""

    def reset_parameters(self) -> None:
        """Leave the start to whoever loads or initialises the model."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if not self.weight.requires_grad and (self.weight.dtype != x.dtype or is_faster(x)):
            return _FrozenLinear.apply(x, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        if is_kept(self.weight) or is_faster(x):
            return _Linear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ids, weight = ctx.saved_tensors
        if getattr(weight, _STALE):
            weight.grad.zero_()
            setattr(weight, _STALE, False)
        weight.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        return None, None


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` whose gradient can be kept in place; its weight starts uninitialised."""

    def reset_parameters(self) -> None:
        """Leave the start to whoever loads or initialises the model."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) → (..., embedding_dim)."""
        if is_kept(self.weight) and torch.is_grad_enabled():
            return _Embedding.apply(ids, self.weight)
        return F.embedding(ids, self.weight)
