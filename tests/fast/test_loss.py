"""The chunked head and loss, and the shared gradient, against torch's own cross entropy and autograd."""

import copy

import pytest
import torch
from torch.nn import functional as F

from instruct_lm.fast import accelerate
from instruct_lm.fast import loss as loss_module
from instruct_lm.fast.loss import linear_cross_entropy
from instruct_lm.model.gpt import GPT


def inputs(m: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, 16, generator=generator, requires_grad=True)
    head = torch.randn(37, 16, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, 37, (m,), generator=generator), torch.rand(m, generator=generator)


@pytest.mark.parametrize("m", [0, 1, 4, 5, 23])
def test_value_and_gradients_equal_the_full_logits(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "targets_at_once", lambda *_: 5)
    monkeypatch.setattr(loss_module, "SOFTMAX_ROWS", 2)
    hidden, head, targets, weights = inputs(m)
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    grads = torch.autograd.grad((expected * weights).sum() * 0.7, (hidden, head))
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(total, (expected * weights).sum())
    (total * 0.7).backward()
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(head.grad, grads[1])


def test_a_hand_computation() -> None:
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 5.0]])
    total, nll = linear_cross_entropy(hidden, head, torch.tensor([1]), torch.tensor([3.0]))
    assert nll.item() == pytest.approx(0.126928, abs=1e-6)  # log(1 + e^-2)
    assert total.item() == pytest.approx(0.380784, abs=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, weights = inputs(7)
    head.requires_grad_(False)
    linear_cross_entropy(hidden, head, targets, weights)[0].backward()
    assert head.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("part", [1, 5, 36, 37, 100])
def test_a_small_head_is_widened_part_by_part_to_the_same(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "HEAD_PART", part)
    hidden, head, targets, weights = inputs(7)
    small = head.detach().bfloat16()
    expected, nll = linear_cross_entropy(hidden, small.float(), targets, weights)
    (grad,) = torch.autograd.grad(expected, hidden)
    total, small_nll = linear_cross_entropy(hidden, small, targets, weights)
    torch.testing.assert_close(small_nll, nll)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], grad)


@pytest.mark.parametrize("at_once", [4, 9])  # in one piece, the head's copy lies where its gradient will be
def test_autocast_computes_logits_in_its_dtype_and_the_loss_in_fp32(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(loss_module, "targets_at_once", lambda *_: at_once)
    monkeypatch.setattr(loss_module, "SOFTMAX_ROWS", 3)
    monkeypatch.setattr(loss_module, "GRADIENT_PART", 10)
    monkeypatch.setattr(loss_module, "HEAD_PART", 15)
    hidden, head, targets, weights = inputs(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, head, targets, weights)
    total.backward()
    expected = F.cross_entropy((hidden.bfloat16() @ head.bfloat16().T).float(), targets, reduction="none")
    assert total.dtype == torch.float32
    assert head.grad.dtype == torch.float32
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(
        (hidden, head), torch.autograd.grad((expected * weights).sum(), (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs, rtol=0.02, atol=0.02)  # bf16 has 8 bits; gradients are up to 3


def test_large_logits_stay_finite() -> None:
    hidden, head, targets, weights = inputs(6)
    total, _ = linear_cross_entropy(hidden * 1e4, head, targets, weights)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(hidden.grad).all()


def test_head_and_embedding_add_to_one_gradient(model: GPT) -> None:
    plain, fast = model, copy.deepcopy(model)
    accelerate(fast)
    ids = [torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for net in (plain, fast):
        for micro_batch in ids:  # of one step
            hidden, targets = net.hidden_states(micro_batch[:, :-1]).flatten(0, 1), micro_batch[:, 1:].flatten()
            linear_cross_entropy(hidden, net.head_weight, targets, torch.full((len(targets),), 0.1))[0].backward()
        assert net.wte.weight.grad is not None
    for (name, theirs), ours in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_without_gradients_nothing_is_written(model: GPT) -> None:
    accelerate(model)
    with torch.no_grad():
        ids = torch.randint(0, 101, (2, 9))
        linear_cross_entropy(model.hidden_states(ids).flatten(0, 1), model.head_weight, ids.flatten(), torch.ones(18))
    assert model.wte.weight.grad is None
