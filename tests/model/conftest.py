"""Small models of every architecture."""

import pytest
import torch

from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.rope import llama3_rope_factors

SIZES = {"vocab_size": 101, "block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {
    "n_kv_head": 2,
    "n_inner": 56,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rotary",
    "rope_base": 500.0,
    "activation": "swiglu",
    "bias": False,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 150,
}
"""With heads of width 16 and base 500: some frequencies stay, some are interpolated, some are divided by 8."""

LLAMA3 = {"head_dim": 16, "rope_factors": llama3_rope_factors(16, 500.0, *list(ROPE.values())[1:]), "tied": False}
VARIANTS = {
    "gpt2": {},
    "gpt2-untied": {"tied": False},
    "llama": LLAMA,
    "llama3": LLAMA | LLAMA3,
    "qwen2": LLAMA | {"qkv_bias": True},
    "qwen2-untied": LLAMA | {"qkv_bias": True, "tied": False},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 12},
}
CONFIGS = {name: GPTConfig(**SIZES, **variant) for name, variant in VARIANTS.items()}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose parameters are all random and large enough that every one matters."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    """A random model of each variant in turn."""
    return random_model(CONFIGS[request.param])
