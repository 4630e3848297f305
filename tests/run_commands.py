"""Runs the project's commands: inside the test's process, or as a user starts them."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from instruct_lm.commands.check_config import make_config
from instruct_lm.commands.hydra_app import hydra_command, register
from instruct_lm.config import COMMANDS
from instruct_lm.io.conf_files import CONF

ROOT = CONF.parent
Main = Callable[[Any], int | None]


@cache
def _composed(name: str, *choices: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(choices))


def composed(name: str, *overrides: str) -> dict[str, Any]:
    """The values that Hydra composes, before any check of this project."""
    groups = {path.name for path in CONF.iterdir()}
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    values = OmegaConf.from_dotlist([override for override in overrides if override not in choices])
    return OmegaConf.to_container(OmegaConf.merge(_composed(name, *choices), values), resolve=True)  # type: ignore[return-value]


def typed(name: str, *overrides: str) -> Any:
    """The typed configuration of a command line."""
    return make_config(COMMANDS[name], composed(name, *overrides))


@contextmanager
def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Gives a function that runs a command in `folder`: exit status, stderr, and what `main` was called with."""

    def run(
        name: str, *args: str, main: Main = lambda config: None, conclude: Callable[[Path], object] | None = None
    ) -> tuple[int, str, list[Any]]:
        seen: list[Any] = []

        def recorded(config: Any) -> int | None:
            seen.append(config)
            return main(config)

        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        with pytest.raises(SystemExit) as ended, hydra_command(name, recorded, conclude) as job:
            job()
        return ended.value.code, capsys.readouterr().err, seen  # type: ignore[return-value]

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored at the end: hydra_command sets it
    # Hydra closes the handlers listed here; absl's (rouge-score's) would close pytest's stderr with itself.
    monkeypatch.setattr(logging, "_handlerList", [])
    handlers, level = logging.root.handlers[:], logging.root.level
    on_interrupt = signal.getsignal(signal.SIGINT)  # Lightning ignores it after the first
    yield run
    signal.signal(signal.SIGINT, on_interrupt)
    logging.root.handlers[:], logging.root.level = handlers, level


def start(script: str, *args: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Starts `train.py` or `evaluate.py` as a user does; what it says comes through `stderr`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr of a command."""
    err = process.communicate(timeout=600)[1]
    return process.returncode, err


def call(script: str, *args: str, cwd: Path, **env: str) -> str:
    """Runs a command that must succeed; returns its stderr."""
    status, err = finish(start(script, *args, cwd=cwd, **env))
    if status != 0:
        raise RuntimeError(f"{script} {' '.join(args)} ended with {status}:\n{err}")
    return err


def read_until(process: subprocess.Popen[str], seen: Callable[[str], bool]) -> None:
    """Reads a running command's stderr until it says what the test waits for."""
    text = ""
    while not seen(text):
        piece = process.stderr.read(1) if process.stderr else ""
        if not piece:
            raise RuntimeError(f"the command ended with {process.wait()} before that:\n{text}")
        text += piece
