"""Fine-tune a model on instructions: `python train.py --help`."""

from __future__ import annotations

import logging
import time

from instruct_lm.commands.hydra_app import hydra_command
from instruct_lm.commands.runs import is_complete, limits
from instruct_lm.commands.sweeps import compare_runs, evaluate_run
from instruct_lm.config import TrainConfig
from instruct_lm.io.files import shown
from instruct_lm.io.run_files import LAST, SUMMARY

log = logging.getLogger(__name__)


def main(config: TrainConfig) -> None:
    """Train what is left to train and, if asked for, evaluate the run."""
    output_dir = config.folder
    if is_complete(config):
        log.info("%s is complete; with a higher trainer.max_epochs or max_steps it would go on", shown(output_dir))
    else:
        train(config)
    if not config.trainer.keep_last:
        (output_dir / LAST).unlink(missing_ok=True)
    if config.evaluate:
        evaluate_run(output_dir)
    else:
        log.info("next: python evaluate.py run=%s", shown(output_dir))


def train(config: TrainConfig) -> None:
    """Seed, build, fit, summarise."""
    import lightning.pytorch as pl

    from instruct_lm.commands import build
    from instruct_lm.data.encoding import resolve_prompt_loss_weight
    from instruct_lm.training.callbacks import Throughput, free_memory, peak_memory
    from instruct_lm.training.memory import describe, of_config
    from instruct_lm.training.module import InstructionTuner
    from instruct_lm.training.optimizers import OptimizerSettings
    from instruct_lm.training.trainer import build_trainer, fit, planned_steps, record, write_summary

    started, output_dir, values = time.perf_counter(), config.folder, config.model_dump()
    (output_dir / SUMMARY).unlink(missing_ok=True)  # of a run that now goes on
    accelerator = build.choose_accelerator(config.device)
    pl.seed_everything(config.seed, verbose=False)

    fetcher = build.build_fetcher(config)
    tokenizer = build.build_tokenizer(config.model, fetcher)
    data = build.build_datamodule(
        config,
        tokenizer,
        fetcher,
        prompt_loss_weight=resolve_prompt_loss_weight(config.mask_instructions, config.prompt_loss_weight),
        mask_header=config.mask_header,
        accumulate=config.trainer.accumulate,
    )
    data.setup()
    prefix = len(tokenizer.encode_special(data.style.opening))
    needed = of_config(values, build.gpt_config(config.model), data.train.encoded.lengths, prefix)
    fits, message = describe(needed, free_memory(accelerator))
    log.log(logging.INFO if fits else logging.WARNING, message)
    model = build.build_model(config, fetcher)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    responder = build.build_responder(config, model, tokenizer)

    throughput = Throughput()
    trainer = build_trainer(values, accelerator, data.splits.validation, responder, throughput)
    total_steps = planned_steps(values["trainer"], data.steps_per_epoch(trainer.world_size))
    module = InstructionTuner(model, OptimizerSettings(**values["optimizer"]), total_steps, values)
    log.info("device: %s; output: %s", accelerator, shown(output_dir))
    before, after = fit(trainer, module, data, output_dir, resume=config.resume is not None)

    summary = {
        "model": config.model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "entries": {name: len(part) for name, part in data.splits._asdict().items()},
        "prompt_loss_weight": data.prompt_loss_weight,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "train_seconds": round(throughput.seconds, 1),
        "tokens_per_second": round(throughput.tokens_per_second, 1),
        "peak_memory_gb": round(peak_memory(module.device) / 1e9, 2),
        "before": before,
        "after": after,
        "limits": limits(config),
    }
    record(trainer, values, after)
    write_summary(summary, output_dir)


if __name__ == "__main__":
    with hydra_command("train", main, compare_runs) as run:
        run()
