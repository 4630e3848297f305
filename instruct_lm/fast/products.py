"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which on AMD processors takes slower paths than oneDNN: at the sizes of a training
step oneDNN multiplies 1.1 (Zen 1) to 1.5 times as fast forward and for the gradients of inputs, and up to 2 times at
those of decoding (measured with torch 2.13 on two AMD EPYC; gradients of weights gain little). But it reads a
transposed weight well only where its rows' length is a power of two, as GPT-2 medium's 1024 and 4096: with SmolLM2's
576 or GPT-2's 768 it reaches 0.7 of MKL's rate. Both compute in fp32. On other processors, and where torch has no such
operator, it is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def _prefers_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor()
    return "AuthenticAMD" in vendor


ONEDNN = _prefers_onednn()


def is_faster(x: Tensor) -> bool:
    """Whether `linear` of this input differs from torch's own: fp32 on a CPU that gains by it, outside autocast."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (..., in) and (out, in) → (..., out). Without gradients: call it inside a Function."""
    if is_faster(x) and weight.dtype == torch.float32 and not _reads_slowly(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _reads_slowly(weight: Tensor) -> bool:
    """Whether it is transposed, and the length of a row in memory no power of two."""
    across, along = weight.stride()
    return across == 1 and along & (along - 1) != 0
