"""Trains one model in each of several ways, on as many processes as start this: `python -m … FOLDER WAY…`.

A way is ``strategy,architecture,settings…``; ``FOLDER/<processes>/<way>/`` gets ``mid.ckpt``, ``end.ckpt`` and
``losses.json``. ``resume=<folder of another number or way>`` goes on from the ``mid.ckpt`` there.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.fast import accelerate
from instruct_lm.io import processes
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.training.callbacks import ValidateEvery
from instruct_lm.training.checkpoints import AtomicCheckpointIO
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings
from instruct_lm.training.strategies import make_strategy

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "n_kv_head": 1, "norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False, "tied": False,
    },
}  # fmt: skip
ENTRIES = [
    {"instruction": f"Say {'very ' * (i % 5)}{i}.", "input": "so" * (i % 3), "output": f"{i}!"} for i in range(30)
]
STEP_SIZE, STOP, STEPS = 8, 2, 6  # 25 rows: 4 steps an epoch, the last one of a single row


class Recorder(pl.Callback):
    """Notes the losses, and keeps a checkpoint in the middle of the first epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, dict[str, dict[int, float]]()

    def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: object, batch: object, i: int) -> None:
        if (i + 1) % trainer.accumulate_grad_batches == 0 or i + 1 == trainer.num_training_batches:
            self._note(trainer, "train/loss", "train/grad_norm", "train/lr")
            if trainer.global_step == STOP:
                trainer.save_checkpoint(self.folder / "mid.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, module: object) -> None:
        self._note(trainer, "val/loss", "val/response_loss")

    def _note(self, trainer: pl.Trainer, *names: str) -> None:
        for name in names:
            self.losses.setdefault(name, {})[trainer.global_step] = float(trainer.callback_metrics[name])


def train(root: Path, way: str) -> None:
    strategy, architecture, *settings = way.split(",")
    options = dict(setting.split("=", 1) for setting in settings)
    world = processes.world_size()
    folder = root / str(world) / way.replace("/", "-")
    config = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=16, **ARCHITECTURES[architecture])
    model = GPT(config).init_weights(1)
    if "lora" in options:
        torch.manual_seed(5)
        add_lora(model, rank=2, alpha=4)
    name = options.get("optimizer", "adamw")
    optimizer = OptimizerSettings(name, lr=1e-2, eps=1e-4, warmup_steps=2, schedule="cosine")
    tuner = InstructionTuner(model, optimizer=optimizer)
    if options.get("fast", "packed") != "no":
        accelerate(tuner, packed=options.get("fast", "packed") == "packed")
    batch_size = int(options.get("batch", STEP_SIZE // world if world < 5 else 1))
    data = InstructionDataModule(ENTRIES, load_tokenizer("bytes"), block_size=256, batch_size=batch_size, seed=5)
    recorder = Recorder(folder)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=make_strategy(strategy, world), max_steps=STEPS, max_epochs=-1,
        accumulate_grad_batches=STEP_SIZE // (batch_size * world), logger=False, plugins=[AtomicCheckpointIO()],
        callbacks=[ValidateEvery(0.5), recorder], gradient_clip_val=float(options["clip"]) if "clip" in options else None,
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    resume = root / options["resume"].replace(";", ",") / "mid.ckpt" if "resume" in options else None
    trainer.fit(tuner, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    if trainer.is_global_zero:
        (folder / "losses.json").write_text(json.dumps(recorder.losses))
    print(way, trainer.global_step, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for way in sys.argv[2:]:
        train(Path(sys.argv[1]), way)
