"""Export to Hugging Face's layout, which transformers and this project (`model.weights=FOLDER`) read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.io.files import replacing, write_json
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import LAYOUTS, pieces_of

# Attributes of `GPTConfig` → their keys in the `config.json` of GPT-2 and of Llama; empty where it has none.
_KEYS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "kv_heads": ("", "num_key_value_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "inner": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "rope_base": ("", "rope_theta"),
}
_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
_COMMON = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True, "torch_dtype": "float32"}


def hub_config(config: GPTConfig) -> dict[str, Any]:
    """The content of transformers' `config.json` for a model.

    Raises:
        InputError: The model is a mixture of choices that is neither GPT-2 nor Llama.
    """
    choices = (config.norm, config.position, config.activation, config.bias)
    if choices == ("layernorm", "learned", "gelu", True):
        architecture, column = _GPT2, 0
    elif choices == ("rmsnorm", "rotary", "swiglu", False):
        architecture, column = _LLAMA, 1
    else:
        raise InputError(f"model.norm, position, activation and bias are {choices}, which is neither GPT-2 nor Llama")
    sizes = {keys[column]: getattr(config, name) for name, keys in _KEYS.items() if keys[column]}
    return architecture | sizes | _COMMON


def save_pretrained(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer's files, each atomically.

    Args:
        model: A model without adapters; its weights are written as float32.
        tokenizer: The model's; its stop tokens end an answer in transformers' `generate` too.
        folder: The destination, which is created if it does not exist.

    Raises:
        InputError: As for `hub_config`.
    """
    config = hub_config(model.config)
    pieces = pieces_of(model, LAYOUTS[config["model_type"]])
    tensors = {piece.name: piece.values.to(torch.float32).reshape(piece.shape).contiguous() for piece in pieces}
    with replacing(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    files = tokenizer.hub_files()
    files["config.json"] = config | files["generation_config.json"]
    for name, content in files.items():
        write_json(content, folder / name)
