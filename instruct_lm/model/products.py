"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which on AMD processors takes slower paths than oneDNN: at the sizes of a training
step oneDNN multiplies 1.3 to 1.5 times as fast forward and for the gradients of inputs, and up to 2 times at those of
decoding (measured with torch 2.13 on an AMD EPYC; gradients of weights gain little). Both compute in fp32. On other
processors, and where torch has no such operator, it is `torch.nn.functional.linear`.
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
    if is_faster(x) and weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
