"""What `train.py` and `evaluate.py` share: Hydra, its errors in plain words, and the exit status."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from instruct_lm.commands import runs
from instruct_lm.config import SCHEMAS, check_evaluate_config, check_train_config, schema_types
from instruct_lm.errors import InputError, RunError

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[2] / "conf"
_CHECKS = {"train": check_train_config, "evaluate": check_evaluate_config}
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list such as [a,b]",
    NoneType: "null",
}


class _JobFailed(BaseException):
    """Ends the command after its message; no Exception, which Hydra would keep until all jobs have run."""

    def __init__(self, status: int) -> None:
        self.status = status


def register() -> None:
    """Make the schemas and resolvers known that `conf/` refers to."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    runs.register_resolvers()


def run_command(
    config_name: str, main: Callable[[DictConfig], int | None], conclude: Callable[[Path], object] | None = None
) -> int:
    """Compose `conf/<config_name>.yaml` from the command line, check it and call `main`.

    `main` sees a configuration whose values are checked, whose `output_dir` is the job's own absolute path, and which
    after `resume=` or `run=` is the run's. In a multirun it is called for each job; the first that fails ends all.

    Args:
        config_name: ``train`` or ``evaluate``.
        main: Does the job. Returns None or 0 when all was done, 1 when something is left undone.
        conclude: Called with the folder of a multirun after its last job, if it is one with `evaluate=true`.

    Returns:
        The exit status: 0 when all was done; 2 for bad input or configuration, after a message of a few lines on
        stderr; 1 for anything else, after a traceback, or a message alone for `RunError` and Ctrl-C.
    """
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, else it prints them and exits with 1
    status = 0
    multirun: Path | None = None

    @functools.wraps(main)
    def job(cfg: DictConfig) -> None:
        nonlocal status, multirun
        try:
            status = max(status, main(prepare(config_name, cfg)) or 0)
            if cfg.get("evaluate") and HydraConfig.get().mode == RunMode.MULTIRUN:
                multirun = Path(HydraConfig.get().sweep.dir)
        except (Exception, KeyboardInterrupt) as error:
            failure, message = describe(error, config_name)
            hydra_cfg = HydraConfig.get()
            if hydra_cfg.mode == RunMode.MULTIRUN:
                message = (
                    f"Job {hydra_cfg.job.num} of the multirun failed ({' '.join(hydra_cfg.overrides.task)}):\n{message}"
                )
            log.error(message)
            raise _JobFailed(failure) from None

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except _JobFailed as failed:
        return failed.status
    except (Exception, KeyboardInterrupt) as error:
        status, message = describe(error, config_name, composing=True)
        print(message, file=sys.stderr)
        return status
    if conclude is not None and multirun is not None:
        try:
            conclude(multirun)
        except (Exception, KeyboardInterrupt) as error:
            status, message = describe(error, config_name)
            print(message, file=sys.stderr)
    return status


def prepare(config_name: str, cfg: DictConfig) -> DictConfig:
    """Turn what Hydra composed into what `main` works with, and record it in the output folder.

    Raises:
        InputError: a value, a combination, or a run folder that cannot be.
    """
    hydra_cfg = HydraConfig.get()
    _check_keys(cfg, config_name)
    given = runs.settle_sources(cfg, [_key(override) for override in hydra_cfg.overrides.task])
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    if cfg.get("resume") is not None:
        if sweep:
            raise InputError(f"resume={cfg.resume} continues one run: leave out -m (--multirun).")
        cfg = runs.resumed_config(cfg, given)
    elif cfg.get("run") is not None:
        cfg = runs.evaluated_config(cfg, given)
    _CHECKS[config_name](cfg)
    folder = Path(hydra_cfg.runtime.output_dir)
    if config_name == "train" and sweep:
        cfg = runs.continued_job(cfg, folder)
    if sweep and (cfg.device.devices != 1 or cfg.device.num_nodes != 1) and "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"device.devices={cfg.device.devices} and device.num_nodes={cfg.device.num_nodes} in a multirun: every "
            "process would start the whole sweep again. Use one device, single runs, or torchrun."
        )
    if config_name == "train" and hydra_cfg.output_subdir is not None:  # null in Lightning's child processes
        runs.save_config(cfg, folder)
    cfg.output_dir = str(folder)
    return cfg


def describe(error: BaseException, config_name: str, composing: bool = False) -> tuple[int, str]:
    """Return the exit status and the message for an error.

    Args:
        error: What was raised.
        config_name: ``train`` or ``evaluate``: whose keys to suggest.
        composing: Whether it was raised before the job began, by Hydra or by what it reads and makes.
    """
    while isinstance(error, InterpolationResolutionError) and error.__context__ is not None:
        error = error.__context__  # what a resolver of conf/ raised
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, "Interrupted."
    if isinstance(error, BrokenPipeError):
        return 1, "Nobody reads the output any more."
    if isinstance(error, RunError):
        return 1, str(error)
    if composing and isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        return 2, _explain(error, config_name)
    if composing and isinstance(error, OSError):
        return 2, f"output_dir: cannot make {error.filename} ({error.strerror}). Choose another output_dir."
    return 1, "".join(traceback.format_exception(error)).rstrip()


def _explain(error: Exception, config_name: str) -> str:
    """Say what Hydra complains of as key, value and remedy."""
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        near = get_close_matches(choice, error.options, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{group}={choice}: there is no such choice.{hint} Choose one of {', '.join(error.options)}."
    if match := re.search(r"Could not override '(.+?)'.*use \+(.+)", text, re.DOTALL):
        return _no_such_key(match[1], match[2], config_name)
    if match := re.search(r"Ambiguous value for argument '((.+?)=(.*))'", text):
        return (
            f"{match[1]} gives several values: add -m (--multirun) for a job each, write {match[2]}=[{match[3]}] for "
            f"a list, or quote a text twice: '{match[2]}=\"{match[3]}\"'."
        )
    if match := re.search(r"Multiple values for (\S+)\.", text):
        return f"+{match[1]}=… adds what is there already: write {match[1]}=… without the +."
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        remedy = f"""quote a value with such characters twice: '{key}="{value}"'.""" if equals else "write key=value."
        return f"{error.override} cannot be read ({_first_line(text.splitlines()[-2])}): {remedy}"
    if match := re.search(r"Error merging override (.+)", text):
        if isinstance(cause, ValidationError):
            return f"{match[1]} is not possible: give {_type_words(_known(config_name).get(str(cause.full_key)))}."
        if match[1].startswith("~"):
            return f"{match[1]} is not possible: a key cannot be taken away. Set it to null or another value."
        return f"{match[1]} is not possible: {_first_line(cause or text)}."
    if text.startswith("Config group override"):
        for group in _known(config_name):
            choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            for arg in sys.argv[1:]:
                if choices and _key(arg) == group and arg.partition("=")[2] not in choices:
                    return f"{arg} is not possible: choose {', '.join(choices)}."
    lines = [_first_line(text)] if cause is None else [_first_line(text), _first_line(cause)]
    return "\n".join(lines)


def _no_such_key(key: str, override: str, config_name: str) -> str:
    known, other = _known(config_name), "evaluate" if config_name == "train" else "train"
    if key in _known(other):
        return f"{override}: {config_name}.py has no such key, {other}.py has it. Leave it out."
    group, _, leaf = key.rpartition(".")
    near = get_close_matches(leaf, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.7)
    meant = [k for k in known if near and k.rpartition(".")[2] == near[0]]
    hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
    if group not in known:
        group = ""
    siblings = [k for k in known if k.rpartition(".")[0] == group]
    return f"{override}: there is no such key.{hint} {group or 'The command'} has {', '.join(siblings)}."


def _type_words(kind: Any) -> str:
    """`int | None` → `a whole number or null`."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    return " or ".join(_WORDS.get(get_origin(k) or k, "a group's choice") for k in kinds)


def _check_keys(cfg: DictConfig, config_name: str) -> None:
    """Name keys that `+key=…` added, which Hydra lets pass, and keys without a value."""

    def walk(node: DictConfig, prefix: str = "") -> None:
        for name in map(str, node):
            key = prefix + name
            try:
                value = None if OmegaConf.is_missing(node, name) else node[name]
            except InterpolationResolutionError as error:
                raise InputError(f"{key}: {_first_line(error)}. Give it a plain value.") from error
            if key not in known:
                raise InputError(_no_such_key(key, f"{key}={value}", config_name))
            if isinstance(value, DictConfig):
                walk(value, f"{key}.")

    known = _known(config_name)
    walk(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"No value for {', '.join(missing)}: give {missing[0]}=… or complete its file under conf/.")


def _known(config_name: str) -> dict[str, Any]:
    return dict(schema_types(SCHEMAS[config_name]))


def _key(override: str) -> str:
    """`~model@x=y` → `model`."""
    return re.split("[=@]", override.lstrip("+~"))[0]


def _first_line(text: object) -> str:
    return next((line.strip().rstrip(".") for line in str(text).splitlines() if line.strip()), "")
