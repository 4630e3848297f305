"""The texts "How to add" of `CONTRIBUTING.md`, followed in a copy: one model, judge, prompt style, metric and format."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

JUDGE = '''"""A judge of lengths."""

from collections.abc import Mapping
from typing import Any

from instruct_lm.evaluation.judges.base import Judge, Verdict


class LengthJudge(Judge):
    """Scores with 100 what is as long as the reference."""

    def __init__(self, **options: Any) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """The kind."""
        return {"kind": "length"}

    def check(self) -> None:
        """Nothing to check."""

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """100 or 0."""
        return Verdict(100.0 * (len(response) == len(entry["output"])))

    def close(self) -> None:
        """Nothing to release."""
'''
STYLE = """PLAIN = PlainStyle("plain", user="Q: ", input_lead=" ", user_end="", header=" A: ")

STYLES"""
METRIC = '''def longest(response: str, reference: str) -> float:
    """100 for an answer that is not shorter."""
    return 100.0 * (len(response) >= len(reference))


class Metric'''
LINES = """def _pipes(stream: BinaryIO, path: Path, gzipped: bool) -> Iterator[tuple[str, Any]]:
    for line in stream.read().decode().splitlines()[1:]:
        yield "", dict(zip(("instruction", "output"), line.split(" -> "), strict=True))


_BINARY = {b"PIPES": _pipes, """

# Kind → file → what is replaced by what there; None: the file is new.
EDITS: dict[str, dict[str, list[tuple[str | None, str]]]] = {
    "A model": {
        "conf/model/qwen3-4b.yaml": [
            (None, "defaults: [auto, _self_]\nname: qwen3-4b\nweights: hf:Qwen/Qwen3-4B@main\n")
        ]
    },
    "A judge": {
        "instruct_lm/evaluation/judges/length.py": [(None, JUDGE)],
        "instruct_lm/evaluation/judges/factory.py": [
            ("\n\nJUDGES", "\nfrom instruct_lm.evaluation.judges.length import LengthJudge\n\nJUDGES"),
            ('    "llamacpp": LlamaCppJudge,\n', '    "llamacpp": LlamaCppJudge,\n    "length": LengthJudge,\n'),
        ],
        "instruct_lm/config.py": [('"llamacpp", "none"]', '"llamacpp", "length", "none"]')],
        "conf/judge/length.yaml": [(None, "defaults: [none, _self_]\nkind: length\n")],
    },
    "A prompt style": {
        "instruct_lm/data/prompts.py": [("STYLES =", f"{STYLE} ="), ("PHI3, CHATML)}", "PHI3, CHATML, PLAIN)}")],
        "instruct_lm/config.py": [('"chatml", "template"]', '"chatml", "plain", "template"]')],
        "conf/prompt/plain.yaml": [(None, "style: plain\n")],
    },
    "A metric": {
        "instruct_lm/evaluation/metrics.py": [
            ("class Metric", METRIC),
            ("METRICS = {", 'METRICS = {\n    "longest": Metric("not shorter", longest),'),
        ],
        "instruct_lm/evaluation/score_file.py": [("    rouge_l: float\n", "    rouge_l: float\n    longest: float\n")],
    },
    "A data format": {
        "instruct_lm/data/shapes.py": [
            ("SHAPES = (", 'SHAPES = (\n    Shape("notes", ("instruction", "response"), ()),')
        ],
        "instruct_lm/data/files.py": [("_BINARY = {", LINES)],
    },
}

# Runs in the copy.
CHECK = """
import sys
from pathlib import Path
from instruct_lm.commands.help_text import help_keys

from instruct_lm.data.files import read_records
from instruct_lm.data.prompts import get_style
from instruct_lm.data.shapes import recognise
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.evaluation.judges.factory import make_judge
from instruct_lm.evaluation.scoring import describe_summary, score_responses, summarise
from tests.run_commands import typed

folder = Path(sys.argv[1])
assert typed("train", "model=qwen3-4b").model.weights == "hf:Qwen/Qwen3-4B@main"
config = typed("evaluate", "prompt=plain", "judge=length")
assert get_style(config.prompt.style, load_tokenizer("bytes")).header == " A: "
for words in ("qwen3-4b", "plain", "length"):
    assert words in help_keys("evaluate"), words

judge = make_judge(config.judge.kind, model=config.judge.model, timeout=config.judge.timeout)
entries = [{"instruction": "Count.", "output": "one", "model_response": text} for text in ("two", "eight", "a")]
scored = score_responses(entries, judge, folder / "scores.jsonl")
assert [(item.score, item.longest) for item in scored] == [(100, 100), (0, 100), (0, 0)]
summary = summarise(scored, judge.describe())
assert abs(summary["longest"] - 200 / 3) < 1e-9 and "not shorter 66.7" in describe_summary(summary)

(folder / "data.pipes").write_text("PIPES\\nCount. -> one\\n")
((_, record),) = read_records(folder / "data.pipes")
assert record == {"instruction": "Count.", "output": "one"}
assert recognise(("instruction", "response"), {}).shape.name == "notes"
"""
AGREE = "two_places or table_of_groups"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all edits made."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("instruct_lm", "conf", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.html", "*.png"))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for files in EDITS.values():
        for name, edits in files.items():
            for old, new in edits:
                text = "" if old is None else (folder / name).read_text(encoding="utf-8")
                assert old is None or text.count(old) >= 1, f"{name}: {old}"
                head, _, tail = text.partition(old) if old else ("", "", "")
                (folder / name).write_text(head + new + tail, encoding="utf-8")
    for page in [*folder.glob("*.md"), *folder.glob("docs/*.md")]:  # step "Its name in the row … of the table"
        text = page.read_text(encoding="utf-8")
        for group, name in {"model": "qwen3-4b", "judge": "length", "prompt": "plain"}.items():
            text = re.sub(rf"(?m)^(\| `{group}`( \(.*?\))? \| )`", rf"\1`{name}`, `", text)
        page.write_text(text, encoding="utf-8")
    return folder


def paragraph(kind: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## How to add")[2]
    [found] = re.findall(rf"\*\*{kind}\.\*\*(.*?)(?=\n\*\*|\Z)", text, re.DOTALL)
    return str(found)


@pytest.mark.parametrize("kind", EDITS)
def test_the_text_names_each_file(kind: str) -> None:
    named = set(re.findall(r"`([\w<>./-]+\.(?:py|yaml|md))`", paragraph(kind)))
    for file in EDITS[kind]:
        new = re.sub(r"[^/]+(\.\w+)$", r"<*>\1", file)  # `conf/model/<name>.yaml`
        assert file in named or any(re.sub(r"<\w+>", "<*>", name) == new for name in named), file


def test_every_file_that_a_text_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## How to add")[2]
    names = set(re.findall(r"`((?:\w+/)+[\w./-]+)`", text))
    assert {name for name in names if not (ROOT / name).exists()} == set()


def in_the_copy(copy: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_was_added_works(copy: Path, tmp_path: Path) -> None:
    in_the_copy(copy, "-c", CHECK, str(tmp_path))


def test_the_checks_of_agreement_pass(copy: Path) -> None:
    in_the_copy(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "tests/test_config.py", "-k", AGREE
    )
