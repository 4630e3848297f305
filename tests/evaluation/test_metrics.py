import json
import re
import statistics
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from instruct_lm.evaluation.metrics import chrf, exact_match, normalise, rouge_l

PAIRS = [
    ("The car is as fast as a bullet.", "The car is as fast as lightning."),
    ("It's time to go home.", "The corrected sentence should be: 'It's time to go home.'"),
    ("3 kilometers is 3000 meters.", "3 kilometers is 3000 meters."),
    ("The author is Jane Austen.", "Jane Austen."),
    ("1. Cucumber\n2. Broccoli", "1. Carrot\n2. Broccoli\n3. Cucumber"),
    ("Привет (Privet)", "Привет"),
    ("the ABC of it", "The abc of it"),
    ("", "Hg."),
    ("a", ""),
]
words = st.lists(
    st.sampled_from(["the", "The", "cat", "sat", "on", "mat", "Mat", "3.5", "-", "naïve", "\n"]), max_size=12
).map(" ".join)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("The opposite of 'wet' is 'dry'.", "the opposite of ‘wet’ is “Dry”"),
        ("  Prime numbers: 11, 19\nComposite: 14 ", "Prime numbers: 11, 19 Composite: 14."),
        ("Hg", "Hg."),
        ("caf\u00e9", "cafe\u0301"),
        ("(opinion-based)!", "Opinion-based."),
        ("巴黎。", "巴黎"),
        ("「東京」です！", "「東京」です"),
        ("『東京』", "東京"),
        ("（巴黎）", "巴黎"),
        ("【巴黎】", "《巴黎》、"),
        ("〈巴黎〉…… ——巴黎～", "・巴黎：　巴黎；"),
        ("是的， 没错 ？", "是的 没错"),
        ("ＡＢＣ１２３！", "abc123"),
        ("ﾊﾟﾘ", "パリ"),
        ("서울입니다.", "서울입니다"),
        ("दिल्ली।", "दिल्ली"),
        ("باريس؟", "«باريس»،"),
        ("STRASSE", "Straße"),  # as Unicode folds case
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
        ("２", "²"),
        ("1/2", "½"),
        ("５", "５％"),
        ("３．５", "35"),
        ("ノート", "ノト"),
        ("か", "が"),
        ("दिल", "दल"),
    ],
)
def test_exact_match_keeps_what_carries_meaning(response, reference):
    assert not exact_match(response, reference)


scripts = st.text(
    "aéＡ１²½ﾊﾟ ゙がー々東京𠮷。、「」（）…—～・ไทยກຂខ្មែរမြန်한국ᄒ दिल्ली।עִبَ\u200c\u200d👍🏽👨‍👩‍👧‍👦?!.'’ \n\u3000\u0338=",
    max_size=12,
)
texts = st.one_of(st.text(), scripts)


@given(texts)
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


def test_chrf_of_disjoint_texts():
    assert chrf("abc", "xyz") == 0


@given(texts)
@example("👍")
@example("。")
@example("\u200b")
@settings(deadline=None, max_examples=300)
def test_every_metric_of_equal_texts_is_100_but_of_blank_ones(text):
    assert chrf(text, text) == pytest.approx(100 if text.strip() else 0)
    assert rouge_l(text, text) == pytest.approx(100 if text.strip() else 0)


@given(st.text(st.characters(max_codepoint=127)))
@settings(deadline=None)
def test_normalise_of_ascii_texts_strips_as_before_it_knew_other_scripts(text):
    words = [word.lstrip("'\"`([{").rstrip("'\"`)]}.,;:!?") for word in text.casefold().split()]
    assert normalise(text) == (" ".join(filter(None, words)) or " ".join(text.casefold().split()))


ROUGE = RougeScorer(["rougeL"], use_stemmer=False)
ascii_text = st.text(st.characters(max_codepoint=127))


def _plain_rouge_l(response: list[str], reference: list[str]) -> float:
    """ROUGE-L by its definition: the longest common subsequence by the textbook's table, then the F-measure."""
    table = [[0] * (len(reference) + 1) for _ in range(len(response) + 1)]
    for i, word in enumerate(response):
        for j, other in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    return 200 * table[-1][-1] / (len(response) + len(reference))


@pytest.mark.parametrize(("response", "reference"), [pair for pair in PAIRS if "".join(pair).isascii()])
def test_rouge_l_on_answers(response, reference):
    assert rouge_l(response, reference) == pytest.approx(100 * ROUGE.score(reference, response)["rougeL"].fmeasure)


@given(st.one_of(words.filter(str.isascii), ascii_text), st.one_of(words.filter(str.isascii), ascii_text))
@settings(max_examples=300, deadline=None)
def test_rouge_l_of_ascii_texts_is_that_of_the_packages_own_tokenizer(response, reference):
    assume(re.search("[a-z0-9]", response.lower()) or re.search("[a-z0-9]", reference.lower()))  # else: signs
    assert rouge_l(response, reference) == pytest.approx(100 * ROUGE.score(reference, response)["rougeL"].fmeasure)


@given(
    st.lists(st.sampled_from("ab"), min_size=60, max_size=200),
    st.lists(st.sampled_from("abc"), min_size=60, max_size=200),
)
@settings(max_examples=30, deadline=None)
def test_rouge_l_of_long_repetitive_texts_equals_its_definition(response, reference):
    assert rouge_l(" ".join(response), " ".join(reference)) == pytest.approx(_plain_rouge_l(response, reference))


@pytest.mark.parametrize(
    ("response", "reference", "common", "lengths"),  # tokens in common and the two numbers of tokens
    [
        ("Столица — Москва", "столица Франции Париж", 1, (2, 3)),
        ("東京です", "京都です", 3, (4, 4)),
        ("北京，2024年", "北京2023年", 3, (4, 4)),
        ("𠮷野屋", "吉野屋", 2, (3, 3)),  # beyond the basic plane
        ("ﾊﾟﾘﾃﾞｽ", "パリでしょう", 2, (4, 6)),
        ("ラーメン", "ラメン", 3, (4, 3)),
        ("서울", "서울 안", 2, (2, 3)),
        ("\u1112\u1161\u11ab", "한국", 1, (1, 2)),  # decomposed
        ("ที่นี่", "ที่นั่น", 1, (2, 3)),  # a letter with its marks is one character
        ("दिल्ली शहर", "दिल शहर", 1, (2, 2)),  # vowel signs belong to the word
        ("बड़ा", "बड़ी", 0, (1, 1)),
        ("كَتَبَ", "كتب", 0, (1, 1)),
        ("می‌خواهم", "میخواهم", 1, (1, 1)),  # a zero-width non-joiner
        ("cafe\u0301", "café au lait", 1, (1, 3)),
        ("ＡＢＣ", "abc", 1, (1, 1)),
        ("2²", "22", 0, (1, 1)),
        ("naïve", "nave", 0, (1, 1)),
        ("👍🏽👨‍👩‍👧", "👨‍👩‍👧 !", 1, (2, 2)),  # no words: signs
        ("!?", "a", 0, (2, 1)),
        ("👍 yes", "yes", 1, (1, 1)),
    ],
)
def test_rouge_l_of_other_languages_by_hand(response, reference, common, lengths):
    assert rouge_l(response, reference) == pytest.approx(200 * common / sum(lengths))


def test_the_japanese_and_chinese_cases(shared_dir):
    entries = json.loads((shared_dir / "cases" / "05_ja_dup.json").read_text(encoding="utf-8"))
    for text in {text for entry in entries for text in entry.values() if text}:
        assert exact_match(text, text)
        assert chrf(text, text) == pytest.approx(100)
        assert rouge_l(text, text) == pytest.approx(100)


def test_rouge_l_is_quiet():
    code = "from instruct_lm.evaluation.metrics import rouge_l; assert rouge_l('a b', 'a b') > 99.9"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
