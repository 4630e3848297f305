"""Run folders: where a command writes, and what a run's own folder says of it."""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from instruct_lm.commands.check_config import make_config, nest
from instruct_lm.config import CommonConfig, EvaluateConfig, ExportConfig, TrainConfig, flatten
from instruct_lm.errors import InputError
from instruct_lm.io.files import sha256_of, write_json, write_text
from instruct_lm.io.run_files import CONFIG_FILE, LAST, MADE_FROM, SUMMARY

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
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return make_config(TrainConfig, {**values, "output_dir": str(folder)}, combinations=False)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError, InputError) as error:
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
        raise InputError(f"output_dir={output_dir} holds a run: continue it with resume={output_dir}, or delete it.")
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


def sweep_dir(output_dir: str | None, default: str) -> str:
    """Return the folder of a multirun, in which each job has a folder of its own."""
    return default if output_dir is None else str(Path(output_dir).expanduser())


def file_name(text: object) -> str:
    """A text as part of a path: without special characters, and where it is cut with a hash of the whole."""
    name = re.sub(r"[^\w.+-]+", "-", str(text))
    return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def resumed(config: TrainConfig, given: Iterable[str]) -> TrainConfig:
    """Return the configuration of the run that `resume` names, with the permitted changes.

    Args:
        config: What this command line composes; its combinations are not checked yet.
        given: Keys given on the command line: those in `RESUME_MAY_CHANGE` are taken, others must agree with the run.

    Raises:
        InputError: Keys that contradict the run, no run to resume, or no checkpoint in a run that is not complete.
    """
    remedy = f"Leave out what differs, or start a run in another output_dir. May change: {', '.join(RESUME_MAY_CHANGE)}"
    values = _merge(str(config.resume), config, given, RESUME_MAY_CHANGE, remedy)
    config = make_config(TrainConfig, nest({**values, "resume": config.resume}))
    if not is_complete(config):
        checkpoint_path(config.folder, "last")
    return config


def is_begun(folder: Path) -> bool:
    """Whether a folder holds something to go on from; if not, delete the curves of a start that saved nothing."""
    begun = (folder / LAST).is_file() or (folder / SUMMARY).is_file()
    if not begun:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its curves would go back to step 0
    return begun


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
    """Whether `config` resumes a run whose summary is there, made with the same limits."""
    if config.resume is None or not (summary := Path(config.resume, SUMMARY)).is_file():
        return False
    return json.loads(summary.read_text(encoding="utf-8")).get("limits") == limits(config)


def save_config(config: TrainConfig) -> None:
    """Write `.hydra/config.yaml`; the folder itself is left out, so that it may be moved."""
    values = config.model_dump() | {"output_dir": None, "resume": None}
    write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), config.folder / CONFIG_FILE)


def record_data(config: TrainConfig, fetched: Path) -> None:
    """Record the hash of the data file that a run is made from; of a run that goes on, check it (see `check_data`)."""
    from instruct_lm.data.dataset import data_file

    file = data_file(fetched)
    if config.resume is not None:
        check_data(config.folder, config.data.source, fetched)
    elif file.is_file():
        write_json({"data": {"source": config.data.source, "sha256": sha256_of(file)}}, config.folder / MADE_FROM)


def check_data(run: Path, source: str, fetched: Path) -> None:
    """Compare a run's data file with the record of the run.

    Args:
        run: The run's folder; one without a record, of an older version, passes.
        source: Where the data come from now: another source than the run's is another data set and passes.
        fetched: What the source was fetched as.

    Raises:
        InputError: The content has changed, so that entries that the run was trained on may stand in another split.
    """
    from instruct_lm.data.dataset import data_file

    file, record = data_file(fetched), run / MADE_FROM
    made_from = json.loads(record.read_text(encoding="utf-8"))["data"] if record.is_file() else {}
    if made_from.get("source") != source or not file.is_file():
        return
    if (now := sha256_of(file)) != (then := made_from["sha256"]):
        raise InputError(
            f"{file} has changed since the run {run} was made from it (sha256 {now[:12]}…, then {then[:12]}…): entries "
            "that it was trained on may stand in another split. Put the old file back, or train anew."
        )


def _claim(folder: str) -> str:
    """Make a folder that nobody has: two commands may begin in the same second."""
    for n in itertools.count(1):
        name = folder if n == 1 else f"{folder}_{n}"
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            break
    return name
