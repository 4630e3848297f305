import itertools
import math
import random
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.evaluation.statistics import (
    Difference,
    _resampled_means,
    agreement,
    bootstrap_interval,
    holm,
    paired_difference,
    sign_flip_p_value,
)


def test_bootstrap_interval_equals_a_naive_loop():
    values = [0, 100, 35, 85, 85, 60, 20, 95, 50, 10, 75, 5]
    rng = random.Random(7)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(20_000))
    low, high = bootstrap_interval(values, n_resamples=20_000)
    # the error of an end is about 0.2 at 20,000 resamples
    assert low == pytest.approx(means[500], abs=1)
    assert high == pytest.approx(means[-500], abs=1)
    assert low < statistics.mean(values) < high


@pytest.mark.parametrize("n", [2, 7, 110, 3000])
def test_the_draws_of_one_seed_are_those_of_scipy(n):
    values = np.random.default_rng(n).uniform(0, 100, n)
    own = _resampled_means([values[None]], 10_000)
    low, high = np.quantile(own, [0.025, 0.975])
    assert bootstrap_interval(values) == pytest.approx((low, high), rel=1e-12)


def two_way_by_scipy(first, second, n_resamples=10_000):
    """Interval of a difference of settings with other seeds: entries and both sides' seeds as samples of SciPy's."""

    def statistic(entries, *seeds, axis=-1):
        total = 0.0
        for side, drawn in zip((first, -second), seeds, strict=True):
            by_seed = np.moveaxis(side[:, entries].mean(axis=-1), 0, -1)  # (resamples, k)
            centre, k = by_seed.mean(axis=-1), len(side)
            means = np.take_along_axis(by_seed, drawn, axis=-1).mean(axis=-1)
            total = total + centre + math.sqrt(k / (k - 1)) * (means - centre)
        return total

    samples = np.arange(first.shape[1]), np.arange(len(first)), np.arange(len(second))
    found = scipy.stats.bootstrap(
        samples, statistic, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(0)
    )
    return found.confidence_interval


def test_resampling_of_seeds_and_entries_equals_scipy_with_the_same_statistic():
    rng = np.random.default_rng(11)
    first, second = crossed(rng, 3, 60, seed_spread=4) + 5, crossed(rng, 4, 60, seed_spread=4)
    found, expected = paired_difference(first, second), two_way_by_scipy(first, second)
    # the error of an end is about 0.1 at 10,000 resamples
    assert (found.low, found.high) == pytest.approx(expected, abs=0.4)


def test_a_resample_by_hand():
    # the docstring's example: of seeds [40, 60] and [80, 60], all 4 x 4 draws of entries and seeds
    scores, expected = np.array([[40.0, 60.0], [80.0, 60.0]]), set()
    for entries in itertools.product(range(2), repeat=2):
        by_seed = scores[:, entries].mean(axis=1)
        for seeds in itertools.product(range(2), repeat=2):
            drawn = by_seed[list(seeds)].mean()
            expected.add(round(by_seed.mean() + math.sqrt(2) * (drawn - by_seed.mean()), 6))
    assert 31.715729 in expected
    assert set(_resampled_means([scores], 1000).round(6)) == expected


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(50, 30, size=3000)  # more than one piece of indices
    half = 1.96 * values.std() / len(values) ** 0.5
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(50, 30, size=60), n_resamples=1000) for _ in range(400)]
    coverage = np.mean([low <= 50 <= high for low, high in intervals])
    assert 0.91 <= coverage <= 0.97  # 0.94 expected: the percentile interval is slightly narrow at n = 60; ±2 errors


def test_bootstrap_interval_is_reproducible_and_exact_where_nothing_varies():
    assert bootstrap_interval([1, 5, 9]) == bootstrap_interval([1, 5, 9])
    assert bootstrap_interval([42, 42]) == (42, 42)
    assert bootstrap_interval([7]) == (7, 7)


def test_an_interval_needs_a_score():
    with pytest.raises(InputError, match="at least one"):
        bootstrap_interval([])


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


def test_scores_that_cannot_be_paired_are_an_error():
    with pytest.raises(InputError, match="no entry"):
        paired_difference([math.nan, 1], [1, math.nan])
    with pytest.raises(ValueError, match=r"size 2.* size 3"):
        paired_difference([1, 2], [1, 2, 3])


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
        low, high = bootstrap_interval(scores, n_resamples=200)
        with_seeds += low <= 0 <= high
        low, high = bootstrap_interval(scores.mean(axis=0), n_resamples=200)
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
    assert bootstrap_interval(np.repeat(by_seed[:, None], 4, axis=1)) == (
        40.0,
        60.0,
    )  # a mean never leaves the range of its values


def test_one_seed_has_the_interval_of_the_summary():
    scores = np.random.default_rng(5).uniform(0, 100, 30)
    assert bootstrap_interval(scores) == bootstrap_interval(scores[None]) == bootstrap_interval(scores)


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
    low, high = bootstrap_interval(scores, n_resamples=100)
    assert low < scores.mean() < high < low + 5


def entries_needed(spread, mean):
    return Difference(mean, mean, mean, 1.0, spread, entries=2).entries_needed


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


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(p_values):
    """The i-th smallest of m p-values is multiplied by m - i + 1, and none falls below a smaller one or exceeds 1."""
    ranked = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = {}, 0.0
    for rank, place in enumerate(ranked):
        adjusted[place] = least = max(least, min(1.0, p_values[place] * (len(p_values) - rank)))
    assert holm(p_values) == pytest.approx([adjusted[place] for place in range(len(p_values))])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=3, max_size=40))
@settings(max_examples=50, deadline=None)
def test_agreement_equals_torchmetrics(pairs):
    import torch
    from torchmetrics.functional import kendall_rank_corrcoef, pearson_corrcoef, spearman_corrcoef

    first, second = (list(column) for column in zip(*pairs, strict=True))
    result = agreement(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert result == {"pearson": None, "spearman": None, "kendall": None}
        return
    x, y = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    assert result["pearson"] == pytest.approx(pearson_corrcoef(x, y).item(), abs=1e-4)
    assert result["spearman"] == pytest.approx(spearman_corrcoef(x, y).item(), abs=1e-4)
    assert result["kendall"] == pytest.approx(kendall_rank_corrcoef(x, y, variant="b").item(), abs=1e-4)


def test_agreement_by_hand():
    # 4 pairs agree, 1 disagrees and 1 is tied in x: tau-b = 3 / sqrt(5 * 6)
    result = agreement([10, 20, 20, 40], [1, 3, 2, 2.5])
    assert result["kendall"] == pytest.approx(3 / 30**0.5)


def test_entries_without_a_difference_leave_the_sign_flip_test_exact() -> None:
    assert sign_flip_p_value([1.0, 1.0, 1.0] + [0.0] * 20) == 0.25  # 2 of the 8 signs; of 2^23 it would draw some
