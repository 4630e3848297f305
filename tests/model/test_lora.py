"""Adapters against the formula, W + alpha / rank · B A, written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from instruct_lm.fast import accelerate
from instruct_lm.fast import linear as fast_linear
from instruct_lm.model.gpt import GPT
from instruct_lm.model.lora import TARGETS, LoRALinear, adapter_state, add_lora, merge_lora

IDS = torch.arange(40).view(2, 20)


def trained(model: GPT) -> GPT:
    """Adapters as they may be after training: none of them 0."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def test_a_layer_is_its_base_plus_a_scaled_product() -> None:
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=8)
    x = torch.randn(3, 5, 6)
    base = layer.linear.weight.clone(), layer.linear.bias.clone()
    assert torch.equal(layer(x), F.linear(x, *base))  # B starts at 0
    nn.init.normal_(layer.lora_b)
    expected = x @ (base[0] + 8 / 2 * layer.lora_b @ layer.lora_a).T + base[1]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", [LoRALinear, fast_linear.FastLoRALinear])
def test_dropout_is_on_the_input_of_the_adapter_in_training_alone(kind: type[LoRALinear]) -> None:
    layer = kind(nn.Linear(200, 4, bias=False), rank=1, alpha=1, dropout=0.25)
    nn.init.zeros_(layer.linear.weight)
    nn.init.ones_(layer.lora_a)
    nn.init.ones_(layer.lora_b)
    torch.manual_seed(0)
    sums = layer(torch.ones(500, 200))[:, 0] * 0.75  # of 200 inputs, those that are left
    torch.testing.assert_close(sums, sums.round(), rtol=0, atol=1e-3)
    assert abs(sums.mean().item() / 200 - 0.75) < 5 * (0.25 * 0.75 / 100_000) ** 0.5
    assert sums.std().item() == pytest.approx((200 * 0.25 * 0.75) ** 0.5, rel=0.2)
    assert layer.eval()(torch.ones(2, 200)).eq(200).all()


def test_adapters_start_as_torchs_linear_layers_do() -> None:
    """Uniform up to 1 / sqrt(in_features), as in the LoRA paper's own code."""
    torch.manual_seed(0)
    start = LoRALinear(nn.Linear(400, 4), rank=16, alpha=1).lora_a
    assert 0.99 / 20 < start.abs().max().item() <= 1 / 20
    assert start.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_training_starts_at_the_pretrained_model(model: GPT) -> None:
    before = model(IDS)
    add_lora(model, rank=3, alpha=6)
    assert torch.equal(model(IDS), before)
    assert len(adapter_state(model)) == 2 * len(TARGETS) * model.config.n_layer


def test_only_adapters_get_gradients(model: GPT) -> None:
    trained(add_lora(model, rank=3, alpha=6, targets=["attn.qkv", "mlp.proj"]))
    model(IDS).square().mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(adapter_state(model))
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in with_gradient} == {"attn.qkv", "mlp.proj"}


def test_merged_equals_unmerged_and_is_a_plain_model(model: GPT) -> None:
    plain = copy.deepcopy(model)
    trained(add_lora(model, rank=3, alpha=6))
    unmerged = model(IDS).detach()
    merge_lora(model)
    torch.testing.assert_close(model(IDS), unmerged, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(plain(IDS), unmerged, atol=1e-2)


def test_adapters_alone_restore_the_model(model: GPT) -> None:
    base = copy.deepcopy(model)
    trained(add_lora(model, rank=3, alpha=6))
    add_lora(base, rank=3, alpha=6)
    result = base.load_state_dict(adapter_state(model), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(base(IDS), model(IDS))


def test_an_unknown_target_is_named(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"attn\.query.*choose among attn\.qkv, attn\.proj, mlp\.fc, mlp\.proj"):
        add_lora(model, rank=3, alpha=6, targets=["attn.query"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_base_in_a_small_dtype_stays_small_until_it_is_merged(model: GPT) -> None:
    exact = copy.deepcopy(model)
    add_lora(model, rank=3, alpha=6, base_dtype=torch.bfloat16)
    trained(model)
    dtypes = {
        name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters() if ".mlp.fc." in name
    }
    assert dtypes["weight"] == torch.bfloat16
    assert dtypes["lora_a"] == dtypes["lora_b"] == torch.float32
    unmerged = model(IDS).detach()
    torch.testing.assert_close(unmerged, trained(add_lora(exact, rank=3, alpha=6))(IDS), rtol=0.1, atol=0.3)
    torch.testing.assert_close(merge_lora(model)(IDS), unmerged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_gradients_through_a_small_base_are_those_of_its_rounded_weights(
    model: GPT, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(fast_linear._wide, "buffer", torch.empty(0))
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16().float()
    trained(add_lora(model, rank=3, alpha=6, base_dtype=torch.bfloat16))
    trained(add_lora(rounded, rank=3, alpha=6))
    if fast:
        accelerate(model)
    with torch.inference_mode():  # as the answers before the first step
        model(IDS)
    losses = []
    for net in (model, rounded):
        hidden = net.hidden_states(IDS)
        losses.append((hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    grads = [{n: p.grad for n, p in net.named_parameters() if p.requires_grad} for net in (model, rounded)]
    assert grads[0]
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, msg=lambda text, name=name: f"{name}: {text}")
