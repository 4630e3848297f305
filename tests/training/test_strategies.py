"""Two processes give what one gives, by DDP and by FSDP2, and each goes on where the other number stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instruct_lm.training.strategies import keep_steps, largest
from tests.run_commands import ROOT
from tests.training import several_processes

ONE = ["auto,gpt2", "auto,llama,lora=1,clip=0.1"]
TWO = [
    "ddp,gpt2,batch=1",
    "fsdp2,gpt2",
    "ddp,llama,lora=1,clip=0.1",
    "fsdp2,llama,lora=1,clip=0.1,fast=no",
    "fsdp2,gpt2,resume=1/auto;gpt2",
    "ddp,gpt2,resume=2/fsdp2;gpt2",
]
BACK = ["auto,gpt2,resume=2/fsdp2;gpt2", "auto,gpt2,batch=2,resume=2/ddp;gpt2;batch=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two of them by torchrun, and one again."""
    folder = tmp_path_factory.mktemp("several")
    for number, ways in ((1, ONE), (2, TWO), (1, BACK)):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if number == 2 else []
        command = [sys.executable, *start, "-m", "tests.training.several_processes", str(folder), *ways]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        if ended.returncode:
            raise RuntimeError(ended.stdout + ended.stderr)
    return folder


def tensors(value: Any, place: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: x for key, inner in items for name, x in tensors(inner, f"{place}.{key}").items()}


def base_of(way: str) -> str:
    left = [word for word in way.split(",")[1:] if not word.startswith(("batch=", "resume=", "fast="))]
    return ",".join(["auto", *left])


def assert_same_end(folder: Path, one: Path, resumed: int = 0) -> None:
    """The weights and the optimizer's states at the end, and the losses after the step from which a run went on."""
    ours, theirs = (torch.load(path / "end.ckpt", weights_only=True) for path in (folder, one))
    assert ours["global_step"] == theirs["global_step"] == 6
    for part in ("state_dict", "optimizer_states"):
        mine, reference = tensors(ours[part]), tensors(theirs[part])
        assert mine.keys() == reference.keys()
        for name, expected in reference.items():
            # fp32 sums in another order; the losses are about 5.
            torch.testing.assert_close(mine[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    mine, reference = (json.loads((path / "losses.json").read_text()) for path in (folder, one))
    for name, expected in reference.items():
        steps = [step for step in expected if int(step) > resumed]
        assert [step for step in mine[name] if step in steps] == steps
        assert [mine[name][step] for step in steps] == pytest.approx([expected[step] for step in steps], rel=1e-5)


@pytest.mark.parametrize("stop", [2, 4])  # in the middle of an epoch, and after its last step, which is a single row
def test_a_run_goes_on_with_its_steps_in_other_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(several_processes, "STOP", stop)
    whole, halves = "auto,gpt2", "auto,gpt2,batch=4"  # steps of 8 rows in one micro-batch, and in two
    resumed = [f"{way},resume=1/{other.replace(',', ';')}" for way, other in ((whole, halves), (halves, whole))]
    for way in (whole, halves, *resumed):
        several_processes.train(tmp_path, way)
    for way in resumed:
        assert_same_end(tmp_path / "1" / way.replace("/", "-"), tmp_path / "1" / whole, stop)


@pytest.mark.parametrize(
    ("rows", "then", "world_size", "now", "ready"),
    [
        (8, 1, 2, 1, 5),  # 4 rows in each of two processes
        (16, 1, 1, 2, 10),  # of two processes with 8 rows; one takes them in two micro-batches
        (16, 2, 2, 1, 3),  # back again, after a step that was the last and had one micro-batch
        (20, 3, 2, 2, 4),
        (8, 1, 1, 1, 5),
    ],
)
def test_counts_become_those_of_other_micro_batches(
    rows: int, then: int, world_size: int, now: int, ready: int
) -> None:
    data = SimpleNamespace(batch_size=8, step_size=None)
    trainer: Any = SimpleNamespace(world_size=world_size, accumulate_grad_batches=None, datamodule=data)
    counts = {name: {"ready": 5, "started": 5, "completed": 4} for name in ("total", "current")}
    loops = {"fit_loop": {"epoch_loop.batch_progress": counts}}
    keep_steps(trainer, {"steps": {"rows": rows, "accumulate": then}, "loops": loops})
    assert (data.step_size, trainer.accumulate_grad_batches) == (rows, now)
    assert list(counts.values()) == [{"ready": ready, "started": ready, "completed": ready - 1}] * 2


def test_the_largest_of_all_processes_values_counts() -> None:
    others = {"max": lambda mine: max(mine, 15), "sum": lambda mine: mine + 15}
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda x, reduce_op: torch.tensor(others[reduce_op](int(x))))
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    assert [largest(trainer, mine) for mine in (0, 2, 15, 30)] == [15, 15, 15, 30]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "way"), [(2, way) for way in TWO] + [(1, way) for way in BACK])
def test_weights_optimizer_and_losses_are_those_of_one_process(trained: Path, number: int, way: str) -> None:
    folder, one = trained / str(number) / way.replace("/", "-"), trained / "1" / base_of(way)
    assert_same_end(folder, one, 2 if "resume" in way else 0)
