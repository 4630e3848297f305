"""Linear layers whose fp32 products on a CPU are made by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which on AMD processors takes slower paths than oneDNN: at the sizes of a training
step oneDNN multiplies 1.1 (Zen 1) to 1.5 times as fast forward and for the gradients of inputs, and up to 2 times at
those of decoding (measured with torch 2.13 on two AMD EPYC; gradients of weights gain little). But it reads a
transposed weight well only where its rows' length is a power of two, as GPT-2 medium's 1024 and 4096: with SmolLM2's
576 or GPT-2's 768 it reaches 0.7 of MKL's rate. Both compute in fp32. On other processors, and where torch has no such
operator, products are `torch.nn.functional.linear`'s.
"""

import platform
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.model.lora import FrozenLinear, LoRALinear


def _prefers_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor()
    return "AuthenticAMD" in vendor


ONEDNN = _prefers_onednn()


def is_faster(x: Tensor) -> bool:
    """Whether `product` with this input differs from torch's own: fp32 on such a CPU, outside autocast."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (..., in) and (out, in) → (..., out). Has no gradients: call it inside a Function."""
    across, along = weight.stride()
    reads_slowly = across == 1 and along & (along - 1) != 0  # transposed, and its rows' length no power of two
    if is_faster(x) and weight.dtype == torch.float32 and not reads_slowly:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _WideWeight(threading.local):
    """One buffer that holds the weight in use in the activations' dtype.

    Copies that are freed between activations that stay would leave holes in the heap: 0.5 GB for GPT-2 355M.
    """

    buffer = torch.empty(0)

    def of(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight in the dtype of ``like``, valid until the next call."""
        if weight.dtype == like.dtype:
            return weight
        held = self.buffer
        if held.numel() < weight.numel() or held.dtype != like.dtype or held.device != weight.device:
            with torch.inference_mode(False):  # generation may be the first to ask, and training goes on with it
                self.buffer = torch.empty(weight.numel(), dtype=like.dtype, device=weight.device)
        return self.buffer[: weight.numel()].view(weight.shape).copy_(weight)


_wide = _WideWeight()


class _Product(torch.autograd.Function):
    """`product` with gradients; the frozen weight may be of a smaller dtype, and is never kept wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, _wide.of(weight, x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (tokens, out)
        return (
            product(grad, _wide.of(weight, grad).T) if ctx.needs_input_grad[0] else None,
            flat.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


class FastLinear(nn.Linear):
    """`torch.nn.Linear` by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if is_faster(x) and torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


class FastFrozenLinear(FrozenLinear):
    """A frozen layer whose weight, where its dtype is small, is widened into one buffer that all layers share."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)


class FastLoRALinear(LoRALinear):
    """An adapter that adds its product in place: two temporaries fewer among the activations."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        flat = x.flatten(0, -2)
        low = F.linear(F.dropout(flat, self.dropout, self.training), self.lora_a)  # (tokens, rank)
        scaled = (self.lora_b * self.scale).to(low.dtype)
        return self.linear(flat).addmm_(low, scaled.T).unflatten(0, x.shape[:-1])
