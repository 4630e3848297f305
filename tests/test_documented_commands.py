"""Every command on every page: its keys and options are valid, and those that need nothing from outside run.

A command is a line of a fenced block that begins with a program, or a code span that begins with `python`. What a page
names and a test cannot have stands in for itself by the tables below; nothing else is left out.
"""

import argparse
import importlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

import evaluate
import train
from instruct_lm.commands import export
from instruct_lm.commands.arguments import check_arguments
from instruct_lm.io.conf_files import CONF
from tests.conftest import ROOT
from tests.run_commands import commands

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGES.remove(ROOT / "CHANGELOG.md")  # it tells of commands that were
MAINS: dict[str, Callable[[Any], int | None]] = {"train": train.main, "evaluate": evaluate.main, "export": export.main}

# Other programs: a line that begins with one is not checked further.
OTHER_PROGRAMS = {
    **dict.fromkeys(("git", "pip", ".venv/bin/pip"), "needs a network"),
    **dict.fromkeys((".", "cd", "wait", "source", "export"), "the shell's own"),
    **dict.fromkeys(("bash", ".venv/bin/pre-commit"), "checks of a developer"),
    **dict.fromkeys(("tensorboard", ".venv/bin/tensorboard"), "serves until it is stopped"),
    **dict.fromkeys(("ollama", "llama-server", "curl", "vllm", "lm_eval"), "another program"),
}
# Arguments that stand for the reader's own.
PLACEHOLDERS = {r"<([\w.-]+)>": r"\1", r"\bRUN\b": "run"}
# Commands that are checked and not run: what stands in them, and what they would need.
NOT_RUN = {
    r"judge=(ollama|rubric)": "Ollama",
    r"judge=openai": "a server",
    r"judge=llamacpp": "a language model",
    r"hf:|experiment=book": "the hub",
    r"device\.devices=|device\.strategy=|device=(gpu|mps)|torchrun|CUDA_VISIBLE_DEVICES": "several devices or processes",
    r"device\.precision=": "minutes on a processor that multiplies it slowly",
    r"hydra/launcher=": "joblib or Slurm",
    r"-m experiment=": "15 runs",
    r"--web": "a browser: it serves until it is stopped",
    r"-m (faults|benchmarks)\b": "minutes to hours",
}
# Commands that are run: what stands in for what.
STAND_INS = {
    r"model=(?!auto)\S+": "model=gpt2-tiny",  # random weights, a token a byte
    r"data=\S+": "data=sample",
    r"seed=\d[\d,]+": "seed=1",
    r"(mask_instructions)=true,false": r"\1=true",
    r"prompt=template": "prompt=alpaca",  # the tiny model has no template
}
SMALL = {
    "train": "trainer.max_steps=1 trainer.max_epochs=1 data.limit=40 trainer.progress=false device=cpu "
    "generation.max_new_tokens=2",
    "evaluate": "generation.max_new_tokens=2 device=cpu",
    "export": "",
}
# What else the commands read, beside the runs.
MADE = {
    "my.jsonl": "".join(f'{{"instruction": "{number**9:x}", "output": "It."}}\n' for number in range(30, 60)),
    "my.csv": "question,answer\n" + "Say it.,It.\n" * 30,
    "questions.txt": "Why?\n",
    "prompt.txt": "Rate {response} from 1 to 10.",
    "answers.json": '[{"instruction": "Say it.", "output": "It.", "model_response": "It."}]',
    "judge.gguf": "",
}


class Command(NamedTuple):
    """A command line of a page."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """Its words, without the variables before them and what the shell does after them."""
        words = shlex.split(self.line.rstrip("&"), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        for pattern, word in PLACEHOLDERS.items():
            words = [re.sub(pattern, word, each) for each in words]
        if "torchrun" in words:
            words = ["python", *words[words.index("train.py") :]]
        return words[: words.index("<")] if "<" in words else words

    @property
    def program(self) -> str:
        """`train`, `evaluate`, `export`, the module after `-m`, or the first word."""
        words = self.words
        if not re.fullmatch(r"(.*/)?python[\d.]*", words[0]):
            return words[0]
        return words[2].removeprefix("instruct_lm.") if words[1] == "-m" else words[1].removesuffix(".py")

    @property
    def arguments(self) -> list[str]:
        """What follows the program."""
        return self.words[3 if self.words[1] == "-m" else 2 :]


def commands_of(text: str) -> Iterator[str]:
    """The command lines of a page."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if kind in ("bash", "sh", "shell", "console") or (not kind and any(map(begins_a_command, lines))):
            for line in lines:
                yield from re.split(r" && ", line.removeprefix("$ "))
    for span in re.findall(r"`((?:\.venv/bin/)?python (?:train\.py|evaluate\.py|-m instruct_lm\.)[^`]*)`", text):
        if "…" not in span and not re.fullmatch(r"\S+ -m \S+", span):  # that names a module
            yield " ".join(span.split())


def begins_a_command(line: str) -> bool:
    return re.match(r"(\$ )?(\S*python[\d.]*|make|git|pip|ollama|torchrun|llama-server|vllm) ", line) is not None


LINES = list(
    dict.fromkeys(
        Command(str(page.relative_to(ROOT)), line)
        for page in PAGES
        for line in commands_of(page.read_text(encoding="utf-8"))
    )
)
OURS = [each for each in LINES if each.program not in ("make", *OTHER_PROGRAMS)]
OURS = list({shlex.join(each.words): each for each in OURS}.values())  # each once, wherever it stands
RUN = [each for each in OURS if not any(re.search(pattern, each.line) for pattern in NOT_RUN)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `here/`, where the commands run, and a base beside it."""
    folder = tmp_path_factory.mktemp("house")
    here = folder / "here"
    here.mkdir()
    small = ["model=gpt2-tiny", "data=sample", "trainer=debug", "trainer.max_steps=1", "data.limit=40", "lora=r16"]
    silent: Any = SimpleNamespace(readouterr=lambda: SimpleNamespace(err=""))
    for name, main, *arguments in (
        ("train", train.main, *small, "generation.max_new_tokens=2", "output_dir=run", "device=cpu"),
        ("evaluate", evaluate.main, "run=run", "device=cpu"),
        ("export", export.main, "-m", "run=run", "format=hf,gguf"),
    ):
        with pytest.MonkeyPatch.context() as patch, commands(here, patch, silent) as run:
            assert run(name, *arguments, main=main)[0] == 0
    shutil.move(here / "run" / "export" / "hf", folder / "my-base")
    shutil.move(next((here / "run" / "export" / "gguf").glob("*.gguf")), here / "my-base.gguf")
    shutil.rmtree(here / "run" / "export")
    for name, text in MADE.items():
        (here / name).write_text(text)
    return folder


@pytest.fixture
def here(house: Path, tmp_path: Path) -> Path:
    """A copy of it, of this test alone."""
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    return tmp_path / "here"


def lay_out(command: Command, here: Path) -> None:
    """Put the run wherever the command reads one, and none where it writes one."""
    for word in command.arguments:
        key, _, value = word.partition("=") if re.match(r"[\w.]+=", word) else ("", "", word)
        if key in ("run", "resume") or not (key or Path(value).suffix):
            for name in value.split(","):
                if name.startswith("outputs/") and not (here / name).exists():
                    shutil.copytree(here / "run", here / name)


def one_job(command: Command) -> list[str]:
    """The arguments with the first value of each sweep alone, those of an experiment's file included."""
    words = [re.sub(r"^([\w.@/]+=[^'\"\[{,]*),.*", r"\1", word) for word in command.arguments]
    for word in command.arguments:
        if word.startswith("experiment="):
            file = yaml.safe_load((CONF / "experiment" / f"{word.partition('=')[2]}.yaml").read_text(encoding="utf-8"))
            params = file.get("hydra", {}).get("sweeper", {}).get("params", {})
            words += [f"{key}={str(values).partition(',')[0]}" for key, values in params.items()]
    return words


def ended_well(command: Command, arguments: list[str], here: Path, patch: Any, capsys: Any, main: Any) -> None:
    """Compose and validate the configuration of a command in `here`, and call `main` with it."""
    lay_out(command, here)
    with commands(here, patch, capsys) as run:
        status, said, _ = run(command.program, *arguments, main=main)
    assert status == 0, f"{command.page}: {command.line}\n{said}"


class Parsed(Exception):
    """The arguments are valid."""


def module_main(name: str) -> Callable[..., Any]:
    """The `main` of `python -m <name>`."""
    package = name if name in ("faults", "benchmarks") else f"instruct_lm.{name}"
    module = importlib.import_module(package)
    return (module if hasattr(module, "main") else importlib.import_module(f"{package}.__main__")).main  # type: ignore[no-any-return]


def test_every_line_is_known() -> None:
    known = {"make", "train", "evaluate", "export", "data", "chat", "report", "faults", "benchmarks", *OTHER_PROGRAMS}
    assert {str(each) for each in LINES if each.program not in known} == set()
    assert len(RUN) > 20  # the pages were read


@pytest.mark.parametrize("command", OURS, ids=lambda command: f"{command.page}: {command.line}")
def test_a_command_is_valid(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command.program in MAINS:
        monkeypatch.setattr(sys, "argv", [command.program, *command.arguments])
        check_arguments(command.program)  # every value of a sweep
        plain = [word for word in one_job(command) if not re.match(r"hydra[./]", word)]
        ended_well(command, plain, here, monkeypatch, capsys, lambda config: None)
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> Any:
        parse(self, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [command.program, *command.arguments])
    with pytest.raises(Parsed):
        module_main(command.program)()


@pytest.mark.parametrize("command", [each for each in LINES if each.program == "make"], ids=lambda each: each.line)
def test_a_target_exists(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    target, *variables = command.words[1:]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for variable in variables:
        name, _, value = variable.partition("=")
        assert f"$({name})" in makefile
        if name in ("BENCH", "FAULTS"):
            module = {"BENCH": "benchmarks", "FAULTS": "faults"}[name]
            line = f"python -m {module} {value}"
            test_a_command_is_valid(Command(command.page, line), Path(), monkeypatch, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.line)
def test_a_command_runs(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command.program not in MAINS:
        lay_out(command, here)
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
        assert module_main(command.program)(command.arguments) == 0, capsys.readouterr().err
        return
    words = command.arguments
    own = any(re.match(r"(run|resume|responses|model)=", word) for word in words)
    data = any(re.match(r"(run|resume|responses|data|data\.source|experiment)=", word) for word in words)
    words = words if own else [*words, "model=gpt2-tiny"]
    words = words if data or command.program == "export" else [*words, "data=sample"]
    for pattern, word in STAND_INS.items():
        words = [re.sub(pattern, word, each) for each in words]
    if not any(word.startswith("resume=") for word in words):
        words += SMALL[command.program].split()
    ended_well(command, words, here, monkeypatch, capsys, MAINS[command.program])
