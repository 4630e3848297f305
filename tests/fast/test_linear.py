"""The faster layers against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from instruct_lm.fast import linear as module
from instruct_lm.fast.linear import FastLinear, product


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor prefers, the faster library is tested."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(module, "ONEDNN", True)


@pytest.mark.parametrize("shape", [(5,), (1, 7), (3, 4, 1), (2, 1, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [16, 17])  # a transposed weight whose rows are no power of two is left to torch
@pytest.mark.parametrize("transposed", [False, True])
def test_it_equals_torchs_own(
    shape: tuple[int, ...], bias: bool, out: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 33, generator=generator)
    weight = torch.randn(33, out, generator=generator).T if transposed else torch.randn(out, 33, generator=generator)
    b = torch.randn(out, generator=generator) if bias else None
    assert module.is_faster(x)
    library = torch.ops.mkldnn._linear_pointwise
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: asked.append(args[1]) or library(*args))
    torch.testing.assert_close(product(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
    assert bool(asked) == (not transposed or out == 16)


def test_other_dtypes_are_left_to_torch() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    assert not module.is_faster(x)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not module.is_faster(x.float())


@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_equal_torchs_own(bias: bool) -> None:
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(33, 16, bias=bias), torch.randn(2, 3, 33, requires_grad=True)
    fast = FastLinear(33, 16, bias=bias)
    fast.load_state_dict(plain.state_dict())
    grads = []
    for layer in (plain, fast):
        grads.append(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_small_weight_is_widened_to_what_it_meets_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._wide, "buffer", torch.empty(0))
    for rows, dtype in ((6, torch.float32), (3, torch.float64), (9, torch.float32), (2, torch.float32)):
        weight = torch.randn(rows, 4).bfloat16()
        for matrix in (weight, weight.T, weight[:, 1:3], weight[:1], weight[:, :1]):
            assert torch.equal(module._wide.of(matrix, dtype), matrix.to(dtype))
            assert module._wide.of(matrix, dtype).dtype == dtype
        assert module._wide.of(weight, torch.bfloat16) is weight
