"""Fine-tune a model on instructions: `python train.py --help`."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from instruct_lm.commands.hydra_app import hydra_command
from instruct_lm.commands.runs import is_complete, limits
from instruct_lm.commands.sweeps import compare_runs, evaluate_run
from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError, RunError
from instruct_lm.io.files import shown, write_json
from instruct_lm.io.run_files import BEFORE, LAST, SUMMARY

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from instruct_lm.data.datamodule import InstructionDataModule
    from instruct_lm.training.module import InstructionTuner

log = logging.getLogger(__name__)

SWEPT = ["model.name", "prompt.style", "mask_instructions", "mask_header", "seed", "data.batch_size", "lora.rank"]
SWEPT += ["optimizer.lr", "optimizer.weight_decay", "trainer.accumulate"]
"""What a sweep may vary, for TensorBoard's HParams."""


def main(config: TrainConfig) -> None:
    """Build, train and summarise; evaluate the run if asked for."""
    if is_complete(config):
        log.info("%s is complete; raise trainer.max_epochs or max_steps to continue it", shown(config.folder))
        return finish(config)

    # Imported here, so that --help and mistakes on the command line need no torch.
    from lightning.pytorch import seed_everything

    from instruct_lm.commands import build
    from instruct_lm.training.callbacks import SampleResponses, Throughput
    from instruct_lm.training.memory import describe, free_memory, peak_memory
    from instruct_lm.training.trainer import make_trainer

    started, last = time.perf_counter(), config.folder / LAST
    if config.resume and not last.is_file():
        raise InputError(f"resume={config.resume}: it saved no {LAST}, so there is nothing to resume. Start it anew.")
    (config.folder / SUMMARY).unlink(missing_ok=True)  # of a run that now goes on
    accelerator = build.choose_accelerator(config.device)
    seed_everything(config.seed, verbose=False)

    fetcher = build.build_fetcher(config)
    tokenizer = build.build_tokenizer(config.model, fetcher)
    data = build.build_datamodule(config, tokenizer, fetcher)
    data.prepare_data()
    data.setup("fit")
    fits, message = describe(build.estimate_memory(config, data), free_memory(accelerator))
    log.log(logging.INFO if fits else logging.WARNING, message)
    tuner = build.build_tuner(config, build.build_model(config, fetcher), tokenizer)
    throughput = Throughput()
    trainer = make_trainer(config, accelerator, [throughput, SampleResponses(data.splits.validation[:4])])
    log.info("device: %s; output: %s", accelerator, shown(config.folder))

    with stop_explained(config, trainer):
        before = validate_before(config, trainer, tuner, data)
        trainer.fit(tuner, data, ckpt_path=last if config.resume else None, weights_only=bool(config.resume) or None)
        after = {name: float(value) for name, value in trainer.callback_metrics.items() if name in before}
        if not after:  # the run was stopped between its last step and its summary
            after = dict(trainer.validate(tuner, data, verbose=False)[0])

    summary = {
        "model": config.model.name,
        "parameters": sum(p.numel() for p in tuner.model.parameters()),
        "trained_parameters": sum(p.numel() for p in tuner.model.parameters() if p.requires_grad),
        "entries": {name: len(part) for name, part in data.splits._asdict().items()},
        "prompt_loss_weight": data.prompt_loss_weight,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        **throughput.summary,
        "peak_memory_gb": round(peak_memory(tuner.device) / 1e9, 2),
        "before": before,
        "after": after,
        "limits": limits(config),
    }
    summarise(config, trainer, summary)
    finish(config)


@contextmanager
def stop_explained(config: TrainConfig, trainer: Trainer) -> Iterator[None]:
    """Turn Lightning's end after Ctrl-C into a message that says how to continue."""
    try:
        yield
    except SystemExit as stopped:
        if not (config.folder / LAST).is_file():
            raise RunError("Stopped before the first checkpoint: there is nothing to resume.") from stopped
        command = f"python train.py resume={shown(config.folder)}"
        raise RunError(f"Stopped after step {trainer.global_step}. Continue with: {command}") from stopped


def validate_before(
    config: TrainConfig, trainer: Trainer, tuner: InstructionTuner, data: InstructionDataModule
) -> dict[str, float]:
    """The losses before the first step; a resumed run has kept them."""
    kept = config.folder / BEFORE
    if config.resume and kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    before = dict(trainer.validate(tuner, data, verbose=False)[0])
    write_json(before, kept)
    log.info(
        "before training: validation loss %.3f, response only %.3f", before["val/loss"], before["val/response_loss"]
    )
    return before


def summarise(config: TrainConfig, trainer: Trainer, summary: dict[str, Any]) -> None:
    """Write the summary for TensorBoard and `summary.json`, and print it."""
    from instruct_lm.training.trainer import losses_table, record_hparams

    swept = {key: operator.attrgetter(key)(config) for key in SWEPT}
    record_hparams(trainer, {**swept, "prompt_loss_weight": summary["prompt_loss_weight"]}, summary["after"])
    write_json(summary, config.folder / SUMMARY)
    cost = (
        "%(steps)d steps, %(seconds).0f s in all, %(train_seconds).0f s of training: %(tokens_per_second).0f tokens/s"
    )
    log.info("\n%s\n", losses_table(summary["before"], summary["after"]))
    log.info(f"{cost}, peak memory %(peak_memory_gb).2f GB", summary)


def finish(config: TrainConfig) -> None:
    """Delete what a complete run does not keep, and evaluate it if asked for."""
    if not config.trainer.keep_last:
        (config.folder / LAST).unlink(missing_ok=True)
    if config.evaluate:
        evaluate_run(config.folder)
    else:
        log.info("next: python evaluate.py run=%s", shown(config.folder))


if __name__ == "__main__":
    with hydra_command("train", main, compare_runs) as run:
        run()
