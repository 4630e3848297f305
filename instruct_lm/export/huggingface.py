"""A model in Hugging Face's layout, which transformers and this project (`model.weights=FOLDER`) read.

The tokenizer is the base model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError


def hub_config(config: Any) -> dict[str, Any]:
    """`config.json` of transformers for a `GPTConfig`.

    Raises:
        InputError: a mixture of choices that is neither GPT-2 nor Llama.
    """
    choices = (config.norm, config.position, config.activation, config.bias)
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": True, "torch_dtype": "float32"}
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
            "bos_token_id": None,
            "eos_token_id": None,
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
            "bos_token_id": None,
            "eos_token_id": None,
        }
    raise InputError(
        f"model.norm, position, activation and bias are {choices}: neither GPT-2 nor Llama has these together"
    )


def save_pretrained(model: Any, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all.

    Args:
        model: a `GPT` without adapters.
        folder: where to; made if need be.
    """
    import torch
    from safetensors.torch import save_file

    from instruct_lm.io.files import write_json
    from instruct_lm.model.pretrained import LAYOUTS, pieces_of

    config = hub_config(model.config)
    layout = LAYOUTS[config["model_type"]]
    tensors = {}
    for name, parameter in model.named_parameters():
        start = 0
        for piece in pieces_of(name, parameter.shape, layout, model.config):
            rows = parameter.detach()[start : start + piece.shape[0]].to(torch.float32)
            # the transposition of GPT-2's matrices is its own inverse; the layouts written here have no other
            tensors[piece.name] = (rows if piece.transform is None else piece.transform(rows)).contiguous()
            start += piece.shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / "model.safetensors")
    finally:
        part.unlink(missing_ok=True)
    write_json(config, folder / "config.json")
