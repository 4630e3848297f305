"""Fine-tune a model on instructions: `python train.py --help`."""

import logging
import signal
import sys
import time
from contextlib import redirect_stdout
from typing import Any

from instruct_lm.commands import launch
from instruct_lm.commands.fetch import fetch_sources
from instruct_lm.commands.hydra_app import hydra_command
from instruct_lm.commands.pasting import command
from instruct_lm.commands.runs import is_complete, limits, record_data, save_config
from instruct_lm.commands.sweeps import compare_runs, evaluate_run
from instruct_lm.config import TrainConfig
from instruct_lm.errors import RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.files import shown, write_json
from instruct_lm.io.processes import stopping
from instruct_lm.io.run_files import LAST, SUMMARY

log = logging.getLogger(__name__)


@stopping()
def main(config: TrainConfig) -> int:
    """Build, train and summarise; evaluate the run if asked for."""
    launch.be_quiet()
    if is_complete(config):
        log.info("%s is complete; raise trainer.max_epochs or max_steps to continue it", shown(config.folder))
        finish(config)
        return 0

    launch.check(config)
    fetch_sources(config)
    # Imported here, so that --help, mistakes on the command line and missing files need no torch.
    from lightning.pytorch import seed_everything

    from instruct_lm.commands import build
    from instruct_lm.training.callbacks import SampleResponses, Throughput
    from instruct_lm.training.memory import describe, free_memory, peak_memory
    from instruct_lm.training.trainer import make_trainer, record_hparams, validate_before

    started = time.perf_counter()
    accelerator = build.choose_accelerator(config.device)
    if (number := launch.processes_to_start(config.device, accelerator)) > 1:
        launch.check_together(config, number)
        try:
            status = launch.run_processes(number, config.folder)
        except StoppedError as stopped:
            raise how_to_continue(config, str(stopped), stopped.signal) from stopped
        except RunError as error:
            raise RunError(f"{error}\n{way_on(config)}") from error
        if status == 0:
            finish(config)
        return status
    launch.watch_parent()
    seed_everything(config.seed, verbose=False)

    fetcher = build.build_fetcher(config)
    if not config.model.is_complete:
        config = build.resolve(config, fetcher)
        save_config(config)  # so that the run explains itself, also without its base
    tokenizer = build.build_tokenizer(config.model, fetcher)
    data = build.build_datamodule(config, tokenizer, fetcher)
    data.prepare_data()
    record_data(config, fetcher.fetch(config.data.source))
    data.setup("fit")
    fits, message = describe(build.estimate_memory(config, data), free_memory(accelerator))
    log.log(logging.INFO if fits else logging.WARNING, message)
    tuner = build.build_tuner(config, build.build_model(config, fetcher), tokenizer)
    (config.folder / SUMMARY).unlink(missing_ok=True)  # of a run that now goes on
    throughput = Throughput()
    trainer = make_trainer(config, accelerator, [throughput, SampleResponses(data.splits.validation[:4])])
    resume: dict[str, Any] = {"ckpt_path": config.folder / LAST, "weights_only": True} if config.resume else {}

    try:
        with redirect_stdout(sys.stderr):  # the progress bar's; stdout is for results
            before = validate_before(config, trainer, tuner, data)
            trainer.fit(tuner, data, **resume)
            after = {name: float(value) for name, value in trainer.callback_metrics.items() if name in before}
            if not after:  # the run was stopped between its last step and its summary
                after = dict(trainer.validate(tuner, data, verbose=False)[0])
    except StoppedError as stopped:
        raise how_to_continue(config, str(stopped), stopped.signal) from stopped
    except SystemExit as stopped:  # Lightning's end after Ctrl-C
        raise how_to_continue(config, "Stopped at once.", signal.SIGINT) from stopped
    except RuntimeError as error:
        launch.explain(error, way_on(config))
        raise

    summary = {
        "model": config.model.name,
        "parameters": sum(p.numel() for p in tuner.model.parameters()),
        "trained_parameters": sum(p.numel() for p in tuner.model.parameters() if p.requires_grad),
        "entries": {name: len(part) for name, part in data.splits._asdict().items()},
        "prompt_loss_weight": data.prompt_loss_weight,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "train_seconds": round(throughput.seconds, 1),
        "tokens_per_second": round(throughput.tokens / max(throughput.seconds, 1e-9), 1),
        "peak_memory_gb": round(peak_memory(tuner.device) / 1e9, 2),
        "before": before,
        "after": after,
        "limits": limits(config),
    }
    record_hparams(trainer, config, summary)
    if trainer.is_global_zero:
        summarise(config, summary)
    if not processes.is_launched():  # else the process that started this one goes on
        finish(config)
    return 0


def how_to_continue(config: TrainConfig, message: str, number: int) -> StoppedError:
    """The error of a run that signal `number` has stopped."""
    return StoppedError(f"{message} {way_on(config)}", number)


def way_on(config: TrainConfig) -> str:
    """How to go on with a run that has ended early."""
    if not (config.folder / LAST).is_file():
        return "There is no checkpoint yet: start again with the same command."
    return f"Continue with: {command('train.py', resume=config.folder)}"


def summarise(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Write `summary.json` and log its main numbers."""
    write_json(summary, config.folder / SUMMARY)
    table = [f"{'':32}{'before':>10}{'after':>10}"]
    for name, before in summary["before"].items():
        words = name.replace("val/", "validation ").replace("_", " ")
        table.append(f"{words:32}{before:10.3f}{summary['after'][name]:10.3f}")
    log.info("\n%s\n", "\n".join(table))
    cost = "%(steps)d steps, %(seconds).0f s in all, %(train_seconds).0f s of training"
    log.info(f"{cost}: %(tokens_per_second).0f tokens/s, peak memory %(peak_memory_gb).2f GB", summary)


def finish(config: TrainConfig) -> None:
    """Delete what a complete run does not keep, and evaluate it if asked for."""
    if not config.trainer.keep_last:
        (config.folder / LAST).unlink(missing_ok=True)
    if config.evaluate:
        evaluate_run(config.folder)
    else:
        log.info("next: %s", command("evaluate.py", run=config.folder))


if __name__ == "__main__":
    with hydra_command("train", main, compare_runs) as run:
        run()
