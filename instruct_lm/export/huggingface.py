"""Export to Hugging Face's layout, which transformers and this project (`model.weights=FOLDER`) read.

The tokenizer is the base model's.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from instruct_lm.errors import InputError
from instruct_lm.io.files import replacing, write_json
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import LAYOUTS, pieces_of


def hub_config(config: GPTConfig) -> dict[str, Any]:
    """The content of transformers' `config.json` for a model.

    Raises:
        InputError: The model is a mixture of choices that is neither GPT-2 nor Llama.
    """
    choices = (config.norm, config.position, config.activation, config.bias)
    common: dict[str, Any] = {"vocab_size": config.vocab_size, "bos_token_id": None, "eos_token_id": None}
    common |= {"tie_word_embeddings": True, "torch_dtype": "float32"}
    if choices == ("layernorm", "learned", "gelu", True):
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.inner,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
        }
    if choices == ("rmsnorm", "rotary", "swiglu", False):
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": config.block_size,
            "hidden_size": config.n_embd,
            "intermediate_size": config.inner,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base,
            "hidden_act": "silu",
        }
    raise InputError(f"model.norm, position, activation and bias are {choices}, which is neither GPT-2 nor Llama")


def save_pretrained(model: GPT, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, each atomically.

    Args:
        model: A model without adapters; its weights are written as float32.
        folder: The destination, which is created if it does not exist.

    Raises:
        InputError: As for `hub_config`.
    """
    config = hub_config(model.config)
    pieces = pieces_of(model, LAYOUTS[config["model_type"]])
    tensors = {piece.name: piece.values.to(torch.float32).reshape(piece.shape).contiguous() for piece in pieces}
    with replacing(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_json(config, folder / "config.json")
