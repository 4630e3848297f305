"""Measurements of contenders in turns, each in a process of its own, and of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.tasks import ROOT

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Those of a processor that decide how fast it multiplies."""


def measure(request: dict[str, Any]) -> dict[str, Any] | None:
    """Run a worker; None if the contender cannot run here, with the reason on stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", json.dumps(request)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # this process's, by instruct_lm: peers keep torch's own
    env |= request.get("env", {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {request['contender']}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def busy_programs(n: int) -> Iterator[None]:
    """Run ``n`` programs that use a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def rounds(requests: dict[str, dict[str, Any]], n: int) -> dict[str, list[dict[str, Any]]]:
    """Each request ``n`` times, taking turns."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in requests}
    for turn in range(n):
        for name, request in requests.items():
            start = time.perf_counter()
            if (result := measure(request)) is not None:
                results[name].append(result)
                print(f"  round {turn + 1}/{n} {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {name: found for name, found in results.items() if found}


def entrants(task: str, precision: str, peers: Sequence[str], **request: Any) -> dict[str, dict[str, Any]]:
    """Name → request of each contender in a precision; in bf16 also this project and the book in fp32, named so."""
    common = {"task": task, "precision": precision, **request}
    wanted = {name: {**common, "contender": name} for name in ("ours", *peers) if name != "book"}
    if precision != "32-true":
        wanted["ours in fp32"] = {**wanted["ours"], "precision": "32-true"}
    if "book" in peers:
        name = "book" if precision == "32-true" else "book in fp32"
        wanted[name] = {**common, "precision": "32-true", "contender": "book"}
    return wanted


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from benchmarks import contenders, floor
    from instruct_lm.fast import processor

    # Of small products: where bf16 is emulated, a round of GPT-2 355M's takes a minute.
    rates = {name: floor.gemm_rate("smollm2-135m", 256, dtype, 1.0) for name, dtype in contenders.DTYPES.items()}
    versions: dict[str, str | None] = {}
    for package in ("torch", "lightning", "transformers", "trl", "peft", "llms-from-scratch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": processor.name(),
        "flags": [flag for flag in FLAGS if flag in processor.flags()],
        "GFLOP/s": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
    }
