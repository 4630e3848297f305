"""A base that transformers saved, from training to export and back, through the commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from instruct_lm.commands import build, export
from instruct_lm.commands.check_config import make_config
from instruct_lm.commands.runs import checkpoint_path, load_run_config, taken_from_run
from instruct_lm.config import ExportConfig
from instruct_lm.io.fetcher import Fetcher
from tests.model.references import reference, write_gguf
from tests.run_commands import commands, composed

SETTINGS = (
    *("model=auto", "model.tokenizer=bytes", "data=sample", "data.limit=60", "data.batch_size=4"),
    *("trainer.max_steps=3", "trainer.progress=false", "generation.max_new_tokens=8"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_a_folder_of_transformers_is_trained_evaluated_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with commands(tmp_path, monkeypatch, capsys) as command:
        check_round_trip(tmp_path, command, name)


def check_round_trip(tmp_path: Path, command: Any, name: str) -> None:
    theirs = reference(name, vocab_size=257, block_size=512)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    weights = tmp_path / "base"
    if name == "qwen2":  # a GGUF file, with adapters
        weights = write_gguf(tmp_path / "base.gguf", theirs)
    lora = ("lora=r16",) if name == "qwen2" else ()
    train_on = [f"model.weights={weights}", *SETTINGS, *lora, "output_dir=run"]
    assert command("train", *train_on, main=train.main)[0] == 0
    config = load_run_config(tmp_path / "run")
    assert config.model.is_complete
    assert config.model.name == "base"
    if not lora:  # the run explains itself, also without its base
        (tmp_path / "base").rename(tmp_path / "moved")
    assert command("evaluate", "run=run", "judge=reference", main=evaluate.main)[0] == 0
    summary = json.loads((tmp_path / "run" / "evaluation" / "test" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["n"], summary["model"]) == (6, "base")
    if not lora:
        (tmp_path / "moved").rename(tmp_path / "base")
    values = composed("export", f"output_dir={tmp_path / 'out'}") | {"run": str(tmp_path / "run")}
    export.main(taken_from_run(make_config(ExportConfig, values, combinations=False), []))
    tuned = build.load_trained(config, checkpoint_path(tmp_path / "run", "best"), Fetcher(None, offline=True))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 257, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, tuned(ids), rtol=0, atol=1e-4)
    train_on = [f"model.weights={tmp_path / 'out'}", *SETTINGS, "output_dir=again"]
    assert command("train", *train_on, main=train.main)[0] == 0
