"""The adapter alone, which PEFT adds to the base."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruct_lm.config import LoraConfig
from instruct_lm.data.prompts import ALPACA
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.export.peft import adapter_config, write_adapter
from instruct_lm.model.gpt import GPT
from instruct_lm.model.lora import TARGETS, adapter_state, add_lora, merge_lora
from instruct_lm.respond import Responder
from tests.model.conftest import CONFIGS, ROPE, random_model

peft = pytest.importorskip("peft", reason="peft is not installed")
BYTES = load_tokenizer("bytes")


def lora(rank: int = 4, alpha: float = 8.0, targets: tuple[str, ...] = TARGETS) -> LoraConfig:
    return LoraConfig(rank=rank, alpha=alpha, dropout=0.0, targets=list(targets), base_dtype="float32")


def model(name: str) -> GPT:
    return random_model(dataclasses.replace(CONFIGS[name], vocab_size=257))


def adapted(name: str, settings: LoraConfig) -> GPT:
    """The model with adapters that are all random."""
    made = add_lora(model(name), settings.rank, settings.alpha, targets=settings.targets)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(made).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return made


def write(made: GPT, settings: LoraConfig, folder: Path, dtype: str = "f32", base: str | None = None) -> None:
    with torch.device("meta"):
        sizes = GPT(made.config)
    write_adapter(Responder(sizes, BYTES, ALPACA), adapter_state(made), settings, folder, dtype, base)


@pytest.mark.parametrize(
    "settings",
    [
        lora(),
        lora(1, 1.0, ("attn.qkv",)),
        lora(3, 12.0, ("attn.proj", "mlp.fc")),
        lora(2, 0.5, ("mlp.proj",)),
        lora(8, 0.0),
    ],
    ids=lambda settings: f"r{settings.rank}-{'+'.join(settings.targets)}",
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "qwen2", "qwen3"])
def test_peft_gives_the_merged_models_logits(name: str, settings: LoraConfig, tmp_path: Path) -> None:
    save_pretrained(model(name), BYTES, tmp_path / "base", ROPE)
    made = adapted(name, settings)
    write(made, settings, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = theirs(ids).logits
        tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        merged = merge_lora(made)(ids)
        torch.testing.assert_close(tuned(ids).logits, merged, rtol=1e-5, atol=1e-5)
        assert bool((plain - merged).abs().max() < 1e-5) == (settings.alpha == 0)
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (settings.rank, settings.alpha, None)
    # Exactly what is in the file was adapted, and nothing was left as PEFT had made it.
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(tuned)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in stored)


def test_its_folder_has_the_tokenizer_the_template_and_the_settings(tmp_path: Path) -> None:
    write(adapted("llama", lora()), lora(), tmp_path, dtype="bf16")
    names = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False).endswith("tion:\nHi.")
    assert {x.dtype for x in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:Qwen/Qwen3-0.6B@main", ("Qwen/Qwen3-0.6B", "main")),
        ("hf:Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None)),
        ("hf:Qwen/Qwen3-0.6B@refs/pr/3", ("Qwen/Qwen3-0.6B", "refs/pr/3")),
        ("/home/me/secret/base", (None, None)),
        ("pypi:x==1/y.gguf", (None, None)),
        ("hf:owner/repo@main/model.gguf", (None, None)),
        (None, (None, None)),
    ],
)
def test_only_a_repository_of_the_hub_is_named_as_the_base(
    source: str | None, expected: tuple[str | None, str | None]
) -> None:
    config = adapter_config(CONFIGS["llama"], lora(), source)
    assert (config["base_model_name_or_path"], config["revision"]) == expected
    assert "secret" not in json.dumps(config)


def test_adapters_of_another_shape_are_refused(tmp_path: Path) -> None:
    made = adapted("llama", lora(rank=4))
    with pytest.raises(
        InputError, match=r"16 tensors differ:\nh\.0\.attn\.qkv\.lora_a: the checkpoint has \(4, 32\), .*\(8, 32\)"
    ):
        write(made, lora(rank=8), tmp_path / "out")
    with pytest.raises(InputError, match=r"h\.0\.attn\.proj\.lora_a: .*the configuration none"):
        write(made, lora(rank=4, targets=("attn.qkv",)), tmp_path / "out")


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    made = adapted("llama", lora())
    adapter_state(made)["h.1.mlp.fc.lora_b"][3, 1] = float("nan")
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.mlp\.gate_proj\.lora_B\.weight holds numbers that are not finite"
    ):
        write(made, lora(), tmp_path)
