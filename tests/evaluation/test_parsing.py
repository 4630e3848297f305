import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from instruct_lm.evaluation.judges.parsing import parse_feedback, parse_score
from instruct_lm.evaluation.judges.reasoning import answer_of

WRAPPED = [
    "<think>{}</think>",
    "{}</think>",
    "<THINK>\n{}\n</THINK>",
    "<thinking>{}</thinking>",
    '<details type="reasoning">{}</details>',
    "<reasoning>{}</reasoning>",
    "<seed:think>{}</seed:think>",
    "[THINK]{}[/THINK]",
    "{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    "<|channel>thought\n{}<channel|>",
    "<unused94>thought\n{}<unused95>",
    "analysisWe {} assistantfinal",
    "<think>a <thinking>{}</thinking> b</think>",
]


@pytest.mark.parametrize(
    "text",
    [
        "Draft score: 70, hmm.\n</think>\n\nI'd give it 85.",
        *('{"Score": 85}', '{"score": "85/100"}', "[85]", "\\boxed{85}", "得分：85", "85。", "[[85]]", "85,0"),
        *("$\\boxed{85}$", "The score is $\\boxed{85/100}$.", "\\[\\boxed{\\text{85}}\\]", "$\\frac{85}{100}$"),
        *("８５", "得分：８５分", "85分", "评分: 85/100", "スコア：85点", "점수: 85점", "٨٥", "100点満点中85点"),
        *("Оценка: 85", "Puntuación: 85/100", "Bewertung: 85,0", "Note : 85/100", "Nota: 85", "85 von 100"),
        *("{'score': 85}", "{score: 85}", '{"score": 85,}', '{"rating": 85}', '{"Final Score": 85}', '{"grade": 85.0}'),
        *('{"evaluation": {"score": 85, "feedback": "x"}}', '[{"score": 85}]', '{"score": {"value": 85}}'),
        *(
            '{"score": 85, "max_score": 100}',
            '{"score": 85, "scale": "0-100"}',
            '{"scores": {"style": {"score": 80}}, "score": 85}',
        ),
        *('Here: {"score": 85} of {x}', '{"score": 85}<|endoftext|>', '{"feedback": "Actually 45 {", "score": 85}'),
        *("<score>85</score>", "<answer>85</answer>", "Rating: [[85]]", "### Score\n85", "| Score | 85 |", "> 85"),
        *(
            "Score - 85",
            "- Score: 85",
            "Score:\n85",
            "**Score**: 85",
            "Feedback: good. [RESULT] 85",
            "“85”",
            "85 points",
        ),
        *("Grade: 85%", "My score for the response: 85", "85 because it is right", "The response deserves 85."),
        "* Accuracy: 0/100\n* Understanding: 20/100\n* Overall score: 85/100",  # the last as in the book's repository
        "A score of 100 would need more. I give it 85/100.",
    ],
)
def test_spellings(text):
    assert parse_score(text) == 85


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Score: 10/10",
            "Rating: 5/5",
            "10 out of 10",
            "Score: 7/7",
            "I'd give it 4 out of 5",
            "the rating is 3 stars",
        ),
        *("Score: 85 → 90", "Score: 85 -> 90", "Score: 85 or 90", "Score: 85, 90", "Between 80 and 90", "Score: 80~90"),
        *(
            "0.85",
            "Score: 0.85",
            "-5",
            "150",
            "",
            "85+",
            "Score: >85",
            "Score: 85?",
            "85²",
            "½",
            "85,25",
            "Score: 1.000",
        ),
        *("Score: 85. Wait, actually 90.", '{"score": 70}\n\nActually, 85.', '{"score": 70}\n{"score": 85}'),
        *("Draft score: 70", "The maximum score is 100", "A score of 100 would need more"),
        *("1. The response is right.", "The model gives 4.", "The answer is: 4", "Note: 3 facts are wrong", "grade 4"),
        *("It deserves credit for naming 3 vitamins.", "Accuracy: 80/100\nFluency: 90/100", "to score 3 goals"),
        *('{"score": 8, "max_score": 10}', '{"score": 4, "scale": "1-5"}', '{"score": "8/10"}', "{'score': 8"),
        *('{"style": {"score": 80}, "accuracy": {"score": 90}}', '{"value": 85}', "[85, 90]", '{"grade": "A"}'),
    ],
)
def test_what_is_uncertain_is_no_score(text):
    assert parse_score(text) is None


@pytest.mark.parametrize("wrapped", WRAPPED)
@given(reasoning=st.text() | st.text("Score: 70/100{}\"'<>[]|\n"), score=st.integers(0, 100))
def test_the_score_after_any_reasoning_wins(wrapped, reasoning, score):
    for answer in (f"{score}", f"Score: {score}", f'{{"score": {score}}}'):
        assert parse_score(wrapped.replace("{}", reasoning) + "\n" + answer) == score


@pytest.mark.parametrize("wrapped", WRAPPED)
@given(reasoning=st.text("Score: 70/100{}\"'\n"))
def test_no_score_comes_from_the_reasoning(wrapped, reasoning):
    whole = wrapped.replace("{}", f"{reasoning}\nScore: 70\n")
    assert parse_score(whole) is None
    assert answer_of(whole) == ""
    opener = wrapped.partition("{}")[0]
    if opener:  # it does not end
        assert parse_score(f"{opener}{reasoning}\nScore: 70") is None
        assert parse_score(f"Score: 60\n{opener}{reasoning}\nScore: 70") is None or opener.startswith("analysis")


@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from(["Score: {} → {}", "{} - {}", "Score: {}\nScore: {}"]))
def test_two_scores_are_none(first, second, template):
    assume(first != second)
    assert parse_score(template.format(first, second)) is None


@pytest.mark.parametrize(
    ("text", "scale", "score"),
    [
        *((text, (1, 5), 4) for text in ("4", "4/5", "Score: 4", "4 out of 5", "4 - mostly right", '{"score": 4}')),
        ("**Score: 5**\n\nThe candidate answer directly addresses the question.", (1, 5), 5),
        *((text, (1, 5), None) for text in ("80%", "80/100", "8/10", "0.5", "6", "0", '{"score": 85}', "4 or 5")),
        ("3.5", (1, 5), 3.5),
        ("0.85", (0, 1), 0.85),
        ("0.5", (0, 10), None),  # on which scale?
        ("7/10", (0, 10), 7),
        ("-3", (-5, 5), -3),
    ],
)
def test_other_scales(text, scale, score):
    assert parse_score(text, scale) == score


def test_feedback():
    assert parse_feedback('<think>no</think>{"feedback": " Right. ", "score": 4}') == "Right."
    assert parse_feedback('{"score": 4, "Explanation": "Right."}') == "Right."
    assert parse_feedback("Right. [RESULT] 4") == "Right. [RESULT] 4"


@pytest.mark.parametrize(
    "text",
    [
        *("Final answer: 85", "Overall: 85", "**Total:** 85", "| Criterion | Score |\n|---|---|\n| Overall | 85 |"),
        *("85 (out of 100)", "85 (right, but short)", "Score (out of 100): 85", "Score/100: 85", "Score -> 85"),
        *("The score should be 85.", "The score for this response is 85.", "I'd say 85.", "I'd go with 85."),
        *("85点です。", "採点結果：85点", "我给这个回答打85分。", "점수는 85점입니다.", "Le doy un 85 sobre 100."),
        *("Puntuación final: 85", "Gesamtpunktzahl: 85", "Ich gebe 85 von 100 Punkten.", "स्कोर: 85", "Betyg: 85"),
        *('{"evaluation": 85}', '{"model_response_score": 85}', "I give it 85/100 because it is right.", "$85$"),
        "Correctness: 80/100\nFluency: 90/100\nOverall: 85/100",
        "It costs $5 or $6.\nScore: 85",
    ],
)
def test_more_spellings(text):
    assert parse_score(text) == 85


@pytest.mark.parametrize(
    "text",
    [
        *("Confidence score: 85", "BLEU score: 45.2", "ROUGE-L score: 45", "The F1 score is 80."),  # other measures
        *("I would not give it 85.", "If it were complete, I'd give it 100.", "Without the typo I'd give it 95."),
        *("The team scores 3 points", "The film is rated 18.", "It is rated PG-13.", "It costs:\n$85", "1)"),
        *("Score: 85 for accuracy and 90 for style", "85 of 100 words are right."),
    ],
)
def test_numbers_of_other_things_are_no_score(text):
    assert parse_score(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("3 of 5 items are right.", "It lists 3/5 of the items.", "3 out of 5 items are correct.", "It names 3 of 5."),
        "1: It is off the subject.\n2: It does a part.\n3: Some.\n4: Nearly all.\n5: All.",
    ],
)
def test_counts_are_no_grade(text):
    assert parse_score(text, (1, 5)) is None
    assert parse_score(f"{text}\n\nScore: 4", (1, 5)) in (4, None)


@pytest.mark.parametrize("text", ["4 stars", "Rating: 4 stars", "Feedback: it names 2 of 3. [RESULT] 4", "[[4]]"])
def test_grades(text):
    assert parse_score(text, (1, 5)) == 4
