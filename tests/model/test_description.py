"""A base's own description: GGUF metadata, agreement with given sizes, and what model=auto takes from it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instruct_lm.config import OPEN, ModelConfig
from instruct_lm.errors import InputError
from instruct_lm.io.conf_files import model_config
from instruct_lm.io.gguf import GGUFHeader, read_gguf
from instruct_lm.model.description import check_agreement, complete, describe, source_name
from instruct_lm.model.gguf_config import read_gguf_config
from instruct_lm.model.gpt import GPTConfig
from tests.model.conftest import CONFIGS
from tests.model.references import reference, write_gguf


def auto(path: Path, **given: Any) -> ModelConfig:
    return model_config("auto").model_copy(update={"weights": str(path), **given})


@pytest.mark.parametrize("form", ["hub", "gguf"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_describes_itself(tmp_path: Path, name: str, form: str) -> None:
    model, config = reference(name), CONFIGS[name]
    path = write_gguf(tmp_path / "model.gguf", model) if form == "gguf" else tmp_path
    model.save_pretrained(tmp_path)
    check_agreement(config, path)
    found = GPTConfig.of(complete(auto(path), path))
    for field in fields(GPTConfig):
        value = getattr(found, field.name)
        assert value == pytest.approx(getattr(config, field.name) or value), field.name


@pytest.mark.parametrize(
    ("name", "metadata", "part"),
    [
        ("llama", {"general.architecture": "gemma2"}, "general.architecture=gemma2 is an architecture that is not"),
        ("llama", {"split.count": 3}, "is a part of 3: join them with llama-gguf-split"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count=8"),
        ("llama", {"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window=4096"),
        ("llama", {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type=linear"),
        ("qwen2", {"qwen2.rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type=yarn"),
        ("llama", {"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor=4.0"),
        ("llama", {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
        ("qwen3", {"qwen3.attention.value_length": 8}, "qwen3.attention.value_length=8"),
        ("llama", {"llama.vocab_size": 100}, "llama.vocab_size=100"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal=False"),
        ("llama", {"llama.logit_scale": 2.0}, "llama.logit_scale=2.0"),
        ("llama", {"llama.block_count": None}, "has no llama.block_count"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
        ("llama", {"llama.feed_forward_length": [56, 64]}, r"llama.feed_forward_length=\[56, 64\]"),
        ("llama", {"llama.block_count": 4 * 10**9}, "llama.block_count=4000000000: must be less than"),
        (
            "llama",
            {"llama.attention.layer_norm_rms_epsilon": "x"},
            "layer_norm_rms_epsilon='x': must be a valid number",
        ),
        ("llama", {"split.count": "x"}, "is a part of x"),
        ("llama", {"general.alignment": 0}, "general.alignment=0"),
    ],
)
def test_metadata_that_is_not_computed_is_refused(
    tmp_path: Path, name: str, metadata: dict[str, Any], part: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", reference(name), metadata)
    with pytest.raises(InputError, match=rf"(?s)model\.gguf.*{part}"):
        describe(path)


def test_metadata_that_switches_nothing_on_is_passed(tmp_path: Path) -> None:
    neutral = {
        "llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.sliding_window": 0,
        "llama.attention.causal": True, "llama.rope.scaling.finetuned": False, "some.tool": 5, "general.type": "model",
    }  # fmt: skip
    assert describe(write_gguf(tmp_path / "model.gguf", reference("llama"), neutral)) is not None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"n_layer": 3, "n_embd": 64}, r"model\.n_layer=3, there 2; model\.n_embd=64, there 32\. Leave them out with"),
        ({"rope_base": 10000.0}, r"model\.rope_base=10000\.0, there 500\.0"),
        ({"rope_factors": None}, r"model\.rope_factors=None, there \(1\.0, "),
        ({"tied": True}, r"model\.tied=True, there False"),
        ({"head_dim": 8, "rope_factors": None}, r"model\.head_dim=8, there 16"),
        ({"block_size": 64}, r"model\.block_size=64, there 48"),
    ],
)
def test_sizes_that_differ_are_named_with_both_values(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    reference("llama3").save_pretrained(tmp_path)
    check_agreement(replace(CONFIGS["llama3"], dropout=0.1, block_size=20), tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match=rf"config\.json describes another model: .*{part}"):
            check_agreement(replace(CONFIGS["llama3"], **changes), path)


def test_learned_positions_are_taken_whole(tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.block_size=20, there 48"):
        complete(auto(tmp_path, block_size=20), tmp_path)


def test_given_values_stay_and_the_rest_comes_from_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "My-Base"
    reference("qwen3").save_pretrained(folder)
    completed = complete(auto(folder), folder)
    assert completed.is_complete
    assert (completed.name, completed.tokenizer, completed.n_layer) == ("My-Base", str(folder), 2)
    given = auto(folder, name="mine", tokenizer="bytes", block_size=20, dropout=0.1)
    completed = complete(given, folder)
    assert (completed.name, completed.tokenizer, completed.block_size) == ("mine", "bytes", 20)
    file = folder / "model.safetensors"
    assert complete(auto(file), file).tokenizer == str(folder)
    with pytest.raises(InputError, match=r"model\.n_layer=3, there 2"):
        complete(auto(folder, n_layer=3), folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json there tells the model's sizes: give the folder"):
        complete(auto(folder), folder)


def test_every_size_is_open_or_has_a_default() -> None:
    defaults = {"n_kv_head", "head_dim", "n_inner", "rope_factors", "dropout"}
    assert {field.name for field in fields(GPTConfig)} == set(OPEN) - {"name", "tokenizer"} | defaults


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("hf:Qwen/Qwen3-0.6B@refs/pr/1", "Qwen3-0.6B"),
        ("hf:a/b@main/model.safetensors", "b"),
        ("hf:a/b@main/B.Q4_1.gguf", "B.Q4_1"),
        ("/models/tuned@2/", "tuned@2"),
        ("/models/tuned/model.safetensors.index.json", "tuned"),
        ("C:\\models\\x.gguf", "x"),
    ],
)
def test_a_base_is_named_after_its_source(source: str, name: str) -> None:
    assert source_name(source) == name


def test_smollm2s_sizes_are_those_of_its_file(smollm2_gguf: Path) -> None:
    check_agreement(GPTConfig.of(model_config("smollm2-135m")), smollm2_gguf)


def test_rope_factors_of_one_are_none(tmp_path: Path) -> None:
    header = read_gguf(write_gguf(tmp_path / "a.gguf", reference("llama3")))
    assert read_gguf_config(header).rope_factors == pytest.approx(CONFIGS["llama3"].rope_factors)

    class Ones(GGUFHeader):
        def read(self, name: str) -> np.ndarray:
            return np.ones(8, dtype=np.float32)

    assert read_gguf_config(Ones(header.path, header.metadata, header.tensors)).rope_factors is None


def test_a_gguf_is_refused_before_anything_is_read_if_a_tensor_cannot_be(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", reference("llama"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(InputError, match=r"model\.gguf: tensor blk\..* ends at byte \d+, the file at \d+"):
        describe(path)
    path.write_bytes(whole)
    tensors = dict(read_gguf(path).tensors)
    for kind, name in ((15, "Q8_K"), (9999, "number 9999")):  # one that gguf does not dequantise, and no type at all
        tensors["blk.0.ffn_up.weight"] = replace(tensors["blk.0.ffn_up.weight"], kind=kind)
        with pytest.raises(InputError, match=rf"ffn_up\.weight is of type {name}, which is not read here. Take a file"):
            read_gguf_config(replace(read_gguf(path), tensors=tensors))


def test_weights_that_are_no_weights_are_refused_with_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter alone: merge it"):
        complete(auto(tmp_path), tmp_path)
    reference("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        complete(auto(tmp_path), tmp_path)
