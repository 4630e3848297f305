"""What this computer's processor is, which instructions it has, and how fast it multiplies."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bf16 numbers, as /proc/cpuinfo calls them; one of them is enough."""


@cache
def cpuinfo() -> dict[str, str]:
    """The lines of /proc/cpuinfo on the first core, name → value; empty on other systems than Linux."""
    lines = CPUINFO.read_text(errors="replace").splitlines() if CPUINFO.is_file() else []
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def name() -> str:
    """The processor's name."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """The instruction sets that it has."""
    return frozenset(cpuinfo().get("flags", "").split())


def has_bf16() -> bool:
    """Whether it multiplies bf16 numbers by instructions of its own, and oneDNN is there and may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    may = limit in ("ALL", "DEFAULT") or any(name in limit for name in ("BF16", "FP16", "AMX", "AVX10"))
    return may and torch.backends.mkldnn.is_available() and not flags().isdisjoint(BF16_FLAGS)


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 numbers faster here than MKL, which takes slower paths on AMD processors."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AuthenticAMD" in (cpuinfo().get("vendor_id") or platform.processor())


@torch.no_grad()
def product_rate(dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOPs a second of one core in the products of a layer, 256 tokens by 1024 × 1024 weights.

    The time is the thread's own on the processor, so that a busy machine has the rates of a quiet one.
    """
    from instruct_lm.fast.linear import product

    x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product(x, weight)  # the first one chooses a kernel
        return median_rate(2 * x.numel() * len(weight), lambda: product(x, weight), seconds, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def median_rate(
    amount: float, work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """How much is done in a second of the clock: the median of the rounds of that many real seconds, at least one."""
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        start = clock()
        work()
        rates.append(amount / (clock() - start))
    return statistics.median(rates)
