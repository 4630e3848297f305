"""An exported model against transformers, which reads it."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.model.description import describe
from instruct_lm.model.gpt import GPT
from instruct_lm.model.lora import add_lora, merge_lora
from instruct_lm.model.pretrained import load_pretrained
from tests.conftest import ROOT
from tests.model.conftest import ROPE


def test_transformers_reads_it_and_so_do_we(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, ROPE)
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)
        torch.testing.assert_close(load_pretrained(model.config, tmp_path)(ids), model(ids), rtol=0, atol=0)
        described = describe(tmp_path)
        assert described is not None
        torch.testing.assert_close(load_pretrained(described, tmp_path)(ids), model(ids), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_merged_adapters_are_in_it(model: GPT, tmp_path: Path) -> None:
    add_lora(model, rank=3, alpha=6.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    with torch.no_grad():
        adapted = model(ids)
        save_pretrained(merge_lora(model), tmp_path, ROPE)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(ids).logits, adapted, rtol=1e-3, atol=1e-3)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instruct_lm.export", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
