import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from instruct_lm import __version__
from instruct_lm.commands.arguments import check_arguments
from instruct_lm.commands.check_config import all_keys
from instruct_lm.config import TrainConfig
from instruct_lm.errors import InputError, RunError
from instruct_lm.io.conf_files import CONF, choices
from instruct_lm.io.network import DownloadError
from tests.run_commands import Main, commands

ROOT = CONF.parent


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield run


MISTAKES = [
    # arguments; parts of the message: key and value, then the remedy
    (["foo=1"], ["foo=1", "no such key", "--help"]),
    (["+foo=1"], ["foo=1", "no such key"]),
    (["modl=gpt2"], ["modl=gpt2", "Did you mean model=gpt2?"]),
    (["model.nlayer=3"], ["model.nlayer=3", "Did you mean model.n_layer=3?"]),
    (["+trainer.foo=1"], ["trainer.foo=1", "no such key"]),
    (["model.foo.bar=1"], ["model.foo.bar=1", "no such key"]),
    (["judge=ollama"], ["judge=ollama", "evaluate.py has it"]),
    (["model=gpt3"], ["model=gpt3", "gpt2-medium, gpt2-tiny, gpt2-xl, "]),
    (["model=null"], ["model=null", "Choose one of auto, gpt2, gpt2-large"]),
    (["experiment=dem"], ["experiment=dem", ", ".join(choices("experiment"))]),
    (["data.batch_size=abc"], ["data.batch_size=abc", "must be a valid integer"]),
    (["data.batch_size=8.5"], ["data.batch_size=8.5", "must be a valid integer"]),
    (["optimizer.lr=null"], ["optimizer.lr=null", "must be a valid number"]),
    (["trainer.clip_norm=x"], ["trainer.clip_norm=x", "must be a valid number, or null"]),
    (["mask_instructions=maybe"], ["mask_instructions=maybe", "must be a valid boolean"]),
    (["data.source=[a,b]"], ["data.source=[a,b]", "must be a valid string"]),
    (["lora.targets=attn.qkv"], ["lora.targets=attn.qkv must be", "a valid list"]),
    (["~trainer.max_epochs"], ["~trainer.max_epochs", "Set it to null"]),
    (["seed=1,2"], ["seed=1,2", "add -m (--multirun)"]),
    (["foo"], ["foo cannot be read", "write key=value"]),
    (["--lr", "3e-5"], ["--lr 3e-5", "key=value", "Did you mean optimizer.lr=3e-5?"]),
    (["--lr=3e-5", "--epochs", "2"], ["Did you mean optimizer.lr=3e-5?", "Did you mean trainer.max_epochs=2?"]),
    (["--no-fast", "seed=1"], ["--no-fast", "Did you mean fast=false?"]),
    (["--seed", "3"], ["--seed 3", "Did you mean seed=3?"]),
    (["--model", "gpt2", "-m"], ["--model gpt2", "Did you mean model=gpt2?"]),
    (["--judge=ollama"], ["--judge=ollama", "evaluate.py has it"]),
    (["--per-device-train-batch-size", "4"], ["Did you mean data.batch_size=4?"]),
    (["--model_name_or_path=gpt2"], ["Did you mean model=auto model.weights=gpt2?"]),
    (["--fp16"], ["Did you mean device.precision=16-mixed?"]),
    (["--cfg", "foo"], ["--cfg", "invalid choice"]),
    (["seed=1", "-m", "model=gpt2-tiny"], ["model=gpt2-tiny", "flags such as -m before"]),
    (["optimizer.learning_rate=1"], ["optimizer.learning_rate=1", "Did you mean optimizer.lr=1?"]),
    (["learning_rate=1"], ["Did you mean optimizer.lr=1?"]),
    (["num_train_epochs=1"], ["Did you mean trainer.max_epochs=1?"]),
    (["max_epochs=1"], ["Did you mean trainer.max_epochs=1?"]),
    (["lora_alpha=1"], ["Did you mean lora.alpha=1?"]),
    (["data.source=it's (1)"], ["cannot be read: quote such a value twice: " + shlex.quote('data.source="it\'s (1)"')]),
    (["data.source=a=b.json"], ["data.source=a=b.json", """'data.source="a=b.json"'"""]),
    (["seed=[1"], ["seed=[1", "quote"]),
    (["+experiment=demo"], ["without the +"]),
    (["seed=${nowhere}"], ["seed: ", "nowhere", "plain value"]),
    (["optimizer.lr=-1"], ["optimizer.lr=-1 ", "greater than 0"]),
    (["data.train_fraction=0.95"], ["data.train_fraction=0.95", "lower one"]),
    (["optimizer.lr=nan", "seed=x"], ["optimizer.lr=nan must be a finite number", "seed=x must be a valid integer"]),
    (
        ["modl=gpt2", "data=nothing", "~lora", "trainer.max_epochs=0"],
        ["modl=gpt2", "data=nothing", "~lora", "epochs=0"],
    ),
    (["+trainer.max_steps=5"], ["write trainer.max_steps=5 without the +"]),
    (["data.max_length=2000"], ["data.max_length=2000", "model.block_size=1024"]),
    (["prompt_loss_weight=2"], ["prompt_loss_weight=2 ", "must be less than or equal to 1, or null"]),
    (["data.columns={question: instruction}"], ["data.columns=question must be instruction, input, "]),
    (["data.columns={output: [a]}"], ["data.columns=[a] must be a valid string"]),
    (["data.columns=question"], ["data.columns=question must be a valid dictionary, or null"]),
    (["data.unusable=keep"], ["data.unusable=keep must be drop or error"]),
    (["resume=outputs/none"], ["outputs/none: no such folder", "output_dir"]),
    (["--resolve"], ["--resolve", "--cfg"]),
    (["-m", "seed=1,x"], ["seed=x", "must be a valid integer"]),
    (["-m", "model=gpt2-tiny,gpt3"], ["model=gpt3", "smollm2-135m"]),
    (
        ["-m", "device.devices=2", "seed=1"],
        ["device.devices=2", "multirun", "python train.py device.devices=2 seed=1 "],
    ),
]


@pytest.mark.parametrize(("args", "parts"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_ends_with_2_and_a_short_message(command: Any, args: list[str], parts: list[str]) -> None:
    status, err, seen = command("train", *args)
    assert (status, seen) == (2, [])
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    message = [line for line in err.splitlines() if not re.match(r"Launching|\t#\d", line)]
    assert 1 <= len(message) <= 4


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["second_judge=openai"], ["judge@second_judge=openai"]),
        (["judge@second_judge=openia"], ["judge@second_judge=openia", "openai"]),
        (["trainer.max_epochs=3"], ["trainer.max_epochs=3", "train.py has it"]),
        (["judge=openia"], ["judge=openia", "openai"]),
        (["split=valid"], ["split=valid", "train, validation or test"]),
        (["run=nowhere"], ["nowhere: no such folder"]),
    ],
)
def test_a_mistake_in_an_evaluation(command: Any, args: list[str], parts: list[str]) -> None:
    status, err, seen = command("evaluate", *args)
    assert (status, seen) == (2, [])
    assert all(part in err for part in parts), err
    assert "Traceback" not in err


def raises(error: BaseException) -> Main:
    def main(config: Any) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "expected", "message", "traceback"),
    [
        (lambda cfg: None, 0, "", False),
        (lambda cfg: 1, 1, "", False),
        (raises(InputError("entry 3 has no output: add one")), 2, "entry 3 has no output: add one", False),
        (raises(RunError("the server hung up")), 1, "the server hung up", False),
        (raises(KeyboardInterrupt()), 130, "Interrupted.", False),
        (raises(KeyError("a bug")), 1, "KeyError: 'a bug'", True),
    ],
)
def test_exit_status_of_a_job(command: Any, main: Main, expected: int, message: str, traceback: bool) -> None:
    status, err, seen = command("train", "model=gpt2-tiny", "output_dir=run", main=main)
    assert status == expected
    assert len(seen) == 1
    assert message in err
    assert ("Traceback" in err) == traceback
    if expected == 2:
        assert not Path("run").exists()  # nothing was begun
    elif message:
        assert message in Path("run", "train.log").read_text()


@pytest.mark.parametrize("mistake", ["seed=${nowhere}", "data.max_length=2000"])
def test_a_refused_command_leaves_no_folder(command: Any, mistake: str) -> None:
    assert command("train", mistake, "output_dir=new/folder")[0] == 2
    assert command("train", mistake)[0] == 2
    assert not Path("new").exists()
    assert not Path("outputs").exists()
    Path("mine").mkdir()
    Path("mine", "notes.txt").write_text("kept")
    assert command("train", mistake, "output_dir=mine")[0] == 2
    assert Path("mine", "notes.txt").read_text() == "kept"


def test_a_download_that_fails_leaves_no_folder_and_other_failures_leave_theirs(command: Any) -> None:
    assert command("train", "output_dir=a", main=raises(DownloadError("no network")))[0] == 1
    assert not Path("a").exists()

    def begun(config: Any) -> None:
        (config.folder / "checkpoints").mkdir()
        (config.folder / "checkpoints" / "last.ckpt").touch()
        raise InputError("entry 3")

    assert command("train", "output_dir=b", main=begun)[0] == 2
    assert Path("b", "checkpoints", "last.ckpt").exists()


def test_a_multirun_keeps_best_weights_alone_unless_told_otherwise(command: Any) -> None:
    def kept(*args: str) -> list[bool]:
        status, err, seen = command("train", *args, "model=gpt2-tiny")
        assert status == 0, err
        return [config.trainer.keep_last for config in seen]

    assert kept() == [True]
    assert kept("trainer.keep_last=false") == [False]
    assert kept("-m", "seed=1,2") == [False, False]
    assert kept("-m", "seed=1,2", "trainer.keep_last=true") == [True, True]


@pytest.mark.parametrize("name", ["train", "evaluate", "export"])
def test_the_version_is_ours(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--version"])
    with pytest.raises(SystemExit) as ended:
        check_arguments(name)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"instruct-lm {__version__}\n"


def test_two_frames_of_ours_lie_between_hydra_and_main(command: Any) -> None:
    frames: list[str] = []

    def main(config: Any) -> None:
        stack = traceback.extract_stack()
        frames.extend(frame.name for frame in stack if Path(frame.filename).is_relative_to(ROOT / "instruct_lm"))

    assert command("train", "output_dir=run", main=main)[0] == 0
    assert frames == ["__call__", "_work"]


def test_a_bug_while_handling_bad_input_is_still_a_bug(command: Any) -> None:
    def main(config: Any) -> None:
        try:
            raise InputError("bad file")
        except InputError:
            raise KeyError("in the handler")  # noqa: B904

    assert command("train", "output_dir=run", main=main)[0] == 1


def test_an_output_folder_that_cannot_be_made_is_named(command: Any) -> None:
    Path("file").write_text("")
    status, err, _ = command("train", "output_dir=file/run")
    assert status == 2
    assert "file/run" in err
    assert "another output_dir" in err
    assert "Traceback" not in err


def test_a_multirun_leaves_a_folder_for_each_job(command: Any) -> None:
    status, _, seen = command("train", "-m", "mask_instructions=true,false", "seed=1,2", "model=gpt2-tiny")
    assert status == 0
    assert [(cfg.mask_instructions, cfg.seed) for cfg in seen] == [(True, 1), (True, 2), (False, 1), (False, 2)]
    folders = [Path(cfg.output_dir) for cfg in seen]
    assert len(set(folders)) == 4
    assert folders[2].name.startswith("2_mask_instructions-False")
    assert {folder.parents[1] for folder in folders} == {Path("outputs", "multirun").resolve()}
    for cfg, folder in zip(seen, folders, strict=True):
        saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
        assert (saved.mask_instructions, saved.seed, saved.output_dir) == (cfg.mask_instructions, cfg.seed, None)


def test_a_multirun_goes_where_output_dir_says(command: Any) -> None:
    _, _, seen = command("train", "-m", "seed=1,2", "output_dir=sweep")
    assert [cfg.output_dir for cfg in seen] == [str(Path("sweep", name).resolve()) for name in ("0_seed-1", "1_seed-2")]


def test_what_one_job_leaves_undone_shows_in_the_status_after_all_ran(command: Any) -> None:
    status, _, seen = command("train", "-m", "seed=1,2,3", main=lambda cfg: int(cfg.seed == 1))
    assert (status, len(seen)) == (1, 3)


def test_experiment_masking_is_a_multirun_of_itself(command: Any) -> None:
    status, _, seen = command("train", "experiment=masking", "seed=5", "evaluate=false")
    assert status == 0
    assert [(cfg.prompt_loss_weight, cfg.seed) for cfg in seen] == [(w, 5) for w in (0, 0.01, 0.1, 0.3, 1)]


def test_the_default_folder_is_new_for_each_run(command: Any) -> None:
    folders = [command("train")[2][0].output_dir for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d)?", Path(folder).name) for folder in folders)


def test_debug_is_a_few_steps_on_a_few_entries(command: Any) -> None:
    cfg = command("train", "trainer=debug")[2][0]
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.data.limit) == (1, 4, 40)
    assert cfg.trainer.val_interval == 0.5


# The commands themselves, as a user starts them.


def start(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


@pytest.mark.parametrize(
    ("script", "args", "part"),
    [
        ("train.py", ["modl=gpt2"], "Did you mean model=gpt2?"),
        ("train.py", ["data.batch_size=abc"], "data.batch_size=abc"),
        ("train.py", ["optimizer.lr=-1"], "optimizer.lr=-1 must be"),
        ("train.py", ["-m", "seed=1", "data.batch_size=0"], "data.batch_size=0"),
        ("evaluate.py", ["judge=nobody"], "reference"),
    ],
)
def test_the_command_ends_with_2_without_traceback(tmp_path: Path, script: str, args: list[str], part: str) -> None:
    done = start(str(ROOT / script), *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr


NO_HEAVY = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "lightning", "transformers", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_import_no_torch(script: str, flag: list[str]) -> None:
    done = start("-c", NO_HEAVY, str(ROOT / script), *flag)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, instruct_lm, instruct_lm.config, instruct_lm.commands.hydra_app; assert 'torch' not in sys.modules"
    )
    assert start("-c", code).returncode == 0


def test_help_explains_every_group_choice_and_field() -> None:
    text = start(str(ROOT / "train.py"), "--help").stdout
    evaluation = start(str(ROOT / "evaluate.py"), "--help").stdout
    assert all(len(line) <= 120 for line in (text + evaluation).splitlines())
    assert "python train.py -m mask_instructions=true,false seed=1,2,3" in text
    assert "python evaluate.py responses=answers.json judge=openai" in evaluation
    for path in CONF.glob("*/*.yaml"):
        page = evaluation if path.parent.name == "judge" else text
        assert re.search(rf"^ +{path.parent.name} (.*\n {{25}})*.*\b{path.stem}\b", page, re.MULTILINE), path
    set_by_choice = r"model\..*|.*\.name|prompt\.style|device\.accelerator|generation\.seed"
    for key, _ in all_keys(TrainConfig).items():
        if not re.fullmatch(set_by_choice, key):
            assert re.search(rf"\b{key.rpartition('.')[2]}\b", text), key


def test_cfg_prints_the_configuration() -> None:
    done = start(str(ROOT / "train.py"), "--cfg", "job", "model=gpt2-tiny", "seed=7")
    shown = yaml.safe_load(done.stdout)
    assert (shown["seed"], shown["model"]["name"], shown["model"]["n_embd"]) == (7, "gpt2-tiny", 32)


def test_shell_completion_offers_choices() -> None:
    env = os.environ | {"COMP_LINE": "python train.py prompt=", "COMP_POINT": "23"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-sc", "query=bash"], capture_output=True, text=True, env=env
    )
    assert done.stdout.split() == [f"prompt={name}" for name in choices("prompt")]
