import random
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from instruct_lm.errors import InputError
from instruct_lm.evaluation.metrics import agreement, bootstrap_interval, chrf, exact_match, normalise, rouge_l

PAIRS = [
    ("The car is as fast as a bullet.", "The car is as fast as lightning."),
    ("It's time to go home.", "The corrected sentence should be: 'It's time to go home.'"),
    ("3 kilometers is 3000 meters.", "3 kilometers is 3000 meters."),
    ("The author is Jane Austen.", "Jane Austen."),
    ("1. Cucumber\n2. Broccoli", "1. Carrot\n2. Broccoli\n3. Cucumber"),
    ("Привет (Privet)", "Привет"),
    ("", "Hg."),
    ("a", ""),
]
words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "Mat", "3.5", "-", "naïve", "\n"]), max_size=12).map(
    " ".join
)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("The opposite of 'wet' is 'dry'.", "the opposite of ‘wet’ is “Dry”"),
        ("  Prime numbers: 11, 19\nComposite: 14 ", "Prime numbers: 11, 19 Composite: 14."),
        ("Hg", "Hg."),
        ("caf\u00e9", "cafe\u0301"),
        ("(opinion-based)!", "Opinion-based."),
    ],
)
def test_exact_match_ignores_case_punctuation_and_whitespace(response, reference):
    assert exact_match(response, reference)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("35", "3.5"),
        ("34", "-34"),
        ("5", "5%"),
        ("C", "C++"),
        ("cannot", "can not"),
        ("?", "!"),
        ("", "."),
        ("1000", "1,00"),
    ],
)
def test_exact_match_keeps_what_carries_meaning(response, reference):
    assert not exact_match(response, reference)


@given(st.text())
@settings(deadline=None)
def test_normalise_is_idempotent_and_the_text_matches_itself(text):
    assert normalise(normalise(text)) == normalise(text)
    assert exact_match(text, text)
    assert exact_match(f" {text}\n", text)


def _plain_chrf(response: str, reference: str) -> float:
    """chrF2 by its definition: mean precision and recall of the n-gram orders that both texts have."""
    response, reference = "".join(response.split()), "".join(reference.split())
    precisions, recalls = [], []
    for n in range(1, 7):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (response, reference))
        if ours and theirs:
            common = (ours & theirs).total()
            precisions.append(common / ours.total())
            recalls.append(common / theirs.total())
    if not precisions or sum(precisions) + sum(recalls) == 0:
        return 0.0
    precision, recall = statistics.mean(precisions), statistics.mean(recalls)
    return 100 * (1 + 2**2) * precision * recall / (2**2 * precision + recall)


@pytest.mark.parametrize(("response", "reference"), PAIRS)
def test_chrf_on_answers(response, reference):
    assert chrf(response, reference) == pytest.approx(_plain_chrf(response, reference), abs=1e-6)


@given(words, words)
@settings(deadline=None)
def test_chrf_equals_its_definition(response, reference):
    assert chrf(response, reference) == pytest.approx(_plain_chrf(response, reference), abs=1e-6)


def test_chrf_of_equal_and_disjoint_texts():
    assert chrf("Copenhagen", "Copenhagen") == pytest.approx(100)
    assert chrf("abc", "xyz") == 0


ROUGE = RougeScorer(["rougeL"], use_stemmer=False)


@pytest.mark.parametrize(("response", "reference"), PAIRS)
def test_rouge_l_on_answers(response, reference):
    assert rouge_l(response, reference) == pytest.approx(100 * ROUGE.score(reference, response)["rougeL"].fmeasure)


@given(st.one_of(words, st.text()), st.one_of(words, st.text()))
@settings(max_examples=300, deadline=None)
def test_rouge_l_equals_the_rouge_score_package(response, reference):
    assert rouge_l(response, reference) == pytest.approx(100 * ROUGE.score(reference, response)["rougeL"].fmeasure)


@given(
    st.lists(st.sampled_from("ab"), min_size=60, max_size=200),
    st.lists(st.sampled_from("abc"), min_size=60, max_size=200),
)
@settings(max_examples=30, deadline=None)
def test_rouge_l_of_long_repetitive_texts(response, reference):
    response, reference = " ".join(response), " ".join(reference)
    assert rouge_l(response, reference) == pytest.approx(100 * ROUGE.score(reference, response)["rougeL"].fmeasure)


def test_bootstrap_interval_equals_a_naive_loop():
    values = [0, 100, 35, 85, 85, 60, 20, 95, 50, 10, 75, 5]
    rng = random.Random(7)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(20_000))
    low, high = bootstrap_interval(values, n_resamples=20_000)
    # the error of an end is about 0.2 at 20,000 resamples
    assert low == pytest.approx(means[500], abs=1)
    assert high == pytest.approx(means[-500], abs=1)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < statistics.mean(values) < narrow[1] < high


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


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1, 2], 0), ([1, 2], 95)])
def test_bootstrap_interval_refuses(values, confidence):
    with pytest.raises(InputError):
        bootstrap_interval(values, confidence)


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
    with pytest.raises(InputError, match="2, 1"):
        agreement([1, 2], [1])
