import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.evaluation.metrics import bootstrap_interval
from instruct_lm.evaluation.statistics import entries_needed, holm, interval, paired_difference, sign_flip_p_value


def naive_sign_flip(differences):
    """Every sign, in a plain loop."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= abs(sum(differences)) for value in sums) / len(sums)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=9))
def test_exact_sign_flips_equal_a_plain_loop(differences):
    assert sign_flip_p_value(np.array(differences)) == pytest.approx(naive_sign_flip(differences))


def test_drawn_sign_flips_estimate_the_exact_p_value():
    differences = np.random.default_rng(1).normal(0.5, 1, 12)
    exact = naive_sign_flip(differences.tolist())
    drawn = sign_flip_p_value(differences, n_permutations=4000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))
    assert drawn != exact


def test_the_p_value_of_drawn_sign_flips_is_never_0():
    assert sign_flip_p_value(np.full(50, 3.0), n_permutations=999) == 1 / 1000


def test_a_p_value_below_5_percent_is_as_rare_as_it_says():
    rng = np.random.default_rng(2)
    found = sum(sign_flip_p_value(rng.normal(0, 10, 12)) <= 0.05 for _ in range(400))
    assert 8 <= found <= 34  # 20 expected; 3.2 standard deviations


def test_a_difference_by_hand():
    found = paired_difference([50, 60, 70, 80], [40, 60, 50, 90])
    assert found.mean == 5.0  # (10 + 0 + 20 - 10) / 4
    assert found.spread == pytest.approx(math.sqrt((25 + 25 + 225 + 225) / 3))
    assert (found.entries, found.seeds) == (4, (1, 1))
    assert found.p_value == 0.75  # of the 8 signs of 10, 20, -10, the sums -20, 20, -20, 20, 40, -40 are as far from 0
    assert (found.low, found.high) == bootstrap_interval([10, 0, 20, -10])
    assert found.margin == (found.high - found.low) / 2


def test_an_entry_without_a_score_on_either_side_is_left_out():
    nan = math.nan
    found = paired_difference([50, nan, 70, 80], [40, 60, nan, 90])
    assert (found.entries, found.mean) == (2, 0.0)


def test_equal_scores_differ_by_nothing():
    found = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (found.mean, found.low, found.high, found.p_value, found.entries_needed) == (0, 0, 0, 1, None)


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1, 2, 3]), ([math.nan, 1], [1, math.nan])])
def test_scores_that_cannot_be_paired_are_an_error(first, second):
    with pytest.raises(InputError, match=r"entr(y|ies)"):
        paired_difference(first, second)


def crossed(rng, seeds, entries, seed_spread, entry_spread=25, rest=15):
    """Scores with true mean 0: an effect of the seed, one of the entry, and the rest."""
    effects = rng.normal(0, seed_spread, (seeds, 1)) + rng.normal(0, entry_spread, entries)
    return effects + rng.normal(0, rest, (seeds, entries))


@pytest.mark.parametrize(("seeds", "seed_spread", "low", "high"), [(1, 0, 0.90, 0.99), (3, 3, 0.90, 0.99)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, seed_spread, low, high):
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        found = paired_difference(crossed(rng, seeds, 60, seed_spread), np.zeros(60), n_resamples=200)
        held += found.low <= 0 <= found.high
    assert low < held / 200 < high


def test_an_interval_without_the_seeds_holds_the_truth_too_rarely():
    rng = np.random.default_rng(4)
    with_seeds = entries_alone = 0
    for _ in range(200):
        scores = crossed(rng, 5, 60, seed_spread=10)
        low, high = interval(scores, n_resamples=200)
        with_seeds += low <= 0 <= high
        low, high = interval(scores.mean(axis=0), n_resamples=200)
        entries_alone += low <= 0 <= high
    assert entries_alone / 200 < 0.8 < 0.86 < with_seeds / 200


def test_the_interval_over_seeds_alone_by_enumeration():
    # entries all alike: the resampled means are those of the 27 draws of 3 seeds, deviations scaled by sqrt(3 / 2)
    by_seed = np.array([40.0, 47.0, 60.0])
    draws = [sum(draw) / 3 for draw in itertools.product(by_seed, repeat=3)]
    mean = by_seed.mean()
    scaled = sorted(mean + math.sqrt(1.5) * (value - mean) for value in draws)
    found = paired_difference(np.repeat(by_seed[:, None], 4, axis=1), np.zeros(4))
    assert found.low == pytest.approx(scaled[0])  # 1 of 27 is more than 2.5%
    assert found.high == pytest.approx(scaled[-1])
    assert interval(np.repeat(by_seed[:, None], 4, axis=1)) == (
        40.0,
        60.0,
    )  # a mean never leaves the range of its values


def test_one_seed_has_the_interval_of_the_summary():
    scores = np.random.default_rng(5).uniform(0, 100, 30)
    assert interval(scores) == interval(scores[None]) == bootstrap_interval(scores)


def test_seeds_in_common_are_paired():
    rng = np.random.default_rng(6)
    shared = rng.normal(0, 20, (3, 1))  # what a seed does to both settings
    first, second = (shared + rng.normal(mean, 3, (3, 40)) for mean in (52, 50))
    paired, unpaired = paired_difference(first, second, same_seeds=True), paired_difference(first, second)
    assert paired.mean == unpaired.mean == pytest.approx(2, abs=1)
    assert paired.margin < 2 < 10 < unpaired.margin
    assert paired.p_value < 0.05 < unpaired.p_value


def test_different_numbers_of_seeds_can_be_compared():
    rng = np.random.default_rng(7)
    found = paired_difference(rng.normal(50, 5, (3, 40)), rng.normal(20, 5, 40))
    assert found.seeds == (3, 1)
    assert found.low < 30 < found.high
    assert found.p_value == 1 / 10_001


def test_long_sets_are_resampled_in_blocks():
    scores = np.random.default_rng(8).normal(50, 10, (2, 30_000))
    low, high = interval(scores, n_resamples=100)
    assert low < scores.mean() < high < low + 5


def test_entries_needed_by_hand():
    assert entries_needed(30, 5) == 283  # (2.801585 * 6)^2 = 282.6
    assert entries_needed(30, -5) == 283
    assert entries_needed(1, 100) == 2
    assert entries_needed(30, 0) is None
    assert entries_needed(math.nan, 5) is None


def test_entries_needed_give_the_power_promised():
    n = entries_needed(30, 8)
    data = np.random.default_rng(9).normal(8, 30, (4000, n))
    z = data.mean(axis=1) / (data.std(axis=1, ddof=1) / math.sqrt(n))
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.03)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
