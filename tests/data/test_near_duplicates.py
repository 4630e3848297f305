import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.dataset import Splits
from instruct_lm.data.near_duplicates import (
    Pair,
    near_duplicates,
    questions,
    removed_message,
    without_near_duplicates,
)
from instruct_lm.errors import InputError

words = st.sampled_from(
    ["Name", "name", "three", "THREE", "fruits", "colours", "of the", "日本の", "首都は", "?", "ß", "\n"]
)
sentences = st.lists(words, max_size=6).map(" ".join)
thresholds = st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0])


def all_cosines(texts: list[str]):
    """The naive form: all texts against all, as the book's `find-near-duplicates.py` does it."""
    folded = [" ".join(text.casefold().split()) for text in texts]
    distinct = list(dict.fromkeys(folded))
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(3, 3), lowercase=False)
    try:
        vectors = vectorizer.fit(distinct).transform(folded)
    except ValueError:  # no text of three characters
        return folded, [[0.0] * len(texts)] * len(texts)
    return folded, cosine_similarity(vectors)


@given(st.lists(sentences, max_size=12), thresholds)
@settings(deadline=None, max_examples=150)
def test_it_finds_what_all_pairs_by_dense_cosine_find(texts, threshold):
    folded, cosines = all_cosines(texts)
    firsts = [i for i, text in enumerate(folded) if folded.index(text) == i]
    expected = {(folded.index(text), i): 1.0 for i, text in enumerate(folded) if i not in firsts}
    expected |= {
        (a, b): min(1.0, cosines[a][b]) for a in firsts for b in firsts if a < b and cosines[a][b] >= threshold - 1e-9
    }
    found = near_duplicates(texts, threshold)
    assert {pair[:2]: pytest.approx(pair.similarity) for pair in found} == expected
    assert [pair.similarity for pair in found] == sorted((pair.similarity for pair in found), reverse=True)


def test_by_hand():
    # Trigrams: abcd: abc, bcd; abce: abc, bce. Of n = 2 texts, df is 2 for abc and 1 for the others, whose weight is
    # ln(3/2) + 1 = 1.40547 against ln(3/3) + 1 = 1: the cosine is 1 / (1 + 1.40547²).
    assert near_duplicates(["abcd", "ABCE"], 0.3) == [Pair(0, 1, pytest.approx(1 / (1 + 1.4054651**2)))]
    assert near_duplicates(["abcd", "abce"], 0.34) == []


@pytest.mark.parametrize(
    "texts",
    [
        ["Name it.", "x", " name\n IT. "],
        ["", "x", "  "],
        ["法", "x", "法"],
        ["数字の5を書いて。", "x", "数字の5を書いて。"],
        ["STRASSE", "x", "straße"],
    ],
)
@pytest.mark.parametrize("threshold", [1e-6, 1, 1.0])
def test_equal_texts_are_found_at_every_threshold(texts, threshold):
    assert near_duplicates(texts, threshold) == [Pair(0, 2, 1.0)]


def test_texts_without_spaces():
    texts = ["東京は日本の首都ですか、教えてください。", "北京は何ですか。", "東京は日本の首都ですか、教えて下さい。"]
    assert [pair[:2] for pair in near_duplicates(texts, 0.6)] == [(0, 2)]


def test_equal_texts_have_a_first_one_in_each_part():
    texts = ["Say hello to me.", "Say hello to me.", "Name a fruit.", "say hello to me.", "say hello to me!", "Bye."]
    parts = ["train", "train", "train", "test", "test", "validation"]
    assert [pair[:2] for pair in near_duplicates(texts, 1, parts)] == [(0, 1), (0, 3)]
    assert [pair[:2] for pair in near_duplicates(texts, 0.6, parts)] == [(0, 1), (0, 3), (0, 4), (3, 4)]


def test_many_equal_texts_give_few_pairs():
    assert len(near_duplicates(["Explain this."] * 20_000, 0.9)) == 19_999


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr("instruct_lm.data.near_duplicates.MOST_PAIRS", 100)
    with pytest.raises(InputError, match=r"More than 100 pairs of texts are at least 0\.1 alike. Use a higher"):
        near_duplicates([f"Translate sentence {i}." for i in range(30)], 0.1)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("function", [near_duplicates, lambda _, t: without_near_duplicates(splits_of(2, 1), t)])
def test_thresholds_outside_0_to_1_are_refused(function, threshold):
    with pytest.raises(InputError, match=rf"threshold {threshold:g} is outside \(0, 1\]"):
        function(["a", "b"], threshold)


def test_what_is_asked_is_compared_without_the_answer_and_a_common_system_turn():
    def chat(system, number, answer="Yes."):
        turns = (
            Turn("user", "Hi"),
            Turn("assistant", "Hello"),
            Turn("user", "Sum", f"{number}"),
            Turn("assistant", answer),
        )
        return Conversation((Turn("system", system), *turns))

    house = [chat("Be kind.", 1), chat("Be kind.", 2), chat("Answer from: Paris is big.", 3)]
    assert questions(house) == [
        "Hi\nHello\nSum\n1",
        "Hi\nHello\nSum\n2",
        "Answer from: Paris is big.\nHi\nHello\nSum\n3",
    ]
    assert questions([chat("Be kind.", 1), chat("Be brief.", 1, "No.")])[0].startswith("Be kind.\n")


def splits_of(*sizes: int) -> Splits:
    """Entries that are nothing alike."""
    random_ = random.Random(0)
    texts = ["".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(sum(sizes))]
    entries = [Conversation.of(text, "", "ok", number) for number, text in enumerate(texts, start=1)]
    train, test = sizes[0], sizes[0] + sizes[1]
    return Splits(entries[:train], entries[train:test], entries[test:])


def test_training_entries_near_to_held_out_ones_are_removed():
    train, test, validation = splits_of(20, 3, 2)
    texts = [entry.turns[0].text for entry in (*test, *validation)]
    leaks = {3: texts[0].upper(), 4: texts[0][:-1] + "?", 10: texts[4] + "!", 11: texts[4][:20]}
    train = [Conversation.of(leaks.get(entry.number, entry.turns[0].text), "", "x", entry.number) for entry in train]
    kept, removed = without_near_duplicates(Splits(train, test, validation), 0.9)
    assert [(found.entry.number, found.like.number) for found in removed] == [(3, 21), (4, 21), (10, 25)]
    assert [found.similarity for found in removed] == [
        1.0,
        pytest.approx(0.97, abs=0.02),
        pytest.approx(0.98, abs=0.02),
    ]
    assert kept == Splits([entry for entry in train if entry.number not in (3, 4, 10)], test, validation)
    assert without_near_duplicates(kept, 0.9) == (kept, [])
    assert removed_message(removed, 0.9).startswith(
        "data.deduplicate=0.9: 3 training entries removed that are near to a test or validation entry: "
        "entry 3 (like 21: 1.000), 4 (like 21: 0.9"
    )
    assert removed_message([], 0.9).endswith("0 training entries removed that are near to a test or validation entry")


@given(st.lists(sentences, min_size=4, max_size=14), thresholds)
@settings(deadline=None, max_examples=80)
def test_what_is_removed_is_what_the_naive_form_removes(texts, threshold):
    folded, cosines = all_cosines(texts)
    n = len(texts) - 3
    near = [
        any(folded[i] == folded[j] or cosines[i][j] >= threshold - 1e-9 for j in range(n, len(texts))) for i in range(n)
    ]
    entries = [Conversation.of(text, number=i + 1) for i, text in enumerate(texts)]
    splits = Splits(entries[:n], entries[n : n + 2], entries[n + 2 :])
    if all(near):
        with pytest.raises(InputError, match=f"data.deduplicate={threshold:g} leaves no training entry: all {n}"):
            without_near_duplicates(splits, threshold)
        return
    kept, removed = without_near_duplicates(splits, threshold)
    assert kept.train == [entry for entry, gone in zip(entries, near, strict=False) if not gone]
    assert [found.entry for found in removed] == [entry for entry, gone in zip(entries, near, strict=False) if gone]
    for found in removed:
        i, j = found.entry.number - 1, found.like.number - 1
        assert found.similarity == (1.0 if folded[i] == folded[j] else pytest.approx(min(1, cosines[i][j])))


def test_the_real_entries(shared_dir):
    from instruct_lm.data.dataset import load_conversations, split

    splits = split(load_conversations(shared_dir / "data" / "instruction-data.json"))
    texts = questions([entry for part in splits for entry in part])
    folded, cosines = all_cosines(texts)
    distinct = [i for i, text in enumerate(folded) if folded.index(text) == i]
    for threshold in (0.5, 0.9):
        expected = {(a, b) for k, a in enumerate(distinct) for b in distinct[k + 1 :] if cosines[a][b] >= threshold}
        found = {pair[:2] for pair in near_duplicates(texts, threshold) if folded[pair[0]] != folded[pair[1]]}
        assert found == expected
    _, removed = without_near_duplicates(splits, 0.99)
    leaked = [number for number, text in enumerate(folded[:935], start=1) if text in folded[935:]]
    assert len(leaked) == 7
    assert [found.entry.number for found in removed] == leaked
