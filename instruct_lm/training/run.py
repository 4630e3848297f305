"""A run around its steps: the trainer with its callbacks, validation before and after, the summary."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError, RunError
from instruct_lm.evaluation.responses import Responder
from instruct_lm.files import write_json
from instruct_lm.training.callbacks import AtomicCheckpointIO, SampleResponses, SaveLast, StopAfter, Throughput
from instruct_lm.training.module import InstructionTuner

log = logging.getLogger(__name__)

N_SAMPLES = 4  # validation instructions answered at each validation
SAMPLE_TOKENS = 48
BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
Metrics = dict[str, float]


def default_precision(accelerator: str) -> str:
    """The precision of a device: bf16 where a GPU has it, else 16-bit there, and fp32 elsewhere."""
    if accelerator != "gpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def build_trainer(
    config: Mapping[str, Any], accelerator: str, validation: Sequence[Example], responder: Responder, throughput: Throughput
) -> pl.Trainer:
    """Lightning's trainer for a training configuration.

    Args:
        config: the composed configuration as plain containers.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        validation: the first few of them are answered at each validation.
        responder: the model being trained, with its prompt style.
        throughput: the callback that counts tokens and seconds.
    """
    settings, device = config["trainer"], config["device"]
    output_dir = Path(config["output_dir"])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory.*exists and is not empty.*")

    sampler = Responder(responder.model, responder.tokenizer, responder.style, SAMPLE_TOKENS)
    callbacks: list[Callback] = [
        throughput,
        SampleResponses(validation[:N_SAMPLES], lambda examples: [r.text for r in sampler.answer(examples)]),
        SaveLast(output_dir / LAST),
        ModelCheckpoint(
            output_dir / "checkpoints",
            filename="best",
            monitor="val/response_loss",
            mode="min",
            save_weights_only=True,
            enable_version_counter=False,
        ),
    ]
    if settings["max_steps"] is not None:
        callbacks.append(StopAfter(settings["max_steps"]))
    if settings["progress"]:
        callbacks.append(TQDMProgressBar(leave=True))
    interval = settings["val_interval"]
    return pl.Trainer(
        accelerator=accelerator,
        devices=device["devices"],
        num_nodes=device["num_nodes"],
        strategy=device["strategy"],
        precision=device["precision"] or default_precision(accelerator),
        max_epochs=-1 if settings["max_epochs"] is None else settings["max_epochs"],
        accumulate_grad_batches=settings["accumulate"],
        gradient_clip_val=settings["clip_norm"],
        val_check_interval=min(interval, 1.0),
        check_val_every_n_epoch=max(1, round(interval)),
        log_every_n_steps=settings["log_interval"],
        logger=TensorBoardLogger(output_dir, name=None, version="tensorboard", default_hp_metric=False),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=settings["progress"],
    )


def planned_steps(settings: Mapping[str, Any], steps_per_epoch: int) -> int:
    """Optimizer steps until the first of the trainer's two limits."""
    limits = [settings["max_steps"], settings["max_epochs"] and settings["max_epochs"] * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


def fit(
    trainer: pl.Trainer, module: InstructionTuner, data: InstructionDataModule, output_dir: Path, resume: bool
) -> tuple[Metrics, Metrics]:
    """Validate, train with validations, and return the validation metrics before the first step and after the last.

    Raises:
        InputError: nothing to resume.
        RunError: stopped by a signal; the message says how to go on.
    """
    last = output_dir / LAST
    if resume and not last.is_file():
        raise InputError(f"resume={output_dir}: {last} does not exist, so the run saved nothing yet. Start it anew.")
    before_file = output_dir / "before.json"
    if resume and before_file.is_file():
        before = json.loads(before_file.read_text(encoding="utf-8"))
    else:
        trainer.logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(module.config)}\n```")  # type: ignore[union-attr, attr-defined]
        before = dict(trainer.validate(module, data, verbose=False)[0])
        write_json(before, before_file)
        log.info("before training: %s", describe(before))
    try:
        trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=True if resume else None)
    except SystemExit as stopped:  # Lightning's way to end after Ctrl-C
        if not last.is_file():
            raise RunError("Stopped before the first checkpoint.") from stopped
        raise RunError(f"Stopped after step {trainer.global_step}. Go on with: python train.py resume={output_dir}") from stopped
    after = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    log.info("after training:  %s", describe(after))
    return before, after


def describe(metrics: Mapping[str, float]) -> str:
    """The two losses that matter, in words."""
    return f"validation loss {metrics['val/loss']:.3f}, of the responses alone {metrics['val/response_loss']:.3f}"


def record(trainer: pl.Trainer, config: Mapping[str, Any], metrics: Metrics) -> None:
    """Write the settings that a sweep varies, with the final metrics, for TensorBoard's HParams."""
    chosen = {
        "model": config["model"]["name"],
        "mask_instructions": config["mask_instructions"],
        "prompt_loss_weight": str(config["prompt_loss_weight"]),
        "mask_header": config["mask_header"],
        "prompt": config["prompt"]["style"],
        "seed": config["seed"],
        "lr": config["optimizer"]["lr"],
        "weight_decay": config["optimizer"]["weight_decay"],
        "batch_size": config["data"]["batch_size"],
        "accumulate": config["trainer"]["accumulate"],
        "lora_rank": config["lora"]["rank"],
    }
    trainer.logger.log_hyperparams(chosen, {f"final/{name}": value for name, value in metrics.items()})  # type: ignore[union-attr, call-arg]
    trainer.logger.save()  # type: ignore[union-attr]


def write_summary(summary: Mapping[str, Any], output_dir: Path) -> None:
    """Write `summary.json` and print it as a few lines."""
    write_json(summary, output_dir / "summary.json")
    log.info(
        "%d steps, %d epochs, %.0f s in all, %.0f s of training, %.0f tokens/s, peak memory %.2f GB",
        *(summary[key] for key in ("steps", "epochs", "seconds", "train_seconds", "tokens_per_second", "peak_memory_gb")),
    )

