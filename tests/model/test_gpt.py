"""The transformer against its own padded, uncached, uncompressed form."""

import pytest
import torch

from instruct_lm.model.gpt import GPT, GPTConfig
from tests.model.conftest import CONFIGS


def test_a_token_sees_nothing_that_follows(model: GPT) -> None:
    ids = torch.randint(0, 101, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 101
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).gt(1e-3).all()


def test_cached_equals_uncached(model: GPT) -> None:
    ids = torch.randint(0, 101, (3, 24))
    lengths = torch.tensor([9, 5, 13])  # rows of different lengths, right-padded
    cache = model.new_cache(3, 24)
    with torch.no_grad():
        expected = model.hidden_states(ids)
        model.hidden_states(ids[:, :13], cache=cache)
        cache.lengths += lengths
        for step in range(10):
            at = lengths + step
            hidden = model.decode(ids[torch.arange(3), at], cache)
            torch.testing.assert_close(hidden, expected[torch.arange(3), at], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient(model: GPT) -> None:
    ids = torch.randint(0, 101, (2, 10))
    grads = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        model.zero_grad()
        model(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    "wrong", [{"n_head": 5}, {"n_kv_head": 5}, {"norm": "batchnorm"}, {"position": "none"}, {"activation": "relu"}]
)
def test_impossible_configurations_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        GPTConfig(**wrong)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ((12, 12, 768), 124_439_808),
        ((24, 16, 1024), 354_823_168),
        ((36, 20, 1280), 774_030_080),
        ((48, 25, 1600), 1_557_611_200),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(sizes: tuple[int, int, int], parameters: int) -> None:
    n_layer, n_head, n_embd = sizes
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_new_model_has_gpt2s_start() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=501, block_size=64, n_layer=2, n_head=2, n_embd=64))
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    for name, std in stds.items():
        assert std == pytest.approx(0.01 if name.endswith("proj.weight") else 0.02, rel=0.05), (
            name
        )  # 0.02 / sqrt(2 * 2)
    assert model.h[0].ln_1.weight.eq(1).all()
    assert model.h[0].attn.qkv.bias.eq(0).all()
    assert torch.equal(GPT(model.config).init_weights(7).wte.weight, GPT(model.config).init_weights(7).wte.weight)
    with torch.device("meta"):
        assert GPT(model.config).wte.weight.is_meta


def test_every_layer_is_torchs_own() -> None:
    kinds = {type(module) for config in CONFIGS.values() for module in GPT(config).modules()}
    own = {kind.__name__ for kind in kinds if kind.__module__.startswith("instruct_lm")}
    assert own == {"GPT", "Block", "CausalSelfAttention", "MLP"}
