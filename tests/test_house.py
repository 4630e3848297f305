"""The contracts of pyproject.toml hold, and each fails when its rule is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("importlinter")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-c", code, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, ""),
        ("data/batching.py", "from instruct_lm.model import gpt"),
        ("model/gpt.py", "import lightning"),
        ("model/gpt.py", "import hydra"),
        ("model/gpt.py", "def f():\n    from instruct_lm.fast import accelerate"),
        ("training/loss.py", "from instruct_lm.evaluation import metrics"),
        ("training/module.py", "from instruct_lm.fast import accelerate"),
        ("evaluation/metrics.py", "from instruct_lm.report import tables"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str | None, line: str) -> None:
    shutil.copytree(ROOT / "instruct_lm", tmp_path / "instruct_lm", ignore=shutil.ignore_patterns("__pycache__"))
    if file is not None:
        path = tmp_path / "instruct_lm" / file
        path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    done = lint(tmp_path)
    assert (done.returncode == 0) == (file is None), done.stdout
