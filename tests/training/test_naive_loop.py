"""A run of Lightning against a loop written out: losses, gradient norms, rates and weights of each step."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.nn import functional as F

from instruct_lm.data.batching import Batch
from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.fast import accelerate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings

ENTRIES = [{"instruction": f"Say {'very ' * (i % 5)}{i}.", "output": f"{i * i}!"} for i in range(40)]
LR, WARMUP, CLIP, EPOCHS, ACCUMULATE = 1e-2, 3, 0.2, 2, 2


class Noted(Logger):
    """Keeps what is logged, by optimizer step."""

    name, version = "noted", ""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[tuple[int | None, float]]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append((step, float(value)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """None of them."""


class Batches(pl.Callback):
    """Keeps the batches of each epoch."""

    def __init__(self) -> None:
        self.of_epoch: list[list[Batch]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.of_epoch.append([])
        self.of_epoch[-1].append(batch)


def sums(model: GPT, batches: list[Batch]) -> tuple[torch.Tensor, float, torch.Tensor, float]:
    """Σ w · nll and Σ w, then the same of responses alone."""
    weighted, response = torch.zeros(()), torch.zeros(())
    for batch in batches:
        nll = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.labels.flatten(), reduction="none")
        weighted = weighted + (nll * batch.weights.flatten()).sum()
        response = response + (nll * batch.response_weights.flatten()).sum()
    counts = (sum(float(getattr(batch, name).sum()) for batch in batches) for name in ("weights", "response_weights"))
    weight, count = counts
    return weighted, weight, response, count


@pytest.mark.parametrize("fast", [False, True])
def test_a_run_is_the_loop_written_out(tmp_path: Path, fast: bool) -> None:
    model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16)).init_weights(1)
    naive = copy.deepcopy(model)
    settings = OptimizerSettings(lr=LR, warmup_steps=WARMUP, schedule="cosine", weight_decay=0.3, beta1=0.8, beta2=0.95)
    tuner, log, batches = InstructionTuner(model, optimizer=settings), Noted(), Batches()
    if fast:
        accelerate(tuner)
    data = InstructionDataModule(ENTRIES, load_tokenizer("bytes"), block_size=256, batch_size=3, prompt_loss_weight=0.3)
    pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=log, callbacks=[batches], log_every_n_steps=1,
        max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    ).fit(tuner, data)  # fmt: skip

    orders = [[entry for batch in epoch for entry in batch.entries] for epoch in batches.of_epoch]
    assert len(orders) == EPOCHS
    assert sorted(orders[0]) == sorted(orders[1]) == [entry + 1 for entry in range(34)]
    assert orders[0] != orders[1]
    steps = [epoch[i : i + ACCUMULATE] for epoch in batches.of_epoch for i in range(0, len(epoch), ACCUMULATE)]

    matrices = [p for p in naive.parameters() if p.dim() == 2]
    others = [p for p in naive.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8)
    expected: dict[str, list[float]] = {name: [] for name in log.values if name != "epoch"}
    for step, micro_batches in enumerate(steps):
        rate = LR * (step + 1) / WARMUP
        if step >= WARMUP:
            progress = torch.tensor((step - WARMUP) / (len(steps) - WARMUP))
            rate = LR * (1 + torch.cos(torch.pi * progress).item()) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        weighted, weight, _, _ = sums(naive, micro_batches)
        loss = weighted / weight
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(naive.parameters(), CLIP)
        assert norm > CLIP
        optimizer.step()
        expected["train/loss"].append(loss.item())
        expected["train/lr"].append(rate)
        expected["train/grad_norm"].append(norm.item())
        if (step + 1) * EPOCHS % len(steps) == 0:  # each epoch
            weighted, weight, response, count = sums(naive, list(data.val_dataloader()))
            for name, value in (("loss", weighted / weight), ("response_loss", response / count)):
                expected[f"val/{name}"].append(value.item())
                expected[f"val/{name.replace('loss', 'perplexity')}"].append(value.exp().item())
    for name, values in expected.items():
        assert [value for _, value in log.values[name]] == pytest.approx(values, rel=2e-3), name
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=2e-2, atol=2e-4, msg=name)
