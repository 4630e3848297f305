"""Packed sequences against padded rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.data.batching import shared_prefix_length
from instruct_lm.fast import accelerate
from instruct_lm.fast.packing import pack
from tests.model.conftest import CONFIGS, random_model


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 10), st.sampled_from(sorted(CONFIGS)))
def test_packed_equals_padded(lengths: list[int], prefix: int, name: str) -> None:
    model = random_model(CONFIGS[name])
    generator = torch.Generator().manual_seed(sum(lengths) + prefix)
    shared = torch.randint(0, 101, (prefix,), generator=generator)
    rows = [torch.cat((shared, torch.randint(0, 101, (n,), generator=generator))) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    packing = pack([len(row) for row in rows], shared_prefix_length(rows))
    with torch.no_grad():
        expected = model.hidden_states(padded)
        accelerate(model)
        hidden = model.packed_states(padded, packing)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(
            hidden[packing.rows[row, : len(ids)]], expected[row, : len(ids)], rtol=1e-4, atol=1e-4
        )


def test_packing_holds_the_prefix_once() -> None:
    packing = pack([4, 3, 5], prefix_length=2)
    assert packing.columns.tolist() == [0, 1, 2, 3, 7, 12, 13, 14]
    assert packing.rows.tolist() == [[0, 1, 2, 3, 0], [0, 1, 4, 0, 0], [0, 1, 5, 6, 7]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3]], 1), ([[1, 2, 3]], 0), ([[1], [1]], 0)],
)
def test_each_row_keeps_a_token_of_its_own(rows: list[list[int]], expected: int) -> None:
    assert shared_prefix_length([torch.tensor(row) for row in rows]) == expected
