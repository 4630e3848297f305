"""Random models of transformers with the sizes of `CONFIGS`, and what llama.cpp's converter writes of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import PreTrainedModel

from tests.model.conftest import CONFIGS, ROPE

_NAMES = {
    "transformer.": "", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip


def reference(name: str, **changes: int) -> PreTrainedModel:
    """A random transformers model of the sizes of `CONFIGS[name]`, with changes."""
    c = replace(CONFIGS[name], **changes)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    kind = name.removesuffix("-untied")
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            tie_word_embeddings=c.tied, **tokens,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        title = {"llama3": "Llama", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        rope = ROPE if kind == "llama3" else {"rope_type": "default"}
        config = getattr(transformers, f"{title}Config")(
            vocab_size=c.vocab_size, max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, hidden_size=c.n_embd, intermediate_size=c.inner,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, rope_parameters={**rope, "rope_theta": c.rope_base},
            **({"head_dim": c.head_dim} if c.head_dim else {}), **tokens,
        )  # fmt: skip
        model = getattr(transformers, f"{title}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, Any] | None = None,
    quantise: Callable[[str, np.ndarray], GGMLQuantizationType | None] = lambda name, array: None,
) -> Path:
    """Write a model as llama.cpp's converter does (convert_hf_to_gguf.py); `metadata` is added, None takes a key away."""
    config, kind = model.config, model.config.model_type
    writer = GGUFWriter(path, kind)
    for key, value in (_metadata(model) | (metadata or {})).items():
        if value is not None:
            writer.add_key_value(key, value, _gguf_type(value))
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        if kind == "gpt2" and array.ndim == 2 and ".c_" in name:
            array = array.T
        for heads, part in (
            (config.num_attention_heads, "q_proj"),
            (getattr(config, "num_key_value_heads", 1), "k_proj"),
        ):
            if kind == "llama" and part in name:  # LlamaModel.permute
                array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        for theirs, gguf in _NAMES.items():
            name = name.replace(theirs, gguf)
        name, array = name.replace("h.", "blk.", 1) if name.startswith("h.") else name, np.ascontiguousarray(array)
        if wanted := quantise(name, array):
            writer.add_tensor(name, quants.quantize(array, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, array)
    if kind == "llama" and config.rope_parameters["rope_type"] == "llama3":  # LlamaModel.generate_extra_tensors
        factors = CONFIGS["llama3"].rope_factors
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(model: PreTrainedModel) -> dict[str, Any]:
    config, kind = model.config, model.config.model_type
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if kind == "gpt2":
        values |= {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        values |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters["rope_theta"],
        }
    width = getattr(config, "head_dim", None)
    if width:
        values |= {"attention.key_length": width, "attention.value_length": width}
    if kind == "llama":
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": width}
    return {f"{kind}.{key}": value for key, value in values.items()} | {"general.file_type": 0}


def _gguf_type(value: Any) -> Any:
    from gguf import GGUFValueType

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    return kinds.get(type(value), GGUFValueType.ARRAY)
