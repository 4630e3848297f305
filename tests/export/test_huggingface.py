"""An exported model against transformers, which reads it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.model.description import describe
from instruct_lm.model.generation import generate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora, merge_lora
from instruct_lm.model.pretrained import load_pretrained
from tests.conftest import ROOT
from tests.data.hub_tokenizers import HOSTILE, KINDS, train, write_folder, write_gguf
from tests.model.conftest import ROPE, random_model

BYTES = load_tokenizer("bytes")
SMALL = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}


def test_transformers_reads_it_and_so_do_we(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, BYTES, tmp_path, ROPE)
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)
        described = describe(tmp_path)
        assert described is not None
        torch.testing.assert_close(load_pretrained(described, tmp_path)(ids), model(ids), rtol=0, atol=0)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.fixture(params=["bytes", "gpt2", *KINDS])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """One of each kind: `bytes`, GPT-2's merges, tokenizer.json (also from GGUF: those of SmolLM2 and Qwen2)."""
    if request.param == "bytes":
        return BYTES
    made = train("gpt-2" if request.param == "gpt2" else request.param)
    if request.param == "gpt2":
        merges = [" ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
        (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        return load_tokenizer(tmp_path / "merges.txt")
    if request.param in ("smollm", "qwen2"):
        return load_tokenizer(write_gguf(tmp_path / "model.gguf", made, request.param))
    config = KINDS[request.param].settings | {"chat_template": "{{ messages }}"}
    return load_tokenizer(write_folder(tmp_path / "base", made, tokenizer_config=config))


def test_its_tokenizer_is_transformers_and_ours(tokenizer: Tokenizer, tmp_path: Path, shared_dir: Path) -> None:
    save_pretrained(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL)), tokenizer, tmp_path / "out")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    entries = json.loads((shared_dir / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    texts = [*HOSTILE, *(text for entry in entries for text in entry.values())]
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    assert theirs(texts)["input_ids"] == [bos + tokenizer.encode_special(text) for text in texts]
    plain = [tokenizer.encode(text) for text in texts]
    assert [again.encode(text) for text in texts] == plain
    assert [theirs.decode(ids) for ids in plain] == [tokenizer.decode(ids) for ids in plain]
    assert theirs.get_added_vocab() == tokenizer.control_tokens
    assert theirs.chat_template == tokenizer.chat_template
    for name in ("vocab_size", "end_of_text", "stop_tokens", "bos", "control_tokens", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)
    named = tokenizer.template_variables
    assert again.template_variables == {"eos_token": theirs.decode([tokenizer.end_of_text]), **named}


@pytest.mark.parametrize(("seed", "end"), [(3, 0), (1, 2)])
def test_generate_stops_where_ours_stops(tmp_path: Path, seed: int, end: int) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", train("smollm"), "smollm"))
    assert tokenizer.stop_tokens == {0, 2}
    model = random_model(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL), seed)
    model.wte.weight.data[[0, 2]] *= 4  # makes them likely; the seed decides which
    save_pretrained(model, tokenizer, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == [0, 2]
    prompts = [[first] for first in range(3, 23)]
    ours = generate(model, prompts, max_new_tokens=20, end_tokens=tokenizer.stop_tokens)
    made = [theirs.generate(torch.tensor([ids]), max_new_tokens=20, pad_token_id=1)[0, 1:].tolist() for ids in prompts]
    assert ours == made
    assert end in {ids[-1] for ids in ours}


def test_merged_adapters_are_in_it(model: GPT, tmp_path: Path) -> None:
    add_lora(model, rank=3, alpha=6.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    with torch.no_grad():
        adapted = model(ids)
        save_pretrained(merge_lora(model), BYTES, tmp_path, ROPE)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(ids).logits, adapted, rtol=1e-3, atol=1e-3)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instruct_lm.export", f"run={tmp_path}", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
