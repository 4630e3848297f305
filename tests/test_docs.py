"""The code of `docs/python.md` and `notebooks/chapter7.ipynb`, run as a new user would."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
NOTEBOOK = ROOT / "notebooks" / "chapter7.ipynb"


@pytest.mark.slow
def test_the_first_lines_train_and_answer(smollm2_gguf: Path, tmp_path: Path) -> None:
    lines = BLOCKS[0]
    assert len(lines.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "test/response_loss" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Half of 90 is")
    assert list(tmp_path.iterdir()) == []  # neither logs nor checkpoints


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_python_and_imports_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_notebook_is_small_and_has_its_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # run once, from the top
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}  # no error
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.slow
def test_the_notebook_runs(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    kernel = tmp_path / "kernels" / "python3" / "kernel.json"  # this interpreter, whatever kernels are installed
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "notebooks"
    folder.mkdir()

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()

    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    [(chapter, weighted)] = re.findall(r"chapter ([\d.]+), weighted ([\d.]+)", printed)
    assert chapter == weighted
    for name in ("val/loss", "val/response_loss"):
        [(before, after)] = re.findall(rf"{name} +before ([\d.]+), after ([\d.]+)", printed)
        assert float(after) < float(before)
    answers = json.loads((tmp_path / "outputs" / "chapter7" / "tuned" / "responses.json").read_text(encoding="utf-8"))
    assert len(answers) == 24
    assert all(entry["model_response"] for entry in answers)
