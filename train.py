"""Fine-tune a model on instructions: `python train.py --help`."""

import logging
import sys
import time
from contextlib import redirect_stdout
from typing import Any

from instruct_lm.commands import launch
from instruct_lm.commands.endings import explained
from instruct_lm.commands.fetch import fetch_sources
from instruct_lm.commands.hydra_app import hydra_command
from instruct_lm.commands.origins import record_origin
from instruct_lm.commands.pasting import command
from instruct_lm.commands.runs import clear_dead_start, has_kept, is_complete, limits, run_id, save_config
from instruct_lm.commands.sweeps import compare_runs, evaluate_run
from instruct_lm.config import TrainConfig
from instruct_lm.io import processes
from instruct_lm.io.files import shown
from instruct_lm.io.records import write_record
from instruct_lm.io.run_files import LAST, PREVIOUS, SUMMARY

log = logging.getLogger(__name__)


def main(config: TrainConfig) -> int:
    """Build, train and summarise; evaluate the run if asked for."""
    launch.be_quiet()
    if is_complete(config) and has_kept(config):
        log.info("%s is complete; raise trainer.max_epochs or max_steps to continue it", shown(config.folder))
        finish(config)
        return 0
    launch.check(config)
    fetch_sources(config)
    with explained(config):
        status = train(config)
    if status == 0 and not processes.is_launched():  # else the process that started this one goes on
        finish(config)
    return status


def train(config: TrainConfig) -> int:
    """Train from the start or from the last checkpoint, and write the summary; the exit status so far."""
    # Imported here, so that --help, mistakes on the command line and missing files need no torch.
    import torch
    from lightning.pytorch import seed_everything

    from instruct_lm.commands import build, precision
    from instruct_lm.training.callbacks import SampleResponses, Throughput
    from instruct_lm.training.checkpoints import sound_checkpoint
    from instruct_lm.training.divergence import Divergence
    from instruct_lm.training.memory import begin_peak, describe, free_memory, peak_memory
    from instruct_lm.training.tensorboard import record_hparams
    from instruct_lm.training.trainer import check_limits, epochs_done, make_trainer, why_ended

    started = time.perf_counter()
    accelerator = build.choose_accelerator(config.device)
    composed, config = config, precision.for_training(config, accelerator)
    if (number := launch.processes_to_start(config.device, accelerator)) > 1:
        launch.check_together(config, number)
        return launch.run_processes(number, config.folder, config.device.precision)
    launch.watch_parent()
    seed_everything(config.seed, verbose=False)

    fetcher = build.build_fetcher(config)
    config = build.resolve(config, fetcher)
    if config != composed and processes.is_first():
        save_config(config)  # so that the run explains itself, also without its base and on another machine
    tokenizer = build.build_tokenizer(config.model, fetcher)
    data = build.build_datamodule(config, tokenizer, fetcher)
    data.prepare_data()
    record_origin(config, fetcher)
    data.setup("fit")
    device = torch.device(launch.own_device(config.device, accelerator))
    own_peak, free = begin_peak(device), free_memory(device)
    fits, message = describe(build.estimate_memory(config, data), free)
    log.log(logging.INFO if fits else logging.WARNING, message)
    tuner = build.build_tuner(config, build.build_model(config, fetcher), tokenizer)
    run = run_id(config.folder)
    checkpoint = sound_checkpoint(config.folder, run) if config.resume else None
    if checkpoint is not None:
        check_limits(config, checkpoint)
    elif processes.is_first():
        clear_dead_start(config.folder)
    if processes.is_first():
        (config.folder / SUMMARY).unlink(missing_ok=True)  # of a run that now goes on
    divergence, throughput = Divergence(), Throughput(started, own_peak)
    callbacks = [divergence, throughput, SampleResponses(data.splits.validation[:4])]
    trainer = make_trainer(config, accelerator, callbacks, run, checkpoint.step if checkpoint else 0)
    with redirect_stdout(sys.stderr):  # the progress bar's; stdout is for results
        if checkpoint is None:
            divergence.validate_before(trainer, tuner, data)
        trainer.fit(tuner, data, ckpt_path=checkpoint and checkpoint.path, weights_only=True)
        if divergence.after_step < trainer.global_step:  # the run now ends earlier than its checkpoint was to
            trainer.validate(tuner, data, verbose=False)

    summary = {
        "model": config.model.name,
        "parameters": sum(p.numel() for p in tuner.model.parameters()),
        "trained_parameters": sum(p.numel() for p in tuner.model.parameters() if p.requires_grad),
        "entries": {name: len(part) for name, part in data.splits._asdict().items()},
        "prompt_loss_weight": data.prompt_loss_weight,
        "precision": config.device.precision,
        "epochs": epochs_done(trainer),
        "steps": trainer.global_step,
        "ended": why_ended(trainer),
        **throughput.summary(),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 2) if own_peak else None,
        "before": divergence.before,
        "after": divergence.after,
        "limits": limits(config),
    }
    record_hparams(trainer, config, summary)
    if trainer.is_global_zero:
        summarise(config, summary)
    return 0


def summarise(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Write `summary.json` and log its main numbers."""
    write_record(summary, config.folder / SUMMARY)
    table = [f"{'':32}{'before':>10}{'after':>10}"]
    for name, before in summary["before"].items():
        words = name.replace("val/", "validation ").replace("_", " ")
        table.append(f"{words:32}{before:10.3f}{summary['after'][name]:10.3f}")
    log.info("\n%s\n", "\n".join(table))
    log.info("ended at step %(steps)d: trainer.%(ended)s is reached", summary)
    cost = (
        "%(steps)d steps, %(seconds).0f s in all, %(train_seconds).0f s of training: %(tokens_per_second).0f tokens/s"
    )
    log.info(cost + (", peak memory %(peak_memory_gb).2f GB" if summary["peak_memory_gb"] is not None else ""), summary)


def finish(config: TrainConfig) -> None:
    """Delete what a complete run does not keep, and evaluate it if asked for."""
    if config.trainer.keep_last is False:
        for name in (LAST, PREVIOUS):
            (config.folder / name).unlink(missing_ok=True)
    if config.evaluate:
        evaluate_run(config.folder)
    else:
        log.info("next: %s", command("evaluate.py", run=config.folder))


if __name__ == "__main__":
    with hydra_command("train", main, compare_runs) as run:
        run()
