"""A run around its steps: the trainer with its callbacks, validation before and after, the summary."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.encoding import resolve_prompt_loss_weight
from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError, RunError
from instruct_lm.io.files import shown, write_json
from instruct_lm.io.run_files import BEST, LAST, SUMMARY
from instruct_lm.respond import Responder
from instruct_lm.training.callbacks import (
    AtomicCheckpointIO,
    ProgressBar,
    SampleResponses,
    SaveBest,
    SaveLast,
    StopIfDiverged,
    Throughput,
    ValidateEvery,
)
from instruct_lm.training.module import InstructionTuner

log = logging.getLogger(__name__)

N_SAMPLES = 4  # validation instructions answered at each validation
SAMPLE_TOKENS = 32
LOSSES = ("val/loss", "val/response_loss")
TEST_METRICS = ("test/score", "test/exact_match", "test/chrf")
"""What HParams compares a sweep by, besides the final losses."""

Metrics = dict[str, float]


def default_precision(accelerator: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """The precision of a device: bf16 where a GPU has it, else 16-bit there, and fp32 elsewhere."""
    if accelerator != "gpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def build_trainer(
    config: Mapping[str, Any],
    accelerator: str,
    validation: Sequence[Example],
    responder: Responder,
    throughput: Throughput,
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
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device`.*")  # in the module, as meant
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory.*exists and is not empty.*")

    sampler = Responder(responder.model, responder.tokenizer, responder.style, SAMPLE_TOKENS)
    callbacks: list[Callback] = [
        throughput,
        StopIfDiverged(),
        ValidateEvery(settings["val_interval"]),
        SampleResponses(validation[:N_SAMPLES], lambda examples: [r.text for r in sampler.answer(examples)]),
        SaveLast(output_dir / LAST),
        SaveBest(output_dir / BEST),
    ]
    if settings["progress"]:
        callbacks.append(ProgressBar(throughput))
    return pl.Trainer(
        accelerator=accelerator,
        devices=device["devices"],
        num_nodes=device["num_nodes"],
        strategy=device["strategy"],
        precision=device["precision"] or default_precision(accelerator),
        max_epochs=-1 if settings["max_epochs"] is None else settings["max_epochs"],
        max_steps=-1 if settings["max_steps"] is None else settings["max_steps"],
        accumulate_grad_batches=settings["accumulate"],
        gradient_clip_val=settings["clip_norm"],
        log_every_n_steps=settings["log_interval"],
        logger=TensorBoardLogger(output_dir, name=None, version="tensorboard", default_hp_metric=False),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # Lightning's own
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
    try:
        if resume and before_file.is_file():
            before = json.loads(before_file.read_text(encoding="utf-8"))
        else:
            trainer.logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(module.config)}\n```")  # type: ignore[union-attr]
            before = dict(trainer.validate(module, data, verbose=False)[0])
            write_json(before, before_file)
            log.info("before training: validation loss %.3f, response only %.3f", *(before[key] for key in LOSSES))
        trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=True if resume else None)
        after = {name: float(value) for name, value in trainer.callback_metrics.items() if name in before}
        if not after:  # stopped behind the last step, before the summary
            after = dict(trainer.validate(module, data, verbose=False)[0])
    except SystemExit as stopped:  # Lightning's way to end after Ctrl-C
        if not last.is_file():
            raise RunError("Stopped before the first checkpoint: nothing to resume.") from stopped
        raise RunError(
            f"Stopped after step {trainer.global_step}. Go on with: python train.py resume={shown(output_dir)}"
        ) from stopped
    return before, after


def before_and_after(before: Metrics, after: Metrics) -> str:
    """The validation metrics as a small table."""
    names = ("validation loss", "  response only", "perplexity", "  response only")
    rows = [f"{'':17}{'before':>10}{'after':>10}"]
    for name, key in zip(names, (*LOSSES, "val/perplexity", "val/response_perplexity"), strict=True):
        rows.append(f"{name:17}{before[key]:10.3f}{after[key]:10.3f}")
    return "\n".join(rows)


def record(trainer: pl.Trainer, config: Mapping[str, Any], metrics: Metrics) -> None:
    """Write the settings that a sweep varies, with the final metrics, for TensorBoard's HParams."""
    if not trainer.is_global_zero:
        return
    chosen = {
        "model": config["model"]["name"],
        "mask_instructions": str(config["mask_instructions"]).lower(),  # a bool would be shown as 0 or 1
        "prompt_loss_weight": resolve_prompt_loss_weight(config["mask_instructions"], config["prompt_loss_weight"]),
        "mask_header": str(config["mask_header"]).lower(),
        "prompt": config["prompt"]["style"],
        "seed": config["seed"],
        "lr": config["optimizer"]["lr"],
        "weight_decay": config["optimizer"]["weight_decay"],
        "batch_size": config["data"]["batch_size"],
        "accumulate": config["trainer"]["accumulate"],
        "lora_rank": config["lora"]["rank"],
    }
    final = {f"final/{name}": value for name, value in metrics.items()}
    writer = trainer.logger.experiment  # type: ignore[union-attr]
    # Those of the evaluation are announced here and come with it.
    for summary in hparams(chosen, dict.fromkeys([*final, *TEST_METRICS], 0.0)):
        writer._get_file_writer().add_summary(summary)  # as Lightning does: a closed writer opens again
    trainer.logger.log_metrics(final, trainer.global_step)  # type: ignore[union-attr]
    trainer.logger.save()  # type: ignore[union-attr]


def write_summary(summary: Mapping[str, Any], output_dir: Path) -> None:
    """Write `summary.json` and print it as a few lines."""
    write_json(summary, output_dir / SUMMARY)
    log.info("\n%s\n", before_and_after(summary["before"], summary["after"]))
    log.info(
        "%d steps, %.0f s in all, %.0f s of training: %s tokens/s, peak memory %.2f GB",
        *(summary[key] for key in ("steps", "seconds", "train_seconds")),
        f"{summary['tokens_per_second']:,.0f}",
        summary["peak_memory_gb"],
    )
