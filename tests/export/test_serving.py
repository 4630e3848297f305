"""A run from training to llama.cpp's OpenAI-compatible server: plain requests, and `evaluate.py` with it as the judge."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evaluate
import train
from instruct_lm.commands import build, export
from instruct_lm.commands.runs import checkpoint_path, load_run_config
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.pieces import extract_response
from instruct_lm.data.prompts import ALPACA
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.gguf_config import read_gguf_config
from instruct_lm.model.pretrained import load_pretrained
from instruct_lm.respond import Responder
from tests.conftest import ROOT
from tests.export.llama_server import LlamaServer, served
from tests.run_commands import commands, typed

SETTINGS = (
    *("model=gpt2-tiny", "data.source=entries.json", "data.train_fraction=0.5", "data.test_fraction=0.45"),
    *("trainer.max_epochs=3", "trainer.progress=false", "optimizer.lr=3e-3", "generation.max_new_tokens=16"),
)


def sums(n: int = 120) -> list[dict[str, str]]:
    """Half of them with an input."""
    return [
        {"instruction": "Add them.", "input": f"{i}, {i + 3}", "output": f"It is {2 * i + 3}."}
        if i % 2
        else {"instruction": f"Add {i} and {i + 3}.", "input": "", "output": f"It is {2 * i + 3}."}
        for i in range(n)
    ]


MAINS = {"train": train.main, "evaluate": evaluate.main, "export": export.main}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command in this process: exit status and what it says."""
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield lambda name, *args: run(name, *args, main=MAINS[name])[:2]


def chat(server: LlamaServer, entry: dict[str, str], **body: Any) -> str:
    """The response to a plain request, as docs/serving.md shows it; the file itself says temperature 0."""
    content = entry["instruction"] + (ALPACA.input_lead + entry["input"] if entry["input"] else "")
    reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
    return extract_response(reply["choices"][0]["message"]["content"], ALPACA)


@pytest.mark.slow
def test_a_run_is_served_and_judges(tmp_path: Path, command: Any) -> None:
    (tmp_path / "entries.json").write_text(json.dumps(sums()), encoding="utf-8")
    for name, *args in (
        ("train", *SETTINGS, "output_dir=run"),
        ("export", "run=run", "format=gguf"),
        ("export", "run=run", "format=ollama", "dtype=q8_0"),
    ):
        status, said = command(name, *args)
        assert status == 0, said
    assert sorted(path.name for path in (tmp_path / "run" / "export" / "ollama").iterdir()) == [
        *("Modelfile", "README.md", "contents.json", "run-q8_0.gguf")
    ]
    config = load_run_config(tmp_path / "run")
    fetcher = Fetcher(None, offline=True)
    model = build.load_trained(config, checkpoint_path(tmp_path / "run", "best"), fetcher)
    responder = build.build_responder(config, model, build.build_tokenizer(config.model, fetcher))
    entries = sums()[60:110]
    ours = [
        answer.text for answer in responder.answer([Conversation.of(e["instruction"], e["input"]) for e in entries])
    ]
    assert len(set(ours)) > 3

    with served(tmp_path / "run" / "export" / "gguf" / "run-f32.gguf") as server:
        assert [chat(server, entry, max_tokens=16) for entry in entries] == ours

        answers = [{**entry, "model_response": text} for entry, text in zip(entries, ours, strict=True)]
        (tmp_path / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        judge = ["judge=openai", f"judge.base_url={server.address}/v1", "judge.model=run", "judge.api_key_env=null"]
        # Its replies are constrained to the JSON that the judge asks for, so that even this model's are scores.
        said = command("evaluate", "responses=answers.json", *judge, "output_dir=judged")[1]
        summary = json.loads((tmp_path / "judged" / "summary.json").read_text(encoding="utf-8"))
    assert "Traceback" not in said
    assert (summary["n"], summary["scored"] + summary["failed"], summary["judge"]["kind"]) == (50, 50, "openai")
    lines = (tmp_path / "judged" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line).get("raw") for line in lines]
    assert len(replies) == 50
    assert all(replies), said  # each was asked, and the server answered


@pytest.mark.slow
def test_the_answers_of_smollm2_are_ours(smollm2_gguf: Path, tmp_path: Path, command: Any) -> None:
    """Untuned, its quantised weights written as float32."""
    status, said = command("export", "model=smollm2-135m", "format=gguf", "output_dir=out")
    assert status == 0, said
    tokenizer, config = load_tokenizer(smollm2_gguf), read_gguf_config(read_gguf(smollm2_gguf))
    responder = Responder(load_pretrained(config, smollm2_gguf), tokenizer, ALPACA, max_new_tokens=8)
    entries = json.loads((ROOT / "instruct_lm" / "data" / "sample.json").read_text(encoding="utf-8"))[:4]
    with served(tmp_path / "out" / "smollm2-135m-f32.gguf") as server:
        made = [chat(server, entry, max_tokens=8) for entry in entries]
    ours = responder.answer([Conversation.of(entry["instruction"], entry["input"]) for entry in entries])
    assert made == [answer.text for answer in ours]


def test_the_commands_of_the_docs_are_accepted() -> None:
    text = re.sub(r"<[\w.]+>", "x", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    found = re.findall(r"^python (?:-m instruct_lm\.)?(export|evaluate)(?:\.py)? (.*)$", text, re.MULTILINE)
    assert {name for name, _ in found} == {"export", "evaluate"}
    for name, arguments in found:
        config = typed(name, *shlex.split(arguments, comments=True))
        assert "x" in str(config.run) or config.run is None
    [python] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(python)
