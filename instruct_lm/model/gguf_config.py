"""The metadata of a GGUF file ↔ `GPTConfig`. A value that is not computed is refused, never ignored.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's `gguf-py/gguf/constants.py`.
"""

from typing import Any

import numpy as np

from instruct_lm.errors import InputError, listing
from instruct_lm.io.gguf import GGUFHeader
from instruct_lm.model.architectures import architecture_of, check_supported, make_gpt_config
from instruct_lm.model.gpt import GPTConfig

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Keys after the architecture's name → fields of `GPTConfig`.
_SIZES = {
    "context_length": "block_size",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_dim",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_base",
}
_NORM = (("attention.layer_norm_rms_epsilon",), ("attention.layer_norm_epsilon",))  # RMSNorm's; GPT-2's
_NORM_KEYS = tuple(key for keys in _NORM for key in keys)
_REQUIRED = ("context_length", "block_count", "attention.head_count", "embedding_length", "feed_forward_length")


def read_gguf_config(header: GGUFHeader) -> GPTConfig:
    """What a GGUF file says of its model.

    Raises:
        InputError: A size is missing, or a key has a value that is not computed here; the message lists such keys.
    """
    place, metadata, tensors = str(header.path), header.metadata, header.tensors
    kind = check_supported(metadata.get("general.architecture"), "general.architecture", place)
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(f"{place} is a part of {metadata['split.count']}: join them with llama-gguf-split --merge.")
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    missing = [f"{kind}.{key}" for key in (*_REQUIRED, *_NORM[kind == "gpt2"]) if key not in own]
    missing += [] if EMBEDDING in tensors else [f"tensor {EMBEDDING}"]
    if missing:
        raise InputError(f"{place} has no {', '.join(missing)}: take another file of this base.")
    header.check()
    sizes = {field: own[key] for key, field in _SIZES.items() if key in own}
    if isinstance(sizes["norm_eps"], float):
        sizes["norm_eps"] = float(str(np.float32(sizes["norm_eps"])))  # 1e-5 is stored as the float32 9.99999974e-06
    sizes |= {"vocab_size": (*tensors[EMBEDDING].shape, 0)[0], "tied": HEAD not in tensors}
    keys = {field: f"{kind}.{key}" for key, field in _SIZES.items() if key in own}
    config = make_gpt_config(kind, sizes, place, keys)
    if faults := _faults(own, config):
        lines = [f"{kind}.{key}={value}" for key, value in faults.items()]
        summary = f"{place} asks for what is not computed here; take another base:"
        raise InputError("\n".join([summary, *listing(lines)]))
    if ROPE_FACTORS in tensors and (factors := header.read(ROPE_FACTORS).tolist()) != [1.0] * len(factors):
        return make_gpt_config(kind, sizes | {"rope_factors": factors}, place, keys)
    return config


def gguf_metadata(config: GPTConfig) -> dict[str, Any]:
    """What a GGUF file says of a model: key → value, as llama.cpp's converter writes them.

    Its rotary factors are no metadata, but the tensor `ROPE_FACTORS`.

    Raises:
        InputError: No architecture that llama.cpp computes has these choices.
    """
    kind = architecture_of(config)
    if config.rope_factors is not None and kind != "llama":
        raise InputError(f"model.rope_factors: llama.cpp computes them for llama, not for {kind}. Use format=hf.")
    sizes = {key: getattr(config, field) for key, field in _SIZES.items() if not key.startswith(("rope.", *_NORM_KEYS))}
    sizes |= {
        "feed_forward_length": config.inner,
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
    }
    sizes[_NORM[kind == "gpt2"][0]] = config.norm_eps
    if config.position == "rotary":
        sizes |= {"rope.dimension_count": config.head_width, "rope.freq_base": config.rope_base}
    known = {f"{kind}.{key}": value for key, value in sizes.items() if value is not None}  # None: llama.cpp's default
    return {"general.architecture": kind} | known


def _faults(own: dict[str, Any], config: GPTConfig) -> dict[str, Any]:
    """The architecture's own keys whose values we do not compute."""
    computed = {
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_width,
        "rope.dimension_count": config.head_width,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scale_linear": 1.0,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.sliding_window": 0,
        "tensor_data_layout": own.get("tensor_data_layout"),  # says that llama's q and k are interleaved
    }
    values = {key: value for key, value in own.items() if key not in _SIZES}
    return {k: v for k, v in values.items() if (v != computed[k] if k in computed else v is not False)}
