"""The model card: valid metadata, what the run's folder says, nothing invented, and no text that breaks out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.config import ExportConfig, TrainConfig
from instruct_lm.data.prompts import ALPACA
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.export.card import model_card, public_source
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.io.records import write_record
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder
from tests.run_commands import typed

SECRET = "/home/jane/secret"
BYTES = load_tokenizer("bytes")
MODEL = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=1, n_embd=8))
RESPONDER = Responder(MODEL, BYTES, ALPACA, 8)
SUMMARY = {
    "entries": {"train": 935, "test": 110, "validation": 55},
    "prompt_loss_weight": 1.0,
    "epochs": 2,
    "steps": 234,
    "seconds": 235.4,
    "peak_memory_gb": 3.23,
    "before": {"val/loss": 2.713, "val/response_loss": 2.1},
    "after": {"val/loss": 0.53, "val/response_loss": 0.74},
}
SCORES = {
    **{"n": 110, "mean": 51.25, "ci95": [45.5, 57.0], "exact_match": 0.25, "chrf": 60.5, "rouge_l": 61.5},
    "judge": {"kind": "ollama", "model": "llama3"},
}


def card(folder: Path, *overrides: str, name: str = "run", **files: Any) -> str:
    """The card of a run whose folder has these JSON files."""
    for path, content in files.items():
        file = folder / f"{path}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_record(content, file)
    train: TrainConfig = typed("train", "model=gpt2-tiny", *overrides)
    config: ExportConfig = typed("export", "model=gpt2-tiny", *(o for o in overrides if not o.startswith("data")))
    return model_card(name, config, "f32", RESPONDER, folder, (folder, train))


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_it_says_what_the_runs_folder_says(tmp_path: Path) -> None:
    sources = ("model.weights=hf:Qwen/Qwen3-0.6B@main", "data.source=hf:datasets/me/mine@main/a.json")
    files = {
        "summary": SUMMARY,
        "made_from": {"data": {"source": "x", "sha256": "ab" * 32}},
        "evaluation/test/summary": SCORES,
        "evaluation/test-untuned/summary": SCORES | {"mean": 7.5},
        "evaluation/test-last/summary": SCORES | {"mean": 99.5},
    }
    text = card(tmp_path, *sources, **files)
    assert metadata(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["instruct-lm"],
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["me/mine"],
    }
    assert "- Data: `hf:datasets/me/mine@main/a.json`, sha256 `" + "ab" * 32 + "`" in text
    assert "- Entries: 935 train, 110 test, 55 validation" in text
    assert "- Validation loss, responses alone: 2.1 before training, 0.74 at its end" in text
    assert "| test | 110 | llama3 | 51.25 | 45.5 to 57 | 0.25 | 60.5 | 61.5 |" in text
    assert "| test, before training | 110 | llama3 | 7.5 |" in text
    assert "99.5" not in text  # of the other checkpoint
    assert "not recorded" not in text.replace("sha256 not recorded", "")  # the base's hash
    assert ALPACA.default_system in text


def test_a_score_says_how_many_entries_it_is_of_and_no_path_of_its_judge(tmp_path: Path) -> None:
    for model in (f"{SECRET}/llama3", r"C:\Users\jane\llama3"):
        scores = SCORES | {"scored": 90, "judge": {"kind": "openai", "model": model}}
        text = card(tmp_path, **{"evaluation/test/summary": scores})
        assert "| test | 110, 90 scored | llama3 | 51.25 |" in text
    scores |= {"scored": 110, "judge": {"kind": "openai", "model": "meta/llama3"}}
    assert "| test | 110 | meta/llama3 |" in card(tmp_path, **{"evaluation/test/summary": scores})


@pytest.mark.parametrize(
    ("weights", "base"),
    [
        ("hf:a/b@1a2b", '"a/b", revision="1a2b"'),
        ("hf:a/b", '"a/b"'),
        ("hf:a/b-GGUF@main/q8.gguf", '"base"'),
        ("/home/x/base", '"base"'),
    ],
)
def test_the_adapters_code_names_a_base_that_transformers_loads(tmp_path: Path, weights: str, base: str) -> None:
    config = typed("export", "model=gpt2-tiny", f"model.weights={weights}").model_copy(update={"format": "peft"})
    text = model_card("run", config, "f32", RESPONDER, tmp_path, None)
    assert f"base = AutoModelForCausalLM.from_pretrained({base})\n" in text


def test_the_prompt_is_shown_with_its_end_token(tmp_path: Path) -> None:
    assert "### Response:\n{response}<|endoftext|>\n```" in card(tmp_path)


def test_what_is_missing_is_said_to_be_missing(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "- Base model: random weights, sha256 not recorded" in text
    assert "- Epochs: not recorded, steps: not recorded" in text
    assert "not recorded before training, not recorded at its end" in text
    assert "has no evaluation of this checkpoint" in text
    assert "base_model" not in metadata(text)
    assert "license" not in metadata(text)


@pytest.mark.parametrize("content", ["{", "[1]", '{"epochs": 3}'])
def test_damaged_files_count_as_missing(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    assert "- Epochs: not recorded" in card(tmp_path)
    assert "- Epochs: not recorded" in card(tmp_path, summary={"entries": None, "before": [], "after": 3})


def test_paths_and_passwords_stay_here(tmp_path: Path) -> None:
    text = card(tmp_path, f"data.source={SECRET}/mine.json", f"model.weights={SECRET}/bases/tuned")
    assert SECRET not in text
    assert "jane" not in text
    assert "`mine.json` (local)" in text
    assert "`tuned` (local)" in text
    assert public_source("https://jane:pw@host/a/b.gguf?token=pw#pw") == "`https://host/a/b.gguf`"


@given(
    name=st.text(max_size=40) | st.sampled_from(["a\n---\nx: 1", "`` ` ```", "# h", "[x](y)", "<b>", "a: |\n b", "|x|"])
)
def test_no_name_breaks_out(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    scores = SCORES | {"judge": {"kind": "ollama", "model": name}}
    text = card(
        folder,
        f"data.source={json.dumps('hf:datasets/a/b@main/' + 'x.json')}",
        name=name,
        **{"evaluation/test/summary": scores},
    )
    parsed = ModelCard(text)
    assert parsed.data.to_dict() == metadata(text)
    headings = [line for line in text.split("\n") if line.startswith("#")]
    inside = [line for line in headings if line.startswith("### ")]  # the prompt's own, in its block
    assert [line for line in headings if line not in inside][1:] == [
        *("## Use", "## Prompt", "## Training", "## Evaluation", "## Intended use and limits"),
    ]
    row = next(line for line in text.split("\n") if line.startswith("| test"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 9
    assert not re.search(r"(?<!\\)<", text.split("## Use")[0].split("---\n")[2])


@pytest.mark.parametrize(("format", "library"), [("hf", "transformers"), ("gguf", "gguf"), ("ollama", "gguf")])
def test_a_base_has_a_short_one(tmp_path: Path, format: str, library: str) -> None:
    (tmp_path / "model.gguf").touch()
    config = typed("export", "model=gpt2-tiny", f"format={format}")
    text = model_card("gpt2-tiny", config, "f16", RESPONDER, tmp_path, None)
    assert metadata(text)["library_name"] == library
    assert "## Training" not in text
    assert "random weights, as it was" in text
    assert ("llama-server -m model.gguf" in text) == (format == "gguf")


def test_its_code_runs_when_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(MODEL, BYTES, tmp_path, style=ALPACA)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)\n```", card(tmp_path), re.DOTALL)
    assert code is not None
    exec(compile(code[1].replace("model=folder)", "model=folder, max_new_tokens=4)"), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
