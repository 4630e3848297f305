"""Runs a command of the project inside the test's process."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from instruct_lm.cli import run_command

Main = Callable[[DictConfig], int | None]


@contextmanager
def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Gives a function that runs a command in `folder`: exit status, stderr, and what `main` was called with."""

    def run(name: str, *args: str, main: Main = lambda cfg: None) -> tuple[int, str, list[DictConfig]]:
        seen: list[DictConfig] = []

        def recorded(cfg: DictConfig) -> int | None:
            seen.append(cfg)
            return main(cfg)

        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        status = run_command(name, recorded)
        return status, capsys.readouterr().err, seen

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored at the end: run_command sets it
    handlers, level = logging.root.handlers[:], logging.root.level
    yield run
    logging.root.handlers[:], logging.root.level = handlers, level
