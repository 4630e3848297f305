"""What a run was made from, and what is said where something of it has changed."""

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.commands import origins
from instruct_lm.commands.origins import check_origin, record_origin
from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import sha256_of
from instruct_lm.io.records import read_record
from tests.run_commands import typed

FETCHER = Fetcher(offline=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run that has recorded what it is made from; its base is a folder, its tokenizer too."""
    monkeypatch.setattr(origins, "_git", lambda: {"commit": "a" * 40, "changed": False})
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text("[1]")
    Path("base").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        Path("base", name).write_text(name)
    sources = ("data.source=data.json", "data.sha256=null", "model.weights=base", "model.tokenizer=base")
    config: TrainConfig = typed("train", "model=gpt2-tiny", *sources, "output_dir=run")
    config.folder.mkdir()
    record_origin(config, FETCHER)
    return config


def test_the_record_has_contents_versions_and_commit(run: TrainConfig) -> None:
    record = read_record(run.folder / "made_from.json")
    assert record is not None
    assert record["data"] == {"source": str(Path("data.json").resolve()), "sha256": sha256_of(Path("data.json"))}
    assert len({record[name]["sha256"] for name in ("data", "weights", "tokenizer")}) == 3
    assert record["versions"].keys() == {"python", "torch", "lightning", "tokenizers", "instruct-lm"}
    assert record["git"] == {"commit": "a" * 40, "changed": False}
    record_origin(run, FETCHER)
    again = read_record(run.folder / "made_from.json")
    assert again is not None
    assert again["run"] != record["run"]


def test_what_is_unchanged_passes_without_a_word(run: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    check_origin(run.folder, run, FETCHER, weights=True)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("data.json", "data.source"),
        ("base/tokenizer.json", "model.tokenizer"),
        ("base/model.safetensors", "model.weights"),
    ],
)
def test_changed_content_is_refused(run: TrainConfig, file: str, key: str) -> None:
    before = Path(file).read_text()
    Path(file).write_text("[2, 3]")
    with pytest.raises(InputError, match=rf"{key}=.* has changed since the run run was made .* Put the old file back"):
        check_origin(run.folder, run, FETCHER, weights=True)
    resumed = run.model_copy(update={"resume": "run", "lora": run.lora.model_copy(update={"rank": 4})})
    with pytest.raises(InputError, match=key):
        record_origin(resumed, FETCHER)
    Path(file).write_text(before)
    record_origin(resumed, FETCHER)


def test_weights_count_where_they_are_used_and_another_source_is_another_data_set(run: TrainConfig) -> None:
    Path("base", "model.safetensors").write_text("other")
    check_origin(run.folder, run, FETCHER, weights=False)
    Path("data.json").write_text("other")
    check_origin(run.folder, run, FETCHER, weights=False, data=False)
    Path("mine.json").write_text("mine")
    data = run.data.model_copy(update={"source": str(Path("mine.json").resolve())})
    check_origin(run.folder, run.model_copy(update={"data": data}), FETCHER, weights=False)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_git", {"commit": "b" * 40, "changed": True}, "commit aaaaaaaaaaaa, now bbbbbbbbbbbb with changes"),
        ("_versions", {"torch": "9.9"}, "now 9.9"),
    ],
)
def test_other_versions_are_a_warning(
    run: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: Any,
    words: str,
) -> None:
    monkeypatch.setattr(origins, name, lambda: value)
    check_origin(run.folder, run, FETCHER, weights=True)
    assert words in caplog.text


def flip(file: Path) -> None:
    file.write_text(file.read_text().replace('"torch": "', '"torch": "1', 1))


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_a_run_without_a_whole_record_goes_on_with_a_warning(
    run: TrainConfig, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    damage(run.folder / "made_from.json")
    with caplog.at_level(logging.WARNING):
        check_origin(run.folder, run, FETCHER, weights=True)
    assert "has no record of what it was made from" in caplog.text
    assert ("is damaged" in caplog.text) == (damage is flip)


def test_the_commit_is_that_of_this_code() -> None:
    found = origins._git()
    assert found is None or len(found["commit"]) == 40
    assert json.dumps(found)


def test_the_commit_of_a_project_that_the_code_is_installed_in_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "code.py").touch()
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for line in (["init", "-q"], ["add", "env"], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *line], check=True)
    monkeypatch.setattr(origins, "CONF", tmp_path / "env" / "conf")
    assert origins._git() is None
    monkeypatch.setattr(origins, "CONF", tmp_path / "conf")
    found = origins._git()
    assert found is not None
    assert not found["changed"]
    (tmp_path / "env" / "code.py").write_text("pass")
    assert origins._git() == {**found, "changed": True}
