"""Gradients kept in place, against autograd's own."""

import copy

import torch

from instruct_lm.fast.gradients import forget_gradients, keep_gradients
from instruct_lm.model.gpt import GPT
from instruct_lm.training.loss import linear_cross_entropy


def backward(model: GPT, ids: torch.Tensor) -> None:
    hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
    targets = ids[:, 1:].flatten()
    linear_cross_entropy(hidden, model.head_weight, targets, torch.full((len(targets),), 0.1))[0].backward()


def test_kept_gradients_equal_autograds_over_steps_and_micro_batches(model: GPT) -> None:
    plain, kept = model, copy.deepcopy(model)
    keep_gradients(kept)
    for parameter in kept.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))  # whatever the memory held must not matter
    for step in range(2):
        plain.zero_grad()
        forget_gradients(kept.parameters())
        for micro_batch in range(3):
            ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(10 * step + micro_batch))
            backward(plain, ids)
            backward(kept, ids)
        for (name, theirs), ours in zip(plain.named_parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_the_memory_stays_where_it_is(model: GPT) -> None:
    keep_gradients(model)
    before = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    assert "wte.weight" in before
    assert "h.0.attn.qkv.weight" in before
    for _ in range(2):
        forget_gradients(model.parameters())
        backward(model, torch.randint(0, 101, (2, 9)))
    assert {name: p.grad.data_ptr() for name, p in model.named_parameters() if name in before} == before


def test_without_gradients_nothing_is_written(model: GPT) -> None:
    keep_gradients(model)
    model.wte.weight.grad.fill_(5.0)
    with torch.no_grad():
        ids = torch.randint(0, 101, (2, 9))
        hidden = model.hidden_states(ids).flatten(0, 1)
        linear_cross_entropy(hidden, model.head_weight, ids.flatten(), torch.ones(18))
    assert model.wte.weight.grad.eq(5.0).all()
