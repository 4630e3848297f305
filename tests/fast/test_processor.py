"""What /proc/cpuinfo says, and the measured rate of products."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from instruct_lm.fast import linear, processor
from tests.conftest import ROOT

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
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
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
    now, passed, asked, threads = [0.0], [0.0], [], torch.get_num_threads()

    def product(x: torch.Tensor, weight: torch.Tensor) -> None:
        asked.append((x.shape, weight.shape, x.dtype))
        now[0] += 5.0 if len(asked) == 3 else 0.02  # one of them is disturbed
        passed[0] += 1.0  # most of which other processes had
        assert torch.get_num_threads() == 1

    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: passed[0])
    monkeypatch.setattr(linear, "product", product)
    # 256 tokens by 1024 × 1024 weights, a multiplication and an addition each
    assert processor.product_rate(dtype, seconds=6.0) == pytest.approx(2 * 256 * 1024 * 1024 / 0.02)
    assert set(asked) == {((256, 1024), (1024, 1024), dtype)}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("limit", "may"),
    [
        ("ALL", True), ("avx512_core_bf16", True), ("AVX512_CORE_AMX", True), ("AVX10_1_512", True), ("DEFAULT", True),
        ("AVX512_CORE", False), ("AVX512_CORE_VNNI", False), ("AVX2", False), ("SSE41", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_onednn_may_be_told_not_to_use_them(
    genoa: None, monkeypatch: pytest.MonkeyPatch, variable: str, limit: str, may: bool
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(variable, limit)
    assert processor.has_bf16() == (may and torch.backends.mkldnn.is_available())


NATIVE = """
import torch
from instruct_lm.fast import linear, processor
assert linear.HAS_BF16
x, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16() for shape in ((99, 300), (70, 300)))
exact = x.double() @ weight.double().T
print(float((linear.product(x, weight) == exact.bfloat16()).float().mean()))
for dtype in (torch.float32, torch.bfloat16):
    assert processor.product_rate(dtype) > 0
"""


def with_instructions(*command: str) -> str:
    """What a command of Python's prints where oneDNN may use them, which `tests/conftest.py` forbids.

    Without them fp32 is the default on every processor, and the tests' references are in fp32.
    """
    if processor.flags().isdisjoint(processor.BF16_FLAGS):
        pytest.skip("this processor has no bf16 instructions")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "ALL"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_instructions_themselves_round_once() -> None:
    assert float(with_instructions("-c", NATIVE)) > 0.98


def test_mixed_precision_is_as_near_to_fp32_with_the_instructions() -> None:
    assert "passed" in with_instructions("-m", "pytest", "--noconftest", "-k", "native", "tests/fast/test_mixed.py")
