import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from instruct_lm.commands.folders import file_name, train_dir
from instruct_lm.commands.own_files import check_no_run
from instruct_lm.commands.pasting import override
from instruct_lm.commands.runs import (
    checkpoint_path,
    clear_dead_start,
    evaluation_is_current,
    find_run,
    has_kept,
    is_complete,
    limits,
    load_run_config,
)
from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError
from instruct_lm.evaluation.score_file import ScoredEntry, score_line
from instruct_lm.io.files import sha256_of
from instruct_lm.io.locks import LOCK
from instruct_lm.io.records import write_record
from tests.run_commands import commands


def finish(config: TrainConfig) -> None:
    """What a training run leaves that others look for."""
    folder = config.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "last.ckpt").touch()
    (folder / "best.ckpt").touch()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield run


@pytest.fixture
def run(command: Any) -> Callable[..., Path]:
    """Makes a finished run and returns its folder."""

    def make(*args: str) -> Path:
        Path("entries.json").write_text("[]")
        status, err, _ = command("train", "model=gpt2-tiny", "output_dir=run", *args, main=finish)
        assert status == 0, err
        return Path("run")

    return make


def test_a_run_folder_says_what_it_was_started_with(run: Any) -> None:
    cfg = load_run_config(run("seed=7", "data.source=entries.json"))
    assert (cfg.seed, cfg.model.name, cfg.data.source) == (7, "gpt2-tiny", str(Path("entries.json").resolve()))
    assert cfg.output_dir == str(Path("run").resolve())
    assert "output_dir: null" in Path("run", ".hydra", "config.yaml").read_text()


def test_a_moved_run_folder_is_complete_in_itself(run: Any) -> None:
    moved = run().rename("moved")
    assert find_run("moved") == moved.resolve()
    assert load_run_config("moved").model.name == "gpt2-tiny"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
        (("data.source=entries.json",), None),
        (("data.source=entries.json", f"data.sha256={'ab' * 32}"), "ab" * 32),
    ],
)
def test_a_known_hash_is_not_held_against_another_source(run: Any, args: tuple[str, ...], expected: str | None) -> None:
    assert load_run_config(run(*args)).data.sha256 == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "instruction"),
        (("data=sample",), "sample"),
        (("data.source=entries.json",), "entries"),
        (("data.source=entries.json", "data.name=mine"), "mine"),
    ],
)
def test_another_source_has_its_own_name(run: Any, args: tuple[str, ...], expected: str) -> None:
    assert load_run_config(run(*args)).data.name == expected


def test_other_weights_keep_the_tokenizer_of_their_model(command: Any) -> None:
    known = command("train", "model=smollm2-135m")[2][0].model
    other = command("train", "model=smollm2-135m", "model.weights=other.gguf")[2][0].model
    assert (other.weights, other.weights_sha256) == ("other.gguf", None)
    assert (other.tokenizer, other.tokenizer_sha256) == (known.weights, known.weights_sha256)
    assert (known.tokenizer, known.tokenizer_sha256) == (known.weights, known.weights_sha256)


def test_what_is_no_run_folder_is_described(run: Any, command: Any) -> None:
    folder = run()
    Path("empty").mkdir()
    command("train", "-m", "seed=1,2", "output_dir=sweep")
    cases = {
        "nowhere": f"nowhere: no such folder. Runs nearby: {folder.resolve()}.",
        "empty": "empty: is not a run folder. Runs nearby: ",
        str(folder / "checkpoints" / "best.ckpt"): f"is not a run folder. Runs nearby: {folder.resolve()}.",
        "sweep": f"{Path('sweep').resolve() / '0_seed-1'}, {Path('sweep').resolve() / '1_seed-2'}",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=re.escape(message)):
            find_run(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "is damaged or of another version"),
        (b"\xff\xfe\x00", "is damaged or of another version"),
        (b"colour: red", "colour: there is no such key"),
        (b"seed: x", "seed=x must be a valid integer"),
        (b"seed: 1", "No value for .*trainer"),
        (b"", "No value for .*seed"),
        (b"- 1", "'list' object is not a mapping"),
        (b"1: 2", "1: there is no such key"),
    ],
)
def test_a_damaged_configuration_is_named(run: Any, content: bytes, message: str) -> None:
    path = run() / ".hydra" / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_run_config("run")
    assert str(path.resolve()) in str(caught.value)


def test_a_missing_checkpoint_is_named_with_those_there(run: Any) -> None:
    folder = run() / "checkpoints"
    assert checkpoint_path("run", "best") == (folder / "best.ckpt").resolve()
    (folder / "best.ckpt").unlink()
    with pytest.raises(InputError, match=r"no checkpoints/best\.ckpt\. It has last"):
        checkpoint_path("run", "best")
    (folder / "last.ckpt").unlink()
    with pytest.raises(InputError, match="ended before its first checkpoint"):
        checkpoint_path("run", "last")


def test_resume_brings_the_runs_own_configuration(run: Any, command: Any) -> None:
    folder = run("seed=7", "optimizer.lr=1e-3", "prompt=chatml")
    before = (folder / ".hydra" / "config.yaml").read_bytes()
    status, err, seen = command("train", "resume=run")
    assert status == 0, err
    (cfg,) = seen
    assert (cfg.seed, cfg.optimizer.lr, cfg.prompt.style, cfg.model.name) == (7, 1e-3, "chatml", "gpt2-tiny")
    assert (cfg.output_dir, cfg.resume) == (str(folder.resolve()), str(folder.resolve()))
    assert (folder / ".hydra" / "config.yaml").read_bytes() == before
    assert len(list((folder / ".hydra" / "resumed").iterdir())) == 1


def test_resume_may_change_how_long_and_where(run: Any, command: Any) -> None:
    run("seed=7")
    args = [
        "trainer.max_epochs=5",
        "device=cpu",
        "device.precision=32-true",
        "offline=true",
        "model=gpt2-tiny",
        "seed=7",
    ]
    status, err, seen = command("train", "resume=run", *args)
    assert status == 0, err
    (cfg,) = seen
    assert (cfg.trainer.max_epochs, cfg.device.accelerator, cfg.device.precision) == (5, "cpu", "32-true")
    assert cfg.offline
    assert load_run_config("run").trainer.max_epochs == 5  # the next resume goes on to the same end


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=1", "model=gpt2", "data.source=entries.json", "experiment=demo", "seed=8", "output_dir=other"],
)
def test_resume_refuses_what_contradicts_the_run(run: Any, command: Any, override: str) -> None:
    folder = run("seed=7")
    before = (folder / ".hydra" / "config.yaml").read_bytes()
    status, err, seen = command("train", "resume=run", override)
    assert (status, seen) == (2, [])
    assert override.split("=")[0] in err
    assert "eave out" in err
    assert (folder / ".hydra" / "config.yaml").read_bytes() == before


def test_resume_refuses_a_multirun_and_bad_values(run: Any, command: Any) -> None:
    run()
    assert "leave out -m" in command("train", "-m", "resume=run")[1]
    assert command("train", "resume=run", "trainer.max_epochs=0")[0] == 2
    assert load_run_config("run").trainer.max_epochs == 2


@pytest.mark.parametrize("again", ["resume=run", "output_dir=run"])
def test_a_run_killed_before_its_first_checkpoint_starts_anew(run: Any, command: Any, again: str) -> None:
    (run() / "checkpoints" / "last.ckpt").unlink()  # it still has best.ckpt, of a validation
    status, err, seen = command("train", again)
    assert status == 0, err
    assert seen[0].resume is None


def test_no_run_begins_in_the_folder_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "responses.json").write_text("[]")
    with pytest.raises(InputError, match="holds an evaluation"):
        train_dir(str(tmp_path), None, "outputs/now")
    assert [file.name for file in tmp_path.iterdir()] == ["responses.json"]


def test_long_texts_have_names_of_their_own() -> None:
    names = [file_name("x" * length) for length in (99, 100, 101, 102, 500)]
    assert names[:2] == ["x" * 99, "x" * 100]
    assert len(set(names)) == 5
    assert max(map(len, names)) == 100
    assert file_name("a b/ü=1,2") == "a-b-ü-1-2"


def test_of_a_dead_start_neither_curves_nor_weights_are_left(tmp_path: Path) -> None:
    for name in (".hydra/config.yaml", "checkpoints/best.ckpt", "tensorboard/events", "train.log"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    clear_dead_start(tmp_path / "run")
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["config.yaml", "train.log"]


def test_a_complete_run_needs_no_checkpoint_unless_it_is_to_go_on(run: Any, command: Any) -> None:
    folder = run()
    (folder / "checkpoints" / "last.ckpt").unlink()
    write_record({"limits": limits(load_run_config(folder))}, folder / "summary.json")
    status, err, seen = command("train", "resume=run", "evaluate=true")
    assert status == 0, err
    assert is_complete(seen[0])
    for limit in ("max_epochs", "max_steps", "patience"):
        trainer = seen[0].trainer.model_copy(update={limit: 9})
        assert not is_complete(seen[0].model_copy(update={"trainer": trainer}))
    status, err, _ = command("train", "resume=run", "trainer.max_epochs=3")
    assert status == 2
    assert "kept its best weights alone" in err
    assert "trainer.keep_last=true" in err


def test_a_finished_run_is_not_written_over(run: Any, command: Any) -> None:
    folder = run("seed=7")
    status, err, seen = command("train", "output_dir=run")
    assert (status, seen) == (2, [])
    assert "resume=run" in err
    assert load_run_config(folder).seed == 7


def test_an_evaluation_takes_what_belongs_to_the_run(run: Any, command: Any) -> None:
    args = ["seed=7", "prompt=phi3", "data.shuffle=true", "generation.max_new_tokens=9", "data.source=entries.json"]
    folder = run(*args)
    before = (folder / ".hydra" / "config.yaml").read_bytes()
    status, err, seen = command("evaluate", "run=run", "judge=none", "generation.batch_size=2", "data.batch_size=3")
    assert status == 0, err
    (cfg,) = seen
    assert (cfg.seed, cfg.prompt.style, cfg.model.name, cfg.data.shuffle) == (7, "phi3", "gpt2-tiny", True)
    assert (cfg.generation.max_new_tokens, cfg.generation.batch_size, cfg.data.batch_size) == (9, 2, 3)
    assert (cfg.data.source, cfg.data.sha256, cfg.judge.kind) == (str(Path("entries.json").resolve()), None, "none")
    assert cfg.output_dir == str(folder.resolve() / "evaluation" / "test")
    assert (folder / ".hydra" / "config.yaml").read_bytes() == before


def test_an_evaluation_writes_where_output_dir_says_and_never_over_the_runs_record(run: Any, command: Any) -> None:
    folder = run("seed=7")
    status, err, seen = command("evaluate", "run=run", "output_dir=run")
    assert (status, seen) == (2, [])
    assert "output_dir=run holds a run, whose files would be replaced" in err
    for place in ("run/checkpoints/new", "run/.hydra", "run/tensorboard"):
        with pytest.raises(InputError, match=f"output_dir={place} belongs to the run run alone"):
            check_no_run(Path(place))
    assert load_run_config(folder).seed == 7
    assert command("evaluate", "run=run", "output_dir=run/evaluation/other")[0] == 0
    names = {
        ("split=train",): "train",
        ("checkpoint=last",): "test-last",
        ("split=validation", "checkpoint=last"): "validation-last",
    }
    for args, name in names.items():
        assert Path(command("evaluate", "run=run", *args)[2][0].output_dir).name == name
    assert command("evaluate")[2][0].output_dir.endswith("_evaluate")


@pytest.mark.parametrize(
    "override",
    [
        *("model=gpt2", "model.n_layer=3", "prompt=chatml", "lora=r16", "seed=8", "data.limit=3", "data.shuffle=true"),
        "data.train_fraction=0.5 data.test_fraction=0.05 data.clean=true data.columns={instruction:x}",
    ],
)
def test_an_evaluation_refuses_what_the_weights_and_the_split_depend_on(
    run: Any,
    command: Any,
    override: str,
) -> None:
    run("seed=7")
    status, err, seen = command("evaluate", "run=run", *override.split())
    assert (status, seen) == (2, [])
    assert [each for each in override.split() if each.split("=")[0] not in err] == []
    assert "Leave out" in err


def test_a_run_may_be_evaluated_on_other_data(run: Any, command: Any) -> None:
    run()
    _, _, seen = command("evaluate", "run=run", "data=sample", "data.limit=20")
    assert (seen[0].data.source, seen[0].data.limit, seen[0].model.name) == ("sample", 20, "gpt2-tiny")
    _, _, seen = command("evaluate", "run=run", "data.source=entries.json", "data.limit=20")
    assert (seen[0].data.source, seen[0].data.sha256) == (str(Path("entries.json").resolve()), None)
    assert seen[0].data.name == "entries"


def test_a_folder_has_one_owner_at_a_time(run: Any, command: Any, tmp_path: Path) -> None:
    folder = run()
    other = FileLock(folder / LOCK)
    places = {
        folder: [("train", "resume=run")],
        folder / "evaluation" / "test": [("evaluate", "run=run")],
        Path("sweep"): [("train", "-m", "model=gpt2-tiny", "output_dir=sweep")],
        Path("alone"): [("train", "model=gpt2-tiny", "output_dir=alone")],
    }
    for place, calls in places.items():
        place.mkdir(parents=True, exist_ok=True)
        before = sorted(place.rglob("*"))
        with FileLock(place / LOCK):
            for call in calls:
                status, err, seen = command(*call)
                assert (status, seen) == (2, []), call
                assert f"{place} is in use by another process" in err
        assert set(before) ^ set(place.rglob("*")) <= {place / LOCK}  # nothing was written
    # A run that trains can be evaluated, and what only shows a configuration owns nothing.
    with other:
        assert command("evaluate", "run=run")[0] == 0
        assert command("train", "resume=run", "--cfg", "job")[0] == 0


def test_two_commands_without_a_folder_get_one_each(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [command("train", "model=gpt2-tiny")[2][0].output_dir for _ in range(2)]
    assert folders[0] != folders[1]
    assert command("train", "--cfg", "all")[0] == 0
    assert len(list(Path("outputs").iterdir())) == 2
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process has made the folder
    assert command("train", "model=gpt2-tiny", "output_dir=outputs")[0] == 0
    assert not Path("outputs", LOCK).exists()


def evaluated(folder: Path) -> Path:
    """An evaluation of a run's best weights, as `evaluate.py` leaves it."""
    run = folder.parents[1]
    folder.mkdir(parents=True)
    (folder / "responses.json").write_text("[]")
    line = score_line("f", ScoredEntry(0, 50, None, False, 50.0, 50.0))
    (folder / "scores.jsonl").write_text(f"{line}\n")
    files = {"checkpoint": run / "checkpoints" / "best.ckpt", "responses": folder / "responses.json"}
    made_from = {name: sha256_of(file) for name, file in files.items()} | {"data": "d", "tokenizer": "t"}
    write_record({"n": 1, "made_from": made_from}, folder / "summary.json")
    write_record({"data": {"sha256": "d"}, "tokenizer": {"sha256": "t"}}, run / "made_from.json")
    return folder


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoints/best.ckpt", "other weights"),
        ("evaluation/test/responses.json", "[1]"),
        ("evaluation/test/scores.jsonl", ""),
        ("evaluation/test/summary.json", "{}"),
        ("made_from.json", {"data": "e", "tokenizer": "t"}),
        ("made_from.json", {"data": "d", "tokenizer": "u"}),
    ],
)
def test_an_evaluation_is_current_while_all_that_it_was_made_from_is(
    run: Any, file: str, content: str | dict[str, str]
) -> None:
    folder = run()
    evaluation = evaluated(folder / "evaluation" / "test")
    assert evaluation_is_current(folder, evaluation, "best")
    os.utime(folder / "checkpoints" / "best.ckpt")  # copied: newer, and the same
    assert evaluation_is_current(folder, evaluation, "best")
    if isinstance(content, dict):
        write_record({name: {"sha256": sha256} for name, sha256 in content.items()}, folder / file)
    else:
        (folder / file).write_text(content)
    assert not evaluation_is_current(folder, evaluation, "best")
    assert not evaluation_is_current(folder, folder / "evaluation" / "none", "best")


@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_summary_is_no_complete_run(run: Any, command: Any, last: bool) -> None:
    folder = run()
    summary = folder / "summary.json"
    write_record({"limits": limits(load_run_config(folder))}, summary)
    summary.write_text(summary.read_text().replace("max_epochs", "max_epocht"))  # one bit
    if last:
        status, err, seen = command("train", "resume=run")
        assert (status, is_complete(seen[0])) == (0, False)
    else:
        (folder / "checkpoints" / "last.ckpt").unlink()
        status, err, _ = command("train", "resume=run")
        assert status == 2
        assert "cannot be made again. The weights in checkpoints/best.ckpt can still be" in err
    assert "summary.json is damaged" in err


def test_messages_print_commands_that_run_when_pasted(run: Any, command: Any) -> None:
    name = """it's a "b" (x=y), [$HOME] {日本}, -~"""
    run().rename(name)
    status, err, _ = command("train", override("output_dir", Path(name)))
    assert status == 2, err
    (pasted,) = re.findall(r"continue it with: python train\.py (.+)", err)
    done = subprocess.run(["sh", "-c", f"printf '%s\n' {pasted}"], capture_output=True, env={"LC_ALL": "C"}, check=True)
    status, err, seen = command("train", *os.fsdecode(done.stdout).splitlines())
    assert status == 0, err
    assert seen[0].resume == str(Path(name).resolve())


def test_a_complete_run_says_which_checkpoint_is_lost(run: Any, command: Any) -> None:
    folder = run()
    best, last, previous = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last", "previous"))
    write_record({"run": "a"}, folder / "made_from.json")

    def save(*files: Path, of: str = "a") -> None:
        for file in files:
            torch.save({"state_dict": {}, "run": of}, file)

    save(best, last, previous)
    config = load_run_config(folder)
    assert has_kept(config)
    last.write_bytes(last.read_bytes()[:-9])
    assert not has_kept(config)  # it goes on from the one before
    without_last = config.trainer.model_copy(update={"keep_last": False})
    assert has_kept(config.model_copy(update={"trainer": without_last}))  # it is to go
    save(last, of="another")
    assert not has_kept(config)
    last.unlink()
    assert not has_kept(config)
    previous.unlink()
    assert has_kept(config)  # somebody has made room; there is nothing to go on from
    save(last)
    for damage in (lambda: save(best, of="another"), lambda: best.write_bytes(b"PK"), best.unlink):
        damage()
        with pytest.raises(InputError, match=r"its best weights are lost: .*best\.ckpt.* evaluate.py run=.*=last"):
            has_kept(config)


def test_a_configuration_with_a_flipped_bit_is_refused(run: Any, command: Any) -> None:
    path = run("optimizer.lr=5e-4") / ".hydra" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("lr: 0.0005", "lr: 0.0004"))
    status, err, seen = command("train", "resume=run")
    assert (status, seen) == (2, [])
    assert "config.yaml is damaged or of another version" in err
    assert "Then delete the first line." in err
    path.write_text(path.read_text().partition("\n")[2])  # as the message says
    assert load_run_config("run").optimizer.lr == 4e-4
