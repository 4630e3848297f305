"""Run folders: where a command writes, and what a run's own folder says of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from instruct_lm.config import TrainConfig, schema_types
from instruct_lm.errors import InputError
from instruct_lm.io.run_files import CONFIG_FILE, LAST, SUMMARY, UNTUNED

LIMITS = ("trainer.max_epochs", "trainer.max_steps")
RESUME_MAY_CHANGE = (
    *LIMITS,
    "trainer.progress",
    "trainer.keep_last",
    "data.num_workers",
    "device",
    "evaluate",
    "cache_dir",
    "offline",
    "mirror",
)
"""What may be given beside `resume=`: it changes how long, where and how visibly, not what is computed."""

FROM_RUN = ("model", "data", "prompt", "lora", "generation", "seed", "cache_dir", "mirror")
"""What `evaluate.py run=…` takes from the run unless it is given on the command line."""

FIXED_BY_RUN = ("model", "prompt", "lora", "seed")
"""… and what cannot be given: the weights were trained with it."""

SPLIT_KEYS = ("data.train_fraction", "data.test_fraction", "data.shuffle", "data.limit")
"""Other values would move entries that the run was trained on into the split to evaluate."""

_HASH_OF = {
    "data.source": "data.sha256",
    "model.weights": "model.weights_sha256",
    "model.tokenizer": "model.tokenizer_sha256",
    "judge.weights": "judge.weights_sha256",
    "second_judge.weights": "second_judge.weights_sha256",
}
_PATHS = (*_HASH_OF, "responses", "run", "resume", "cache_dir")
_NOT_PATHS = ("sample", "bytes")  # names of what the package itself holds


def find_run(run: str | Path) -> Path:
    """Return the absolute path of a training run's folder.

    Raises:
        InputError: the folder is not there or is no run's; the message says what it is instead.
    """
    path = Path(run).expanduser().resolve()
    if (path / CONFIG_FILE).is_file():
        return path
    if not path.exists():
        known = sorted(p.parent.parent for p in path.parent.glob(f"*/{CONFIG_FILE}"))[-3:]
        remedy = (
            f"Runs there: {', '.join(p.name for p in known)}." if known else "Give the output_dir of a run of train.py."
        )
        raise InputError(f"{run}: no such folder. {remedy}")
    inside = next((p for p in path.parents if (p / CONFIG_FILE).is_file()), None)
    if inside is not None:
        raise InputError(f"{run} lies inside a run: give the run's own folder, {inside}.")
    if (path / "multirun.yaml").is_file():
        jobs = sorted(p.parent.parent.name for p in path.glob(f"*/{CONFIG_FILE}"))
        raise InputError(
            f"{run} holds a multirun: give one of its runs, {', '.join(jobs) or 'of which there are none yet'}."
        )
    raise InputError(f"{run} is not a run folder: it has no {CONFIG_FILE}. Give the output_dir of a run of train.py.")


def load_run_config(run: str | Path) -> DictConfig:
    """Load the configuration that a training run was started with, typed by `TrainConfig`.

    Raises:
        InputError: no run folder, or its configuration is damaged or of another version.
    """
    path = find_run(run) / CONFIG_FILE
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be read: {reason}\nIt is damaged or of another version: train anew."
        ) from error
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: it is damaged or of another version. Train anew, or add them."
        )
    if not isinstance(cfg, DictConfig):
        raise InputError(f"{path} is a list, not a configuration: it is damaged. Train anew.")
    return cfg


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


def train_dir(output_dir: str | None, resume: str | None, default: str) -> str:
    """Return the folder that a training run writes into.

    Raises:
        InputError: a folder to resume that holds no run, or a folder to write into that holds one already.
    """
    if resume is not None:
        run = find_run(resume)
        if output_dir is not None and Path(output_dir).expanduser().resolve() != run:
            raise InputError(f"resume={resume} goes on in its own folder: leave out output_dir={output_dir}.")
        return str(run)
    if output_dir is None:
        return _claim(default)
    if any((Path(output_dir).expanduser() / "checkpoints").glob("*.ckpt")):
        raise InputError(
            f"output_dir={output_dir} holds a run already: continue it with resume={output_dir}, delete it, or choose "
            "another folder."
        )
    return str(Path(output_dir).expanduser())


def evaluate_dir(output_dir: str | None, run: str | None, split: str, checkpoint: str, default: str) -> str:
    """Return the folder that an evaluation writes into: by default inside the run.

    Raises:
        InputError: `run` is no run folder.
    """
    if output_dir is not None:
        return str(Path(output_dir).expanduser())
    if run is None:
        return _claim(default)
    return str(find_run(run) / "evaluation" / (split if checkpoint == "best" else f"{split}-{checkpoint}"))


def file_name(text: object) -> str:
    """A text as part of a path: without special characters, and where it is cut with a hash of the whole."""
    name = re.sub(r"[^\w.+-]+", "-", str(text))
    return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def register_resolvers() -> None:
    """Make the functions above known to `conf/train.yaml` and `conf/evaluate.yaml`.

    Cached, since Hydra asks more than once and the answer must not change when the folder fills.
    """
    resolvers: dict[str, Callable[..., str]] = {
        "train_dir": train_dir,
        "evaluate_dir": evaluate_dir,
        "first": lambda value, default: default if value is None else str(Path(value).expanduser()),
        "file_name": file_name,
        "record_dir": lambda folder, now: f".hydra/resumed/{now}" if Path(folder, CONFIG_FILE).exists() else ".hydra",
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=True)


def settle_sources(cfg: DictConfig, given: Sequence[str]) -> list[str]:
    """Resolve interpolations and make local paths absolute, so that the folder's record is complete in itself.

    A known hash belongs to its source: where only the source was given, the hash is dropped.

    Args:
        cfg: A composed configuration; changed in place.
        given: Keys given on the command line.

    Returns:
        ``given``, and the hashes that were dropped with their sources.
    """
    given = list(given)
    for source, sha256 in _HASH_OF.items():
        if source in given and sha256 not in given:
            OmegaConf.update(cfg, sha256, None)
            given.append(sha256)
    OmegaConf.resolve(cfg)
    for key in _PATHS:
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in _NOT_PATHS and Path(value).expanduser().exists():
            OmegaConf.update(cfg, key, str(Path(value).expanduser().resolve()))
    return given


def resumed_config(cfg: DictConfig, given: Sequence[str]) -> DictConfig:
    """Return the configuration of the run that `cfg.resume` names, with the permitted changes.

    Args:
        cfg: The composed configuration of this command.
        given: Keys given on the command line: those in `RESUME_MAY_CHANGE` are applied, others must agree with the run.

    Raises:
        InputError: a key that contradicts the run, or no run or checkpoint to resume.
    """
    run = load_run_config(cfg.resume)
    run.resume = cfg.resume
    for key in given:
        if _within(key, RESUME_MAY_CHANGE):
            OmegaConf.update(run, key, OmegaConf.select(cfg, key))
        elif key not in ("resume", "output_dir"):
            _require_same(key, cfg, run, "resume", f"May change: {', '.join(RESUME_MAY_CHANGE)}.")
    if not is_complete(run):
        checkpoint_path(cfg.resume, "last")
    return run


def continued_job(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with which a sweep's job goes on in a folder where an earlier call may have begun it.

    Args:
        cfg: The job's configuration.
        folder: Where its run goes.

    Returns:
        `cfg` itself where nothing was saved yet, else the run's with `resume` set and what may change. A complete run
        needs no checkpoint.

    Raises:
        InputError: The folder holds a run with other settings, or one without the checkpoint to go on from.
    """
    if not (folder / LAST).is_file():
        if not (folder / SUMMARY).is_file():
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its curves would go back to step 0
            return cfg
        if not _is_complete(folder, cfg):
            raise InputError(
                f"{folder} holds a complete run that cannot go on with another {' or '.join(LIMITS)}: its {LAST} was "
                "not kept. Choose another output_dir for this sweep, or delete that run."
            )
    run = load_run_config(folder)
    for key in _leaves(TrainConfig):
        here, there = OmegaConf.select(cfg, key), OmegaConf.select(run, key)
        if _within(key, RESUME_MAY_CHANGE):
            OmegaConf.update(run, key, here)
        elif here != there and key not in ("output_dir", "resume"):
            raise InputError(
                f"{folder} holds a run with {key}={there}, not {here}: choose another output_dir for this sweep, or "
                "delete that run."
            )
    run.resume = str(folder)
    return run


def is_complete(cfg: DictConfig) -> bool:
    """Whether `cfg` resumes a run that has nothing left to do."""
    return cfg.resume is not None and _is_complete(Path(cfg.resume), cfg)


def _is_complete(run: Path, cfg: DictConfig) -> bool:
    """Whether a run's summary is there, made with these limits."""
    if not (summary := run / SUMMARY).is_file():
        return False
    limits = json.loads(summary.read_text(encoding="utf-8")).get("limits")
    return bool(limits == {key: OmegaConf.select(cfg, key) for key in LIMITS})


def evaluated_config(cfg: DictConfig, given: Sequence[str]) -> DictConfig:
    """Return `cfg` with what belongs to the run that `cfg.run` names in place of the defaults.

    Args:
        cfg: The composed configuration of this command.
        given: Keys given on the command line: they go before the run's, unless the split or the weights depend on them.

    Raises:
        InputError: a key that contradicts the run, or no run or checkpoint to evaluate.
    """
    if cfg.checkpoint != UNTUNED:
        checkpoint_path(cfg.run, cfg.checkpoint)
    run = load_run_config(cfg.run)
    fixed = FIXED_BY_RUN if "data" in given or "data.source" in given else FIXED_BY_RUN + SPLIT_KEYS
    for key in given:
        if _within(key, fixed):
            _require_same(key, cfg, run, "run", "To evaluate another model or split, leave out run=.")
        elif _within(key, FROM_RUN):
            OmegaConf.update(run, key, OmegaConf.select(cfg, key))
    for name in FROM_RUN:
        cfg[name] = run[name]
    return cfg


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write `.hydra/config.yaml` as a whole or not at all; the folder itself is left out, so that it may be moved."""
    record = cfg.copy()
    record.output_dir = None
    if "resume" in record:
        record.resume = None
    path = folder / CONFIG_FILE
    part = path.with_suffix(f".{os.getpid()}.part")
    OmegaConf.save(record, part)
    part.replace(path)


def _claim(folder: str) -> str:
    """Make a folder that nobody has: two commands may begin in the same second."""
    names = (folder if n == 1 else f"{folder}_{n}" for n in itertools.count(1))
    while True:
        name = next(names)
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            return name


def _leaves(schema: type) -> list[str]:
    return [key for key, kind in schema_types(schema) if not is_dataclass(kind)]


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _require_same(key: str, cfg: DictConfig, run: DictConfig, by: str, remedy: str) -> None:
    here, there = OmegaConf.select(cfg, key), OmegaConf.select(run, key)
    if key == "experiment" or here != there:
        values = "" if isinstance(here, DictConfig) or key == "experiment" else f" is {there}, not {here}, and"
        raise InputError(f"{key} beside {by}={cfg[by]}: the run's own{values} is kept. Leave out {key}. {remedy}")
