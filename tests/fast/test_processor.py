"""What /proc/cpuinfo says, and the measured rate of products."""

import time
from pathlib import Path

import pytest
import torch

from instruct_lm.fast import linear, processor

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9B14
flags\t\t: fpu vme avx2 avx512f avx512_bf16

processor\t: 1
vendor_id\t: GenuineIntel
flags\t\t: fpu
"""


@pytest.fixture
def genoa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores; the first one counts."""
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    monkeypatch.setattr(processor, "CPUINFO", file)
    processor.cpuinfo.cache_clear()
    yield
    processor.cpuinfo.cache_clear()


def test_the_first_core_is_described(genoa: None) -> None:
    assert processor.name() == "AMD EPYC 9B14"
    assert processor.flags() == {"fpu", "vme", "avx2", "avx512f", "avx512_bf16"}
    assert processor.has_bf16() == torch.backends.mkldnn.is_available()
    assert processor.prefers_onednn() == hasattr(torch.ops.mkldnn, "_linear_pointwise")


def test_other_systems_have_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    processor.cpuinfo.cache_clear()
    try:
        assert processor.flags() == frozenset()
        assert not processor.has_bf16()
        assert processor.name()
    finally:
        processor.cpuinfo.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_the_arithmetic_over_the_median_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    now, asked = [0.0], []

    def product(x: torch.Tensor, weight: torch.Tensor) -> None:
        asked.append((x.shape, weight.shape, x.dtype))
        now[0] += 5.0 if len(asked) == 3 else 0.02  # one of them is disturbed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(linear, "product", product)
    # 256 tokens by 1024 × 1024 weights, a multiplication and an addition each
    assert processor.product_rate(dtype, seconds=6.0) == pytest.approx(2 * 256 * 1024 * 1024 / 0.02)
    assert set(asked) == {((256, 1024), (1024, 1024), dtype)}
