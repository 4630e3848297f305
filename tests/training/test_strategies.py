"""Two processes give what one gives, by DDP and by FSDP2, and each goes on where the other number stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run_commands import ROOT

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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "way"), [(2, way) for way in TWO] + [(1, way) for way in BACK])
def test_weights_optimizer_and_losses_are_those_of_one_process(trained: Path, number: int, way: str) -> None:
    folder, one = trained / str(number) / way.replace("/", "-"), trained / "1" / base_of(way)
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
        steps = [step for step in expected if "resume" not in way or int(step) > 2]
        assert [step for step in mine[name] if step in steps] == steps
        assert [mine[name][step] for step in steps] == pytest.approx([expected[step] for step in steps], rel=1e-5)
