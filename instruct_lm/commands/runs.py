"""Run folders: what a run's own folder says of it, and what a command that goes on from it may change."""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from instruct_lm.commands.check_config import make_config, nest
from instruct_lm.commands.pasting import command
from instruct_lm.config import CommonConfig, EvaluateConfig, ExportConfig, TrainConfig
from instruct_lm.errors import InputError
from instruct_lm.evaluation.score_file import read_scores
from instruct_lm.io.conf_files import flatten
from instruct_lm.io.files import content_hash, shown, write_text
from instruct_lm.io.plain_yaml import read_plain_yaml
from instruct_lm.io.records import read_record
from instruct_lm.io.run_files import (
    BEST,
    CONFIG_FILE,
    LAST,
    MADE_FROM,
    PREVIOUS,
    RESPONSES,
    SCORES,
    SUMMARY,
    UNTUNED,
)

log = logging.getLogger(__name__)

FromRun = TypeVar("FromRun", EvaluateConfig, ExportConfig)

LIMITS = ("trainer.max_epochs", "trainer.max_steps", "trainer.patience")
RESUME_MAY_CHANGE = (
    *(*LIMITS, "trainer.checkpoint_steps", "trainer.checkpoint_minutes", "trainer.progress", "trainer.keep_last"),
    *("data.num_workers", "device", "fast", "evaluate", "fail_fast", "cache_dir", "offline", "mirror"),
)
"""Keys that `resume=` lets the command line change: how long, where and how fast, not what is computed."""

FROM_RUN = ("model", "data", "prompt", "lora", "generation", "seed", "cache_dir", "mirror")
"""What `run=…` takes from the run unless it is given on the command line."""

FIXED_BY_RUN = ("model", "prompt", "lora", "seed")
"""Those of them that cannot be given: the weights were trained with them."""

_HASH = "# sha256 of the lines below: "

SPLIT_KEYS = ("data.train_fraction", "data.test_fraction", "data.shuffle", "data.limit", "data.columns", "data.clean")
"""Another value would move entries that the run was trained on into the split to evaluate."""


def find_run(run: str | Path) -> Path:
    """Return the absolute path of a training run's folder.

    Raises:
        InputError: There is no such folder, or it holds no run; the message names runs nearby.
    """
    path = Path(run).expanduser().resolve()
    if (path / CONFIG_FILE).is_file():
        return path
    fault = "is not a run folder" if path.exists() else "no such folder"
    folders = (path, *path.parents[:3])  # three: from a checkpoint up to the folder of all runs
    near = sorted(file.parents[1] for folder in folders for file in folder.glob(f"*/{CONFIG_FILE}"))
    remedy = f"Runs nearby: {', '.join(map(str, near[-3:]))}." if near else "Give the output_dir of a run of train.py."
    raise InputError(f"{run}: {fault}. {remedy}")


def load_run_config(run: str | Path) -> TrainConfig:
    """Load the configuration that a training run was started with; its `output_dir` is the run's folder.

    Raises:
        InputError: No run folder, or its configuration is damaged or of another version: the message names the keys.
    """
    folder = find_run(run)
    path = folder / CONFIG_FILE
    try:
        values = read_plain_yaml(path)
        config = make_config(TrainConfig, {**values, "output_dir": str(folder)}, combinations=False)
        first, _, lines = path.read_text(encoding="utf-8").partition("\n")
        if first.startswith(_HASH) and first != _hash_line(lines):
            raise InputError("Its lines have changed since the run wrote them. On purpose? Then delete the first line.")
        return config
    except (TypeError, InputError) as error:
        raise InputError(f"{path} is damaged or of another version: train anew, or correct it.\n{error}") from error


def checkpoint_path(run: str | Path, which: str) -> Path:
    """Return the path of a run's `best` or `last` checkpoint.

    Raises:
        InputError: no run folder, or no such checkpoint; the message names those that are there.
    """
    folder = find_run(run) / "checkpoints"
    path = folder / f"{which}.ckpt"
    if not path.is_file():
        there = sorted(p.stem for p in folder.glob("*.ckpt"))
        remedy = f"It has {' and '.join(there)}." if there else "It ended before its first checkpoint: train anew."
        raise InputError(f"{run} has no checkpoints/{which}.ckpt. {remedy}")
    return path


def resumed(config: TrainConfig, given: Iterable[str]) -> TrainConfig:
    """Return the configuration of the run that `resume` names, with the permitted changes.

    Args:
        config: What this command line composes; its combinations are not checked yet.
        given: Keys given on the command line: those in `RESUME_MAY_CHANGE` are taken, others must agree with the run.

    Raises:
        InputError: Keys that contradict the run, no run to resume, or one that kept no checkpoint to go on from.
    """
    remedy = f"Leave out what differs, or start a run in another output_dir. May change: {', '.join(RESUME_MAY_CHANGE)}"
    values = _merge(str(config.resume), config, given, RESUME_MAY_CHANGE, remedy)
    config = make_config(TrainConfig, nest({**values, "resume": config.resume}))
    if not is_begun(config.folder):
        log.info("%s ended before its first checkpoint: it starts anew", shown(config.folder))
        return config.model_copy(update={"resume": None})
    if not is_complete(config):
        _check_goes_on(config.folder)
    return config


def _check_goes_on(folder: Path) -> None:
    """Raise an InputError unless a run that is not complete has a checkpoint to go on from."""
    if any((folder / name).is_file() for name in (LAST, PREVIOUS)):
        return
    if (folder / BEST).is_file() and (folder / SUMMARY).is_file() and read_record(folder / SUMMARY) is None:
        raise InputError(
            f"{folder / SUMMARY} is damaged, and without checkpoints/last.ckpt (trainer.keep_last=false) it cannot be "
            "made again. The weights in checkpoints/best.ckpt can still be evaluated, exported and chatted with."
        )
    if (folder / BEST).is_file() and (folder / SUMMARY).is_file():
        raise InputError(
            f"{folder} kept its best weights alone, as the jobs of a multirun do (trainer.keep_last=false), and cannot "
            "be made longer. Train anew, with trainer.keep_last=true."
        )
    checkpoint_path(folder, "last")


def is_begun(folder: Path) -> bool:
    """Whether a folder holds something that a training run can go on from."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS, SUMMARY))


def clear_dead_start(folder: Path) -> None:
    """Delete what a run left in its folder that was killed before its first checkpoint."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its curves would go back to step 0
    (folder / BEST).unlink(missing_ok=True)


def run_id(folder: Path) -> str | None:
    """The id of a training run, which its checkpoints carry too; None where its record has none."""
    return (read_record(folder / MADE_FROM) or {}).get("run")


def taken_from_run(config: FromRun, given: Iterable[str]) -> FromRun:
    """Return `config` with what belongs to the run that `run` names in place of the defaults.

    Args:
        config: What this command line composes; its combinations are not checked yet.
        given: Keys given on the command line: they win over the run's, unless the split or the weights depend on them.

    Raises:
        InputError: Keys that contradict the run, or no such run.
    """
    path, given = str(config.run), set(given)
    fixed = FIXED_BY_RUN if given & {"data", "data.source"} else FIXED_BY_RUN + SPLIT_KEYS
    mine = flatten(config.model_dump())
    may_change = [key for key in mine if not _within(key, fixed)]
    remedy = "Leave out what differs, or run= for another model or split"
    values = _merge(path, config, given, may_change, remedy)
    taken = {key: value for key, value in values.items() if key in mine and _within(key, FROM_RUN)}
    return make_config(type(config), nest(mine | taken))


def _merge(
    run: str, config: CommonConfig, given: Iterable[str], may_change: Sequence[str], remedy: str
) -> dict[str, Any]:
    """A run's flat values with the given ones that may change; an InputError names how the others differ."""
    values, mine = flatten(load_run_config(run).model_dump()), flatten(config.model_dump())
    differing = ["settings that an experiment replaces"] if "experiment" in given else []
    for key in values.keys() & mine.keys() - {"output_dir", "resume"}:
        if _within(key, may_change) and _within(key, given):
            if mine[key] is not None or key != "device.precision":  # null, as `device=cpu` has it: the run's own
                values[key] = mine[key]
        elif key.startswith("model.") and mine[key] is None:
            continue  # the run took it from its base
        elif _within(key, given) and values[key] != mine[key]:
            differing.append(f"{key}={values[key]}, not {mine[key]}")
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise InputError(f"The run {run} has {'; '.join(sorted(differing)[:4])}{more}. {remedy}.")
    return values


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def limits(config: TrainConfig) -> dict[str, int | None]:
    """How long a run is to be, as its summary records it."""
    return {key: getattr(config.trainer, key.removeprefix("trainer.")) for key in LIMITS}


def is_complete(config: TrainConfig) -> bool:
    """Whether `config` resumes a run whose summary is there, undamaged, and made with the same limits."""
    summary = read_record(Path(config.resume, SUMMARY)) if config.resume is not None else None
    return summary is not None and summary.get("limits") == limits(config)


def has_kept(config: TrainConfig) -> bool:
    """Whether a complete run has the checkpoints that it keeps; False: the last is damaged, and can be made again.

    Raises:
        InputError: The best weights are damaged or gone, or of another run; nothing can make them again.
    """
    from instruct_lm.training.checkpoints import load_checkpoint

    folder, run = config.folder, run_id(config.folder)
    there = [name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    try:
        load_checkpoint(folder / BEST, run)
    except InputError as error:
        way = f" Its last weights: {command('evaluate.py', run=folder, checkpoint='last')}" if LAST in there else ""
        raise InputError(f"The run is complete, but its best weights are lost: {error}{way}") from error
    if config.trainer.keep_last is not False and there:
        try:
            load_checkpoint(folder / LAST, run)
        except InputError:
            return False
    return True


def evaluation_is_current(run: Path, folder: Path, checkpoint: str) -> bool:
    """Whether an evaluation of a run is whole, and of the weights, the answers and the data that are there now.

    Args:
        run: The run's folder.
        folder: The evaluation's.
        checkpoint: `best`, `last` or `untuned`.
    """
    summary = read_record(folder / SUMMARY) if (folder / SUMMARY).is_file() else None
    made_from = (summary or {}).get("made_from", {})
    if summary is None or not (folder / RESPONSES).is_file() or not made_from:
        return False
    now = {"responses": content_hash(folder / RESPONSES)}
    weights = run / "checkpoints" / f"{checkpoint}.ckpt"
    if checkpoint != UNTUNED and weights.is_file():
        now["checkpoint"] = content_hash(weights)
    record = read_record(run / MADE_FROM) or {}
    for name in ("data", "tokenizer", *(["weights"] if checkpoint == UNTUNED else [])):
        if made_from.get(name) is not None and record.get(name, {}).get("sha256") is not None:
            now[name] = record[name]["sha256"]
    same = all(made_from.get(name) == sha256 for name, sha256 in now.items())
    return same and len(read_scores(folder / SCORES)) >= summary["n"]


def save_config(config: TrainConfig) -> None:
    """Write `.hydra/config.yaml`, with its hash first; the folder itself is left out, so that it may be moved."""
    values = config.model_dump() | {"output_dir": None, "resume": None}
    lines = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(f"{_hash_line(lines)}\n{lines}", config.folder / CONFIG_FILE)


def _hash_line(lines: str) -> str:
    return _HASH + hashlib.sha256(lines.encode()).hexdigest()
