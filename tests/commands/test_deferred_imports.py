"""What a command does not import, and that all of it is there once it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRAINED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
never = {"transformers", "scipy", "matplotlib", "sympy", "torch._inductor", "torch.distributed.fsdp", "pandas"}
never |= {"torchmetrics.functional", "torch._dynamo.eval_frame"}  # of packages whose files have not run
assert "lightning.pytorch" in sys.modules and not never & set(sys.modules), never & set(sys.modules)
"""

DEFERRED = """
import sys
from instruct_lm.commands import deferred_imports
deferred_imports.defer_imports()
import torch, torchmetrics
from lightning.pytorch.utilities.compile import OptimizedModule
layer = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert not isinstance(layer, OptimizedModule)
assert isinstance(sys.modules["torch._dynamo"], deferred_imports.Deferred)
assert isinstance(torchmetrics, deferred_imports.Deferred)
"""

USES = {
    "a compiled model": """
compiled = torch.compile(layer, backend="eager")
assert torch.equal(compiled(torch.ones(1, 2)), layer(torch.ones(1, 2)))
assert isinstance(compiled, OptimizedModule) and not isinstance(layer, OptimizedModule)
optimizer.zero_grad()
assert vars(torch.optim.Optimizer.zero_grad.__wrapped__)["__dynamo_disable"].__module__.startswith("torch._dynamo")
optimizer.step()
""",
    "a submodule of the compiler": """
import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert torch._dynamo.config is torch._dynamo.utils.config
""",
    "a metric": """
metric = torchmetrics.MeanSquaredError()
assert metric(torch.ones(2), torch.zeros(2)) == 1.0
assert isinstance(metric, torchmetrics.Metric) and torchmetrics.__all__
""",
    "a submodule with metrics": """
from torchmetrics.functional.text import perplexity
assert perplexity(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)).item() == torch.tensor(4.0)
assert sys.modules["torchmetrics"].functional.text.perplexity is perplexity
""",
    "a plot of a metric": """
figure, axes = torchmetrics.MeanMetric().plot(torch.tensor(1.0))
assert type(figure) is sys.modules["matplotlib.figure"].Figure
""",
    "a question about every module": """
import inspect
assert inspect.getmodule(layer) is not None
assert isinstance(torchmetrics, deferred_imports.Deferred)
""",
}


def run(code: str, *args: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_training_imports_neither_the_compiler_nor_metrics(tmp_path: Path) -> None:
    args = ("model=gpt2-tiny", "data=sample", "trainer.max_steps=1", f"output_dir={tmp_path / 'run'}")
    run(TRAINED, str(ROOT / "train.py"), *args)


@pytest.mark.parametrize("use", USES)
def test_what_is_used_is_loaded_in_full(use: str) -> None:
    run(DEFERRED + USES[use])


def test_a_package_that_needs_more_than_its_stand_ins_is_loaded() -> None:
    """As another version of TorchMetrics may: this one asks its package for a logger."""
    run("""
from instruct_lm.commands import deferred_imports
del deferred_imports.STAND_INS["torchmetrics"]["_logger"]
deferred_imports.defer_imports()
import lightning.pytorch, torchmetrics
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
assert not isinstance(torchmetrics, deferred_imports.Deferred)
assert issubclass(_ResultMetric, torchmetrics.Metric) and torchmetrics.MeanMetric()(2.0) == 2.0
""")
