"""The transformer against its own padded, uncached, uncompressed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.fast.packing import common_prefix_length, pack
from instruct_lm.model.gpt import GPT, GPTConfig, KVCache
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
    cache = KVCache(model.config, 3, 24, torch.float32, "cpu")
    with torch.no_grad():
        expected = model.hidden_states(ids)
        model.hidden_states(ids[:, :13], cache=cache)
        cache.lengths += lengths
        for step in range(10):
            at = lengths + step
            hidden = model.decode(ids[torch.arange(3), at], cache)
            torch.testing.assert_close(hidden, expected[torch.arange(3), at], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 10), st.sampled_from(sorted(CONFIGS)))
def test_packed_equals_padded(lengths: list[int], prefix: int, name: str) -> None:
    model = random_model(CONFIGS[name])
    generator = torch.Generator().manual_seed(sum(lengths) + prefix)
    shared = torch.randint(0, 101, (prefix,), generator=generator)
    rows = [torch.cat((shared, torch.randint(0, 101, (n,), generator=generator))) for n in lengths]
    packing = pack(torch.tensor([len(row) for row in rows]), common_prefix_length(rows))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = torch.arange(padded.shape[1]).expand(padded.shape)
    with torch.no_grad():
        expected = model(padded)
        logits = model(
            padded.flatten()[packing.columns], position_ids=positions.flatten()[packing.columns], packing=packing
        )
    for row, ids in enumerate(rows):
        torch.testing.assert_close(
            logits[packing.rows[row, : len(ids)]], expected[row, : len(ids)], rtol=1e-4, atol=1e-4
        )


def test_packing_holds_the_prefix_once() -> None:
    packing = pack(torch.tensor([4, 3, 5]), prefix_length=2)
    assert packing.columns.tolist() == [0, 1, 2, 3, 7, 12, 13, 14]
    assert packing.rows.tolist() == [[0, 1, 2, 3, 0], [0, 1, 4, 0, 0], [0, 1, 5, 6, 7]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3]], 1), ([[1, 2, 3]], 0), ([[1], [1]], 0)],
)
def test_each_row_keeps_a_token_of_its_own(rows: list[list[int]], expected: int) -> None:
    assert common_prefix_length([torch.tensor(row) for row in rows]) == expected


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
