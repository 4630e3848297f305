"""Small models of both architectures."""

import pytest
import torch

from instruct_lm.model.gpt import GPT, GPTConfig

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
CONFIGS = {"gpt2": GPTConfig(**SIZES), "llama": GPTConfig(**SIZES, **LLAMA)}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose parameters are all random and large enough that every one matters."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    """A random model, GPT-2 and Llama-style in turn."""
    return random_model(CONFIGS[request.param])
