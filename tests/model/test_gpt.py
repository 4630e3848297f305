"""The transformer against its own padded, uncached, uncompressed form."""

import dataclasses
import math

import pytest
import torch

from instruct_lm.model.gpt import GPT, GPTConfig
from tests.model.conftest import CONFIGS, random_model


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
        cache.extend(13)
        model.hidden_states(ids[:, :13], cache=cache)
        cache.lengths = lengths.tolist()
        for step in range(10):
            at = lengths + step
            hidden = model.decode(ids[torch.arange(3), at], cache)
            torch.testing.assert_close(hidden, expected[torch.arange(3), at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(model: GPT, dropout: float) -> None:
    model = random_model(dataclasses.replace(model.config, dropout=dropout))
    ids = torch.randint(0, 101, (2, 10))
    grads = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        model.zero_grad()
        torch.manual_seed(3)  # of dropout; what is computed again drops the same
        model(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(("flag", "training", "passes"), [(False, True, 1), (True, True, 2), (True, False, 1)])
def test_activation_checkpointing_computes_each_block_again(flag: bool, training: bool, passes: int) -> None:
    model = random_model(CONFIGS["gpt2"]).train(training)
    model.activation_checkpointing = flag
    blocks: list[int] = []
    for block in model.h:
        block.register_forward_pre_hook(lambda block, _: blocks.append(block.attn.layer))
    model(torch.randint(0, 101, (2, 10))).square().mean().backward()
    assert sorted(blocks) == sorted([*range(len(model.h))] * passes)


def assert_dropped(kept: torch.Tensor, whole: torch.Tensor, p: float) -> None:
    """Each element is either 0 or the whole one scaled by 1 / (1 − p), the former in a share p of cases."""
    dropped = kept == 0
    torch.testing.assert_close(kept[~dropped], whole[~dropped] / (1 - p))
    share, error = dropped.double().mean().item(), math.sqrt(p * (1 - p) / kept.numel())
    assert abs(share - p) < 5 * error


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_acts_on_embeddings_attention_and_both_branches_in_training_alone(name: str) -> None:
    p = 0.25
    model = random_model(dataclasses.replace(CONFIGS[name], dropout=p))
    torch.manual_seed(0)
    block, ids, x = model.h[0], torch.randint(0, 101, (40, 20)), torch.randn(2000, 1, 32)
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(2):
        model(ids)
        model.eval()
    model.train()
    assert_dropped(*seen, p)  # embeddings: the first block's input

    # A token that is alone sees itself with weight 1, or nothing: a head gives its value, scaled, or 0.
    attn = block.attn
    heads = attn.project(x, None)
    values = heads[:, 0, attn.n_head + attn.n_kv_head :].repeat_interleave(attn.n_head // attn.n_kv_head, 1)
    attended = attn.attend(heads).view(values.shape)
    assert (attended.eq(0).all(-1) == attended.eq(0).any(-1)).all()  # heads as a whole
    assert_dropped(attended[..., 0], values[..., 0], p)
    torch.testing.assert_close(attn.eval().attend(heads).view(values.shape), values)

    branches: list[tuple[torch.Tensor, torch.Tensor]] = []
    block.dropout.register_forward_hook(lambda _, args, out: branches.append((args[0], out)))
    y = block.train()(x)
    for whole, kept in branches:
        assert_dropped(kept, whole, p)
    assert len(branches) == 2
    torch.testing.assert_close(y, x + branches[0][1] + branches[1][1])


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
    model = GPT(GPTConfig(vocab_size=501, block_size=64, n_layer=3, n_head=2, n_embd=64))
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    for name, std in stds.items():  # three blocks: 2 n, n + 2 and 2 ** n differ
        expected = 0.02 / math.sqrt(6) if name.endswith("proj.weight") else 0.02
        assert std == pytest.approx(expected, rel=0.05), name
    assert model.h[0].ln_1.weight.eq(1).all()
    assert model.h[0].attn.qkv.bias.eq(0).all()
    assert torch.equal(GPT(model.config).init_weights(7).wte.weight, GPT(model.config).init_weights(7).wte.weight)
    with torch.device("meta"):
        assert GPT(model.config).wte.weight.is_meta


def test_every_layer_is_torchs_own() -> None:
    kinds = {type(module) for config in CONFIGS.values() for module in GPT(config).modules()}
    own = {kind.__name__ for kind in kinds if kind.__module__.startswith("instruct_lm")}
    assert own == {"GPT", "Block", "CausalSelfAttention", "MLP"}
