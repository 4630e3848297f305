"""`config.json` of transformers 4 and 5: what is computed, what is refused by key and value, and what it means to be silent."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from instruct_lm.errors import InputError
from instruct_lm.model.gpt import GPTConfig
from instruct_lm.model.hub_config import hub_config, read_hub_config, rope_parameters
from instruct_lm.model.rope import llama3_rope_factors
from tests.model.conftest import CONFIGS, ROPE

# As on the hub, written by transformers 4.
LLAMA_32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip
QWEN_3 = QWEN_25 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
BASES = {"gpt2": GPT2, "llama": LLAMA_32, "qwen2": QWEN_25, "qwen3": QWEN_3}
_ABSENT = object()


def read(folder: Path, values: Any, **changes: Any) -> GPTConfig:
    path = folder / "config.json"
    values = {key: value for key, value in {**values, **changes}.items() if value is not _ABSENT}
    path.write_text(json.dumps(values), encoding="utf-8")
    return read_hub_config(path)


def test_files_of_the_hub(tmp_path: Path) -> None:
    assert read(tmp_path, GPT2) == GPTConfig()
    llama = read(tmp_path, LLAMA_32)
    assert (llama.n_layer, llama.n_head, llama.n_kv_head, llama.n_embd, llama.inner) == (16, 32, 8, 2048, 8192)
    assert (llama.block_size, llama.head_width, llama.rope_base, llama.tied) == (131072, 64, 500000.0, True)
    assert llama.rope_factors is not None
    assert (llama.rope_factors[0], llama.rope_factors[-1], len(llama.rope_factors)) == (1.0, 32.0, 32)
    qwen = read(tmp_path, QWEN_25)
    assert (qwen.qkv_bias, qwen.bias, qwen.qk_norm, qwen.head_width, qwen.norm_eps) == (True, False, False, 64, 1e-6)
    qwen = read(tmp_path, QWEN_3)
    assert (qwen.qkv_bias, qwen.qk_norm, qwen.head_width) == (False, True, 128)


@pytest.mark.parametrize("kind", BASES)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(tmp_path: Path, kind: str) -> None:
    optional = (
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "layer_norm_epsilon",
    )
    absent: dict[str, Any] = dict.fromkeys(optional, _ABSENT) | {"rope_scaling": None, "hidden_size": 4096}
    absent |= {"num_attention_heads": 32} if kind != "gpt2" else {"hidden_size": _ABSENT}
    config = read(tmp_path, BASES[kind], **absent)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.tied == theirs.tie_word_embeddings
    assert config.kv_heads == getattr(theirs, "num_key_value_heads", config.n_head)
    assert config.head_width == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.norm_eps == (theirs.layer_norm_epsilon if kind == "gpt2" else theirs.rms_norm_eps)
    if kind != "gpt2":
        assert config.rope_base == theirs.rope_parameters["rope_theta"]


def test_transformers_4_and_5_say_the_same(tmp_path: Path) -> None:
    rope = LLAMA_32["rope_scaling"]
    new = {"rope_scaling": _ABSENT, "rope_theta": _ABSENT, "rope_parameters": {**rope, "rope_theta": 500000.0}}
    old = read(tmp_path, LLAMA_32)
    assert read(tmp_path, LLAMA_32, **new, torch_dtype=_ABSENT, dtype="bfloat16") == old
    typed = {key: value for key, value in rope.items() if key != "rope_type"} | {"type": "llama3"}
    assert read(tmp_path, LLAMA_32, rope_scaling=typed) == old
    plain = replace(old, rope_factors=None)
    assert read(tmp_path, LLAMA_32, rope_scaling=None) == plain
    assert read(tmp_path, LLAMA_32, rope_scaling={"rope_type": "default"}) == plain


@pytest.mark.parametrize(
    ("kind", "changes", "part"),
    [
        ("gpt2", {"model_type": "gemma2"}, "model_type=gemma2 is an architecture that is not computed here"),
        ("llama", {"model_type": "mistral", "sliding_window": 4096}, "model_type=mistral"),
        ("qwen2", {"model_type": "qwen2_moe"}, "model_type=qwen2_moe"),
        ("llama", {"model_type": "mixtral"}, "model_type=mixtral"),
        ("gpt2", {"model_type": _ABSENT}, "model_type=None"),
        ("gpt2", {"activation_function": "relu"}, 'activation_function="relu"; computed is "gelu_new"'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true; computed is false"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false; computed is true"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ("llama", {"attention_bias": True}, "attention_bias=true; computed is false"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true; computed is false"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}'),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type="linear"'),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic"'),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type="yarn"'),
        ("qwen2", {"rope_scaling": {"mrope_section": [1, 2, 3], "type": "mrope"}}, 'rope_type="mrope"'),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "factor=2.0 of the rotary positions"),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling=\[1\]"),
        ("llama", {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {**ROPE, "attention_factor": 2.0}}, "attention_factor=2.0"),
        ("llama", {"rope_scaling": {**ROPE, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs numbers for .*low_freq_factor"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true; computed is false"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*computed is full_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("qwen2", {"use_mrope": True}, "use_mrope=true"),
        ("llama", {"no_one_knows_this": 3}, "no_one_knows_this=3\nTake another base.*may be deleted"),
        ("llama", {"hidden_size": _ABSENT}, "has no hidden_size"),
        ("llama", {"hidden_size": None}, "describes no model that can be computed: hidden_size=None"),
        ("llama", {"hidden_size": "2048"}, "hidden_size='2048': must be a valid integer"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be less than"),  # would take hours
        ("gpt2", {"n_layer": -2}, "n_layer=-2: must be greater than or equal to 1"),
        ("gpt2", {"n_head": 0}, "n_head=0: must be"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan: must be a finite number"),
        ("qwen2", {"num_key_value_heads": 0}, "num_key_value_heads=0: must be"),
        ("qwen2", {"rope_theta": -1.0}, "rope_theta=-1.0: must be greater than 0"),
        ("qwen2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be a valid boolean"),
        ("qwen3", {"layer_types": 5}, "layer_types=5; computed is full_attention"),
        ("llama", {"rope_scaling": {**ROPE, "factor": 10**400}}, "llama3 needs numbers for factor"),
        ("llama", {"num_key_value_heads": 5}, "n_kv_head=5: each must be a multiple of the next"),
        ("llama", {"head_dim": 63, "rope_scaling": None}, "rotary positions need an even width"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_key_and_value(
    tmp_path: Path, kind: str, changes: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=rf"(?s)config\.json.*{part}"):
        read(tmp_path, BASES[kind], **changes)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_null_and_false_switch_nothing_on(tmp_path: Path, kind: str, value: Any) -> None:
    assert read(tmp_path, BASES[kind], some_new_feature=value) == read(tmp_path, BASES[kind])


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json .*fetch it anew"):
        read_hub_config(path)


@pytest.mark.parametrize("rope", [ROPE, LLAMA_32["rope_scaling"], ROPE | {"low_freq_factor": 0.5, "factor": 2.5}])
def test_llama3_factors_are_the_divisors_of_transformers(rope: dict[str, Any]) -> None:
    numbers = [
        rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ]
    config = transformers.LlamaConfig(head_dim=32, rope_parameters={**rope, "rope_theta": 7000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = 7000.0 ** (-torch.arange(0, 32, 2) / 32)
    factors = llama3_rope_factors(32, 7000.0, *numbers)
    assert len({round(factor, 3) for factor in factors}) > 2  # not only 1 and factor
    torch.testing.assert_close(plain / torch.tensor(factors), scaled)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    values = hub_config(config, ROPE)
    (tmp_path / "config.json").write_text(json.dumps(values))
    back = read_hub_config(tmp_path / "config.json")
    assert back == replace(config, n_kv_head=back.n_kv_head, head_dim=back.head_dim, n_inner=back.n_inner)
    assert (back.kv_heads, back.head_width, back.inner) == (config.kv_heads, config.head_width, config.inner)


def test_rope_factors_without_their_parameters_cannot_be_written() -> None:
    for config, rope in (
        (CONFIGS["llama3"], ROPE | {"factor": 9.0}),
        (replace(CONFIGS["llama3"], rope_factors=(1.0, 3.0, 2.0) + (8.0,) * 5), None),
        (replace(CONFIGS["llama3"], rope_factors=(8.0,) * 8), None),
    ):
        with pytest.raises(InputError, match=r"model\.rope_factors=\[.*no such parameters give them"):
            hub_config(config, rope)
    for unknown in (None, {"rope_type": "default"}):  # the parameters are found
        assert hub_config(CONFIGS["llama3"], unknown)["rope_scaling"] == ROPE
    assert hub_config(CONFIGS["llama3"], rope_parameters({"rope_parameters": ROPE}))["rope_scaling"] == ROPE
    assert math.isclose(hub_config(CONFIGS["llama3"], ROPE)["rope_theta"], 500.0)


def test_a_mixture_has_no_name_in_transformers() -> None:
    with pytest.raises(InputError, match=r"model\.norm=rmsnorm, position=learned.*none of gpt2, llama, qwen2, qwen3"):
        hub_config(GPTConfig(norm="rmsnorm"))
    with pytest.raises(InputError, match="n_kv_head=6"):
        hub_config(GPTConfig(n_kv_head=6))
