import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from instruct_lm.model.rope import llama3_rope_factors, make_rope

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("head_dim", [12, 64, 128])
@pytest.mark.parametrize("base", [777.0, 1e4, 5e5])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "llama3", **LLAMA3}])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_the_angles_are_those_of_transformers_at_far_positions_too(head_dim, base, rope, dtype, rounding):
    # A frequency that is off by one rounding turns by 2e-4 too much at position 4000, which shows in the logits.
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters={**rope, "rope_theta": base}
    )
    positions = torch.arange(4096)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
    factors = llama3_rope_factors(head_dim, base, *list(rope.values())[1:]) if len(rope) > 1 else None
    ours = make_rope(positions, head_dim, base, factors, dtype)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(mine[:, :, 0], theirs[..., : head_dim // 2], atol=rounding, rtol=0)
