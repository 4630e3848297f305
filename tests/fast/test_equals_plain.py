"""What `instruct_lm.fast` promises: the plain core's numbers to rounding, through training and answering."""

from functools import cache

import lightning.pytorch as pl
import pytest
import torch

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.fast import accelerate
from instruct_lm.fast.linear import FastLinear
from instruct_lm.model.generation import generate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings
from tests.model.conftest import VARIANTS

LAYOUTS = ("packed", "padded")
CASES = [(name, weight, layout) for name in ("gpt2", "llama") for weight in (1.0, 0.0) for layout in LAYOUTS]
CASES += [(name, 0.5, "packed") for name in ("llama3", "qwen2-untied", "qwen3")]
TOKENIZER = load_tokenizer("bytes")
STEPS = 20


class Recorder(pl.Callback):
    """Loss and gradients of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
        self.grads.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@cache  # the plain run is the same for packed and for padded batches
def train(
    architecture: str, rank: int, base_dtype: torch.dtype, weight: float, layout: str | None
) -> tuple[Recorder, list[list[int]]]:
    """Twenty steps, then greedy answers of the trained model; fast with a `layout`, plain without."""
    config = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=4, n_embd=32, **VARIANTS[architecture])
    model = GPT(config).init_weights(1)
    if rank:
        torch.manual_seed(1)
        add_lora(model, rank, 2 * rank, base_dtype=base_dtype)
    tuner = InstructionTuner(model, optimizer=OptimizerSettings(lr=1e-3))
    if layout:
        accelerate(tuner, packed=layout == "packed")
    data = InstructionDataModule(
        "sample", TOKENIZER, batch_size=4, limit=120, block_size=256, prompt_loss_weight=weight
    )
    recorder = Recorder()
    pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[recorder], max_steps=STEPS, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(tuner, data)  # fmt: skip
    prompts = [TOKENIZER.encode(f"Below is an instruction. {text}") for text in ("Name a colour.", "Count.", "x" * 90)]
    return recorder, generate(model, prompts, max_new_tokens=12)


@pytest.mark.parametrize(("architecture", "weight", "layout"), CASES)
@pytest.mark.parametrize(
    ("rank", "base_dtype"),
    [(0, torch.float32), (4, torch.float32), (4, torch.bfloat16)],
    ids=["full", "lora", "lora-bf16"],
)
def test_twenty_steps_and_answers(
    architecture: str, weight: float, rank: int, base_dtype: torch.dtype, layout: str
) -> None:
    plain, plain_answers = train(architecture, rank, base_dtype, weight, None)
    fast, fast_answers = train(architecture, rank, base_dtype, weight, layout)
    assert len(plain.losses) == STEPS
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    for step, (ours, theirs) in enumerate(zip(fast.grads, plain.grads, strict=True)):
        assert ours.keys() == theirs.keys()
        norm = torch.nn.utils.get_total_norm(theirs.values())
        for name, grad in ours.items():
            assert (grad - theirs[name]).norm() <= 1e-4 * norm, f"step {step}: {name}"
    assert fast_answers == plain_answers


def test_names_and_checkpoints_stay() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    before = model.state_dict()
    accelerate(model)
    assert isinstance(model.h[0].mlp.fc, FastLinear)
    assert model.state_dict().keys() == before.keys()
    GPT(model.config).load_state_dict(model.state_dict())
