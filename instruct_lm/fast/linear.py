"""Linear layers whose products on a CPU are made by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which on AMD processors takes slower paths than oneDNN: at the sizes of a training
step oneDNN multiplies 1.1 (Zen 1) to 1.5 times as fast forward and for the gradients of inputs, and up to 2 times at
those of decoding (measured with torch 2.13 on two AMD EPYC; gradients of weights gain little). But it reads a
transposed weight well only where its rows' length is a power of two, as GPT-2 medium's 1024 and 4096: with SmolLM2's
576 or GPT-2's 768 it reaches 0.7 of MKL's rate. Both compute in fp32. On other processors, and where torch has no such
operator, products are `torch.nn.functional.linear`'s.

Under autocast products are in bf16: of numbers rounded to bf16, summed in fp32, rounded once. A processor that has no
instructions for that makes them in fp32 from the rounded numbers. So it gives the same numbers at about the speed of
fp32, where torch would take 5 to 100 times as long.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.fast import processor
from instruct_lm.fast.rounding import is_on, release, rounded
from instruct_lm.model.lora import FrozenLinear, LoRALinear

ONEDNN = processor.prefers_onednn()
HAS_BF16 = processor.has_bf16()


def is_faster(x: Tensor) -> bool:
    """Whether `product` with this input differs from torch's own: fp32 on such a CPU, outside autocast."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `product` multiplies: that of ``x``, or fp32 where the processor lacks the instructions."""
    emulates = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_BF16
    return torch.float32 if emulates else x.dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (..., in) and (out, in) of one dtype → (..., out) of that dtype.

    It has no gradients: call it inside a Function.
    """
    bias = bias if bias is None else bias.to(x.dtype)
    if product_dtype(x) != x.dtype:
        with torch.autocast("cpu", enabled=False):
            return product(x.float(), _wide.of(weight, torch.float32), bias).to(x.dtype)
    across, along = weight.stride()
    reads_slowly = across == 1 and along & (along - 1) != 0  # transposed, and its rows' length no power of two
    if is_faster(x) and weight.dtype == torch.float32 and not reads_slowly:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _WideMatrix(threading.local):
    """One buffer that holds the matrix in use in a wider dtype.

    Copies that are freed between activations that stay would leave holes in the heap: 0.5 GB for GPT-2 355M.
    """

    buffer = torch.empty(0)

    def of(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix in another dtype, valid until the next call."""
        if matrix.dtype == dtype:
            return matrix
        if matrix.stride(0) == 1 != matrix.stride(1):
            return self.of(matrix.T, dtype).T  # as it lies in memory
        held = self.buffer
        if held.numel() < matrix.numel() or held.dtype != dtype or held.device != matrix.device:
            with torch.inference_mode(False):  # generation may be the first to ask, and training goes on with it
                self.buffer = torch.empty(matrix.numel(), dtype=dtype, device=matrix.device)
        return self.buffer[: matrix.numel()].view(matrix.shape).copy_(matrix)


_wide = _WideMatrix()


class _Product(torch.autograd.Function):
    """`product` in the dtype of ``x``, with gradients in those of x, weight and bias.

    The weight is used as it is; or rounded, where x is smaller; or widened and never kept wide, where it is smaller
    itself, which only a frozen one may be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used = rounded(weight) if x.dtype == torch.bfloat16 else weight
        ctx.save_for_backward(x if weight.requires_grad else None, used)
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return product(x, _wide.of(used, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, used), weight = ctx.saved_tensors, ctx.weight
        flat = grad.flatten(0, -2)  # (tokens, out)
        of_x = product(grad, _wide.of(used, grad.dtype).T) if ctx.needs_input_grad[0] else None
        place, of_weight = release(weight), None
        if ctx.needs_input_grad[1]:
            made = weight_gradient(flat, x.flatten(0, -2))
            of_weight = made.to(weight.dtype) if place is None else place.copy_(made)
        of_bias = flat.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x``: (tokens, out) and (tokens, in) → (out, in)."""
    return product(grad.T, x.T) if x.dtype == torch.bfloat16 else grad.T @ x


class FastLinear(nn.Linear):
    """`torch.nn.Linear` by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if is_on(x.device):
            return _Product.apply(x.bfloat16(), self.weight, self.bias)
        if is_faster(x) and torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


class FastFrozenLinear(FrozenLinear):
    """A frozen layer whose weight, where its dtype is small, is widened into one buffer that all layers share."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if is_on(x.device):
            return _Product.apply(x.bfloat16(), self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)


class FastLoRALinear(LoRALinear):
    """An adapter that adds its product in place: two temporaries fewer among the activations."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        flat = x.flatten(0, -2)
        if is_on(x.device):
            flat = flat.bfloat16()
            low = _Product.apply(F.dropout(flat, self.dropout, self.training), self.lora_a, None)  # (tokens, rank)
            added = _Product.apply(low, self.lora_b * self.scale, None)
            return self.linear(flat).add_(added).unflatten(0, x.shape[:-1])
        low = F.linear(F.dropout(flat, self.dropout, self.training), self.lora_a)  # (tokens, rank)
        scaled = (self.lora_b * self.scale).to(low.dtype)
        return self.linear(flat).addmm_(low, scaled.T).unflatten(0, x.shape[:-1])
