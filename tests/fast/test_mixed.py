"""bf16 on a CPU: against exact arithmetic, torch's own autocast, and fp32."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from instruct_lm.data.batching import Batch, collate
from instruct_lm.fast import accelerate, linear, rounding
from instruct_lm.fast.linear import FastLinear, product
from instruct_lm.fast.loss import chunked_loss, packed_loss
from instruct_lm.model.generation import generate
from instruct_lm.model.gpt import GPT
from instruct_lm.model.lora import add_lora
from instruct_lm.training.loss import batch_loss
from instruct_lm.training.optimizers import OptimizerSettings
from tests.model.conftest import CONFIGS, VARIANTS, random_model

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    """No copies, and none after the test."""
    rounding._copies.clear()
    yield
    rounding._copies.clear()


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of multiplying, whatever this processor has: torch's own works everywhere, if slowly."""
    monkeypatch.setattr(linear, "HAS_BF16", request.param)
    return request.param


def mixed() -> torch.autocast:
    return torch.autocast("cpu", BF16)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch(vocab_size: int = 101) -> Batch:
    """Rows of 11, 17 and 30 tokens behind a prefix of six, their first ten without weight in part."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, vocab_size, 6)
    rows = [np.concatenate([prefix, random.integers(0, vocab_size, n)]) for n in (5, 11, 24)]
    weights = [np.where(np.arange(len(row)) < 10, 0.5, 1).astype(np.float32) for row in rows]
    return collate(rows, weights, [weight == 1 for weight in weights])


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of two sets of gradients, as a share of the norm of the second."""
    assert ours.keys() == theirs.keys()
    apart = torch.nn.utils.get_total_norm([ours[name] - theirs[name] for name in ours])
    return float(apart / torch.nn.utils.get_total_norm(list(theirs.values())))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_exact_one_rounded_once(instructions: bool, transposed: bool, bias: bool) -> None:
    x = numbers(2, 7, 33).bfloat16()
    weight = numbers(33, 20, seed=1).bfloat16().T if transposed else numbers(20, 33, seed=1).bfloat16()
    b = numbers(20, seed=2) if bias else None
    made = product(x, weight, b)
    exact = x.double() @ weight.double().T + (b.bfloat16().double() if b is not None else 0)
    assert made.dtype == BF16
    # fp32 sums may fall on the other side of the middle between two bf16 numbers, which are 2^-8 apart.
    torch.testing.assert_close(made.double(), exact, rtol=2**-8, atol=1e-5)
    assert (made == exact.bfloat16()).float().mean() > 0.98


def test_a_layer_equals_torchs_own_under_autocast(instructions: bool) -> None:
    plain = torch.nn.Linear(33, 16)
    fast = FastLinear(33, 16)
    fast.load_state_dict(plain.state_dict())
    outputs, grads = [], []
    for layer in (plain, fast):
        x = numbers(2, 3, 33).requires_grad_()
        with mixed():
            y = layer(x)
        outputs.append(y)
        grads.append(torch.autograd.grad((y.float() * numbers(2, 3, 16, seed=1)).sum(), [x, *layer.parameters()]))
    assert outputs[1].dtype == BF16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2**-7, atol=1e-3)
    for ours, theirs in zip(*reversed(grads), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=0.01)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rank", [0, 4])
def test_loss_and_gradients_are_as_near_to_fp32_as_torchs_own(name: str, rank: int, instructions: bool) -> None:
    plain, batch = random_model(CONFIGS[name]), a_batch()
    if rank:
        torch.manual_seed(0)
        add_lora(plain, rank, 2 * rank)
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1  # else B is 0
    fast = copy.deepcopy(plain)
    accelerate(fast, rounds_frozen=True)
    exact, _ = batch_loss(plain, batch)
    exact.backward()
    single = gradients(plain)
    found: dict[str, tuple[float, float]] = {}
    for kind, model, loss in (
        ("torch", plain, batch_loss),
        ("packed", fast, packed_loss),
        ("padded", fast, chunked_loss),
    ):
        model.zero_grad()
        with mixed():
            weighted, _ = loss(model, batch)
        weighted.backward()
        assert all(grad.dtype == torch.float32 for grad in gradients(model).values())
        error = abs(weighted.item() - exact.item()) / exact.item()
        found[kind] = (error, distance(gradients(model), single))
    for kind in ("packed", "padded"):
        assert found[kind][0] < max(2 * found["torch"][0], 5e-3), found
        assert found[kind][1] < max(1.5 * found["torch"][1], 0.01), found
        assert found[kind][1] > 1e-4  # it is no fp32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_are_made_once_and_gone_after_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    model = random_model(CONFIGS["gpt2"])
    model.activation_checkpointing = checkpointing
    accelerate(model)
    asked: list[bool] = []
    known = rounding._held
    monkeypatch.setattr(rounding, "_held", lambda weight: asked.append((copy := known(weight)) is not None) or copy)
    with mixed():
        loss, _ = packed_loss(model, a_batch())
    matrices = 4 * model.config.n_layer
    assert len(rounding._copies) == matrices
    assert asked == [False] * matrices + [True] * matrices  # of `hold`, then of each product
    places = {weight: copy.rounded.data_ptr() for weight, copy in rounding._copies.items()}
    loss.backward()
    assert len(rounding._copies) == 0
    assert all(weight.grad.data_ptr() == place for weight, place in places.items())  # where the copy was


@pytest.mark.parametrize(
    "settings",
    [{}, {"fused": False}, {"name": "adafactor"}, {"in_backward": True}],
    ids=["fused", "plain", "adafactor", "in-backward"],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_a_weight_that_an_optimizer_has_changed_is_rounded_anew(settings: dict[str, bool], keeps: bool) -> None:
    model, fused = random_model(CONFIGS["llama"]), settings.pop("fused", True) if "fused" in settings else True
    accelerate(model, keeps_rounded=keeps)
    optimizer = OptimizerSettings(lr=0.1, **settings).build(model, fused=fused)
    for _ in range(3):
        with mixed():
            loss, _ = packed_loss(model, a_batch())
            for weight in (model.h[0].mlp.fc.weight, model.h[1].attn.qkv.weight):
                assert weight in rounding._copies
                assert torch.equal(rounding.rounded(weight), weight.bfloat16())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_copies_last_for_all_backward_passes_of_a_step_where_gradients_are_accumulated() -> None:
    model, batch = random_model(CONFIGS["gpt2"]), a_batch()
    accelerate(model, keeps_rounded=True)
    weight = model.h[0].mlp.fc.weight
    pointers = set()
    for _ in range(3):
        with mixed():
            loss, _ = packed_loss(model, batch)
        loss.backward()
        pointers.add(rounding._copies[weight].rounded.data_ptr())
    assert len(pointers) == 1


def test_frozen_matrices_are_stored_rounded_and_nothing_else() -> None:
    model = random_model(CONFIGS["llama3"])
    add_lora(model, 2, 4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    accelerate(model, rounds_frozen=True)
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("h.") and name.endswith(".weight") and parameter.dim() == 2
        assert parameter.dtype == (BF16 if is_matrix else torch.float32), name
        assert torch.equal(parameter, before[name].to(parameter.dtype))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stored", [False, True])
def test_answers_are_those_of_a_loop_without_cache_batch_or_packing(
    name: str, stored: bool, instructions: bool
) -> None:
    model = random_model(CONFIGS[name]).eval().requires_grad_(not stored)
    accelerate(model, rounds_frozen=True)
    prompts = [[1, 2, 3], [1, 2, 9, 30, 7, 5], [4]]
    with mixed():
        answers = generate(model, prompts, max_new_tokens=6)
        with torch.no_grad():
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = list(prompt)
                for token in answer:
                    logits = model.logits(model.hidden_states(torch.tensor([ids]))[0, -1])
                    assert logits.dtype == torch.float32
                    # The batch may round other sums; the token chosen is the best one, or as good.
                    assert float(logits.max() - logits[token]) < 0.02 * float(logits.std())
                    ids.append(token)


def test_a_copy_made_while_answering_can_be_trained_with() -> None:
    model = random_model(CONFIGS["gpt2"])
    accelerate(model)
    with mixed():
        generate(model, [[1, 2]], max_new_tokens=2)
        held = len(rounding._copies)
        loss, _ = packed_loss(model, a_batch())
    assert held == 4 * model.config.n_layer
    loss.backward()
    assert model.h[0].mlp.fc.weight.grad is not None


def test_attention_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["llama"])
    accelerate(model)
    seen: set[torch.dtype] = set()
    attention = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        out = attention(q, *args, **options)
        seen.update((q.dtype, out.dtype))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with mixed():
        packed_loss(model, a_batch())[0].backward()
        generate(model, [[1, 2], [3]], max_new_tokens=3)
    assert seen == {torch.float32}


def test_outside_autocast_nothing_is_rounded() -> None:
    model = random_model(CONFIGS["gpt2"])
    accelerate(model)
    packed_loss(model, a_batch())[0].backward()
    with torch.autocast("cpu", torch.float16):
        assert not rounding.is_on(torch.device("cpu"))
    assert not rounding.is_on(torch.device("cpu"))
    assert len(rounding._copies) == 0
