"""The hub's `config.json` ↔ `GPTConfig`. A value that is not computed is refused, never ignored.

Keys and defaults are those of transformers 4 and 5 (`configuration_gpt2.py`, `…_llama.py`, `…_qwen2.py`, `…_qwen3.py`).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError, listing
from instruct_lm.model.architectures import architecture_of, check_supported, make_gpt_config
from instruct_lm.model.gpt import GPTConfig
from instruct_lm.model.rope import LLAMA3_PARAMETERS, find_llama3_parameters, llama3_rope_factors

CONFIG_NAME = "config.json"

# Key of `config.json` → field of `GPTConfig`, and the property that has its value where the field is None.
_Sizes = dict[str, tuple[str, str]]
_GPT2_SIZES: _Sizes = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_positions": ("block_size", "block_size"),
    "n_layer": ("n_layer", "n_layer"),
    "n_head": ("n_head", "n_head"),
    "n_embd": ("n_embd", "n_embd"),
    "n_inner": ("n_inner", "inner"),
    "layer_norm_epsilon": ("norm_eps", "norm_eps"),
    "tie_word_embeddings": ("tied", "tied"),
}
_LLAMA_SIZES: _Sizes = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "max_position_embeddings": ("block_size", "block_size"),
    "num_hidden_layers": ("n_layer", "n_layer"),
    "num_attention_heads": ("n_head", "n_head"),
    "num_key_value_heads": ("n_kv_head", "kv_heads"),
    "head_dim": ("head_dim", "head_width"),
    "hidden_size": ("n_embd", "n_embd"),
    "intermediate_size": ("n_inner", "inner"),
    "rms_norm_eps": ("norm_eps", "norm_eps"),
    "tie_word_embeddings": ("tied", "tied"),
}
_SIZES = {"gpt2": _GPT2_SIZES, "llama": _LLAMA_SIZES, "qwen2": _LLAMA_SIZES, "qwen3": _LLAMA_SIZES}

# What a missing key means to transformers; other sizes must be there.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": _LLAMA_DEFAULTS,
    "qwen2": _LLAMA_DEFAULTS | {"num_key_value_heads": 32},
    "qwen3": _LLAMA_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
}

# Keys that could change the computation → the values that we compute.
_GPT2_COMPUTED: dict[str, tuple[Any, ...]] = {
    "architectures": (["GPT2LMHeadModel"], None),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
_LLAMA_COMPUTED: dict[str, tuple[Any, ...]] = {
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
}
_QWEN_COMPUTED = _LLAMA_COMPUTED | {"use_sliding_window": (False,)}
_COMPUTED = {
    "gpt2": _GPT2_COMPUTED,
    "llama": _LLAMA_COMPUTED,
    "qwen2": _QWEN_COMPUTED | {"architectures": (["Qwen2ForCausalLM"], None)},
    "qwen3": _QWEN_COMPUTED | {"architectures": (["Qwen3ForCausalLM"], None)},
}

# Keys that change nothing between token ids and logits: training, generation, tokens, dtypes, other heads, tools.
_IRRELEVANT = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout",
    "attn_implementation", "attn_pdrop", "bos_token_id", "cache_implementation", "decoder_start_token_id",
    "do_sample", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "max_length", "model_type",
    "n_ctx", "name_or_path", "output_past", "pad_token_id", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "resid_pdrop", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
_UNUSED_WINDOW = {"sliding_window", "max_window_layers"}  # Qwen's, as long as use_sliding_window is false
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}


def read_hub_config(path: Path) -> GPTConfig:
    """What a `config.json` says of its model.

    Raises:
        InputError: The file is no JSON object, a size is missing, or a key has a value that is not computed here; the
            message lists such keys with their values.
    """
    values = _load(path)
    kind = check_supported(values.get("model_type"), "model_type", str(path))
    if faults := list(_faults(values, kind)):
        remedy = (
            "Take another base. A key that changes nothing between token ids and logits may be deleted from the file."
        )
        raise InputError("\n".join([f"{path} asks for what is not computed here:", *listing(faults), remedy]))
    given = _DEFAULTS[kind] | values
    if missing := [key for key in _SIZES[kind] if key not in given]:
        raise InputError(f"{path} has no {', '.join(missing)}: take the base's own {CONFIG_NAME}.")
    sizes = {field: given[key] for key, (field, _) in _SIZES[kind].items()}
    rope = rope_parameters(values) if kind != "gpt2" else {}
    sizes["rope_base"] = rope.get("rope_theta", 10000.0)
    keys = {field: key for key, (field, _) in _SIZES[kind].items()} | {"rope_base": "rope_theta"}
    config = make_gpt_config(kind, sizes, str(path), keys)
    if rope.get("rope_type") != "llama3":
        return config
    try:
        factors = llama3_rope_factors(
            config.head_width, config.rope_base, *(float(rope[key]) for key in LLAMA3_PARAMETERS)
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path}: rope_type=llama3 needs numbers for {', '.join(LLAMA3_PARAMETERS)} ({error!r})."
        ) from error
    return make_gpt_config(kind, sizes | {"rope_factors": factors}, str(path), keys)


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch it anew.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object but {_shown(values)}: fetch it anew.")
    return values


def _faults(values: dict[str, Any], kind: str) -> Iterator[str]:
    """Each key whose value we do not compute, with the value. Null and false of an unknown key switch nothing on."""
    known = _IRRELEVANT | _SIZES[kind].keys() | (_ROPE if kind != "gpt2" else set())
    if "use_sliding_window" in _COMPUTED[kind]:
        known |= _UNUSED_WINDOW
    for key, value in values.items():
        if key in (computed := _COMPUTED[kind]):
            if value not in computed[key]:
                yield f"{key}={_shown(value)}; computed is {_shown(computed[key][0])}"
        elif key == "layer_types":
            if value is not None and (not isinstance(value, list) or {*map(str, value)} - {"full_attention"}):
                yield f"{key}={_shown(value)}; computed is full_attention in every layer"
        elif key not in known and value is not None and value is not False and value not in ([], {}):
            yield f"{key}={_shown(value)}"
    if kind != "gpt2":
        yield from _rope_faults(values)


def _rope_faults(values: dict[str, Any]) -> Iterator[str]:
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    if strange := {key: value for key, value in given.items() if not isinstance(value, dict)}:
        yield from (f"{key}={_shown(value)}, which is no object" for key, value in strange.items())
        return
    rope = rope_parameters(values)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope_type={_shown(rope['rope_type'])}; computed are default and llama3"
    elif rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        yield "partial_rotary_factor other than 1"
    else:
        known = {"rope_theta", "rope_type", *(LLAMA3_PARAMETERS if rope["rope_type"] == "llama3" else ())}
        yield from (f"{key}={_shown(rope[key])} of the rotary positions" for key in rope if key not in known)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def read_rope_parameters(path: Path) -> dict[str, Any] | None:
    """The `rope_parameters` of a `config.json`; None if there is no such file."""
    return rope_parameters(_load(path)) if path.is_file() else None


def rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of a `config.json` as transformers 5 names them: `rope_type`, `rope_theta` and more.

    Transformers 4 has the base in ``rope_theta`` and the rest in ``rope_scaling``, old files the type in ``type``.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return rope


def hub_config(config: GPTConfig, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of transformers' `config.json` for a model, as both transformers 4 and 5 read it.

    Args:
        config: The model's sizes and choices.
        rope: The base's own `rope_parameters`, for a model with ``rope_factors``; None: they are found.

    Raises:
        InputError: No architecture has such choices, or no parameters give the ``rope_factors``.
    """
    kind = architecture_of(config)
    values: dict[str, Any] = {"model_type": kind, "architectures": _COMPUTED[kind]["architectures"][0]}
    values |= {key: getattr(config, name) for key, (_, name) in _SIZES[kind].items()}
    values |= {"bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32"}
    if kind == "gpt2":
        return values | {"activation_function": "gelu_new"}
    values |= {"hidden_act": "silu", "rope_theta": config.rope_base}
    if config.rope_factors is None:
        return values
    scaling = {key: value for key, value in (rope or {}).items() if key != "rope_theta"}
    if scaling.get("rope_type") != "llama3":
        found = find_llama3_parameters(config.head_width, config.rope_base, config.rope_factors)
        scaling = {"rope_type": "llama3", **(found or {})}
    known = all(key in scaling for key in LLAMA3_PARAMETERS)
    parameters = [scaling[key] for key in LLAMA3_PARAMETERS] if known else []
    made = llama3_rope_factors(config.head_width, config.rope_base, *parameters) if known else ()
    close = (math.isclose(x, y, rel_tol=1e-5) for x, y in zip(made, config.rope_factors, strict=False))
    if len(made) != len(config.rope_factors) or not all(close):
        raise InputError(
            f"model.rope_factors={list(config.rope_factors[:3])}…: config.json can state them only as the parameters "
            "of rope_type=llama3, and no such parameters give them: format=gguf states any factors."
        )
    return values | {"rope_scaling": scaling}
