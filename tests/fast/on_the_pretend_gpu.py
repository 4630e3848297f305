"""Computes on the pretended GPU and on the CPU, and writes what came out of both as JSON: `python -m … FILE`."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from instruct_lm.data.batching import Batch
from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.fast import accelerate, chunked_loss, packed_loss
from instruct_lm.model.generation import Sampling, generate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.training.loss import batch_loss
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings
from tests.fast.pretend_gpu import DEVICE, Fetching, waits
from tests.model.conftest import VARIANTS

CASES: list[tuple[str, Callable[..., tuple[Tensor, Tensor]], int]] = [
    ("gpt2", batch_loss, 0), ("gpt2", packed_loss, 0), ("gpt2", chunked_loss, 0), ("llama3", batch_loss, 4),
    ("llama3", packed_loss, 0), ("llama3", packed_loss, 4), ("qwen3", packed_loss, 0),
]  # fmt: skip
"""Architecture, loss and rank of the adapters."""

TOKENS = 6
ENTRIES = [
    {"instruction": f"Say {'very ' * (i % 5)}{i}.", "input": "so" * (i % 3), "output": f"{i}!"} for i in range(40)
]


class PretendAccelerator(Accelerator):
    """What Lightning asks of a kind of device."""

    setup_device = teardown = lambda self, *_: None
    get_device_stats = lambda self, device: {}  # noqa: E731
    is_available = staticmethod(lambda: True)
    parse_devices = get_parallel_devices = staticmethod(lambda devices: [DEVICE])
    auto_device_count = staticmethod(lambda: 1)
    name = staticmethod(lambda: "pretend")


def build(architecture: str, fast: bool, rank: int = 0) -> GPT:
    """A small model; with adapters, on a base in bfloat16."""
    config = GPTConfig(vocab_size=257, block_size=160, n_layer=2, n_head=4, n_embd=32, **VARIANTS[architecture])
    model = GPT(config).init_weights(1)
    if rank:
        torch.manual_seed(1)
        add_lora(model, rank, 2 * rank, base_dtype=torch.bfloat16)
    if fast:
        accelerate(model)
    return model


def data() -> InstructionDataModule:
    """Batches of rows that share a prefix."""
    return InstructionDataModule(ENTRIES, load_tokenizer("bytes"), batch_size=4, block_size=160, style="chatml")


def computed(model: GPT, loss: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> dict[str, Any]:
    """Loss, gradients' norms and answers, and what each part of the work waited for."""
    waited = {}

    def note(part: str) -> None:
        waited[part] = dict(Counter(f"{kind} {file}" for kind, file in waits))
        waits.clear()

    waits.clear()
    weighted, response = loss(model, batch)
    note("forward")
    weighted.backward()
    note("backward")
    prompts = [list(range(40, 40 + n)) for n in (9, 5, 7)]
    answers = {}
    for name, sampling in {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, top_k=50, top_p=0.9)}.items():
        answers[name] = generate(model, prompts, max_new_tokens=TOKENS, sampling=sampling)
        note(name)
    grads = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    losses = {"weighted": float(weighted.detach()), "response": float(response)}
    return {"losses": losses, "grads": grads, "answers": answers, "waited": waited}


def trained(trainer: pl.Trainer) -> dict[str, Any]:
    """Losses of a training run of steps of two micro-batches, and what each micro-batch waited for."""
    losses, waited = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            waits.clear()

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            waited.append(Counter(kind for kind, file in waits if file == "training/module.py"))
            losses.append(float(trainer.callback_metrics.get("train/loss", "nan")))

    trainer.callbacks.append(Watch())
    tuner = InstructionTuner(build("gpt2", fast=False), optimizer=OptimizerSettings(lr=1e-3))
    accelerate(tuner)
    trainer.fit(tuner, data())
    final = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"losses": losses, "final": final, "waited": waited}


def main(path: Path) -> None:
    """All of it."""
    cases: dict[str, Any] = {}
    made = data()
    made.setup("fit")
    batch = next(iter(made.train_dataloader()))
    tensors = {name: x for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    with Fetching():
        there = batch._replace(**{name: x.to(DEVICE) for name, x in tensors.items()})
        for architecture, loss, rank in CASES:
            model = build(architecture, loss is not batch_loss, rank)
            here = computed(model, loss, batch)
            model.zero_grad()
            cases[f"{architecture} {loss.__name__} rank={rank}"] = [here, computed(model.to(DEVICE), loss, there)]
        options: dict[str, Any] = {
            "max_epochs": 1, "accumulate_grad_batches": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        strategy = SingleDeviceStrategy(DEVICE, accelerator=PretendAccelerator())
        runs = [trained(pl.Trainer(accelerator="cpu", **options)), trained(pl.Trainer(strategy=strategy, **options))]
    path.write_text(json.dumps({"cases": cases, "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
