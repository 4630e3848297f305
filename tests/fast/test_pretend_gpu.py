"""What a GPU would need, on a device that is none (`pretend_gpu.py`): no tensor left behind, and few waits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was computed on the CPU and there, in a process of its own: a device is registered for good."""
    path = tmp_path_factory.mktemp("pretend") / "done.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.fast.on_the_pretend_gpu", str(path)]
    process = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(path.read_text())


def test_losses_gradients_and_answers_are_those_of_the_cpu(done: dict[str, Any]) -> None:
    """A tensor on the CPU among those of the device would have been an error."""
    assert len(done["cases"]) == 7
    for name, (here, there) in done["cases"].items():
        assert there["losses"] == pytest.approx(here["losses"], rel=1e-5), name
        assert there["grads"] == pytest.approx(here["grads"], rel=1e-4, abs=1e-7), name
        assert there["answers"] == here["answers"], name


def test_each_token_waits_for_the_device_once(done: dict[str, Any]) -> None:
    for name, (_, there) in done["cases"].items():
        tokens = max(map(len, there["answers"]["greedy"]))
        for sampling in ("greedy", "sampled"):
            waited = there["waited"][sampling]
            fetched = {what: n for what, n in waited.items() if not what.startswith("send ")}
            assert fetched == {"fetch model/generation.py": tokens}, f"{name} {sampling}"
        # Their places in the cache once for all layers, and nothing else of the cache's.
        assert there["waited"]["greedy"]["send model/cache.py"] == tokens, name


def test_a_packed_step_waits_for_nothing_in_its_backward_pass(done: dict[str, Any]) -> None:
    waited = [there["waited"]["backward"] for name, (_, there) in done["cases"].items() if "packed" in name]
    assert waited == [{}] * 4


def test_a_run_waits_for_its_loss_once_an_optimizer_step(done: dict[str, Any]) -> None:
    here, there = done["runs"]
    assert there["losses"][1:] == pytest.approx(here["losses"][1:], rel=1e-5)
    assert there["final"] == pytest.approx(here["final"], rel=1e-5)
    assert there["waited"] == [{}, {"fetch": 1}] * 4 + [{"fetch": 1}]  # 34 rows: four steps of 2 · 4, one of 2
