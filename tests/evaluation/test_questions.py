import pytest

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.questions import RUBRIC, SCORE, read_question

ENTRY = {"instruction": "Add.", "input": "1, 2", "output": "3"}


def ask(question, response="4"):
    return question.ask(ENTRY, response, lambda entry: f"# {entry['instruction']}")


def test_named_questions():
    assert read_question(None) is read_question("score") is SCORE
    assert read_question("rubric", [1, 5]) is RUBRIC
    assert [RUBRIC.percent(score) for score in (1, 2, 3, 4, 5)] == [0, 25, 50, 75, 100]
    assert list(RUBRIC.schema["properties"]) == ["feedback", "score"]  # the reasons before the number
    assert RUBRIC.schema["properties"]["score"] == {"type": "integer", "minimum": 1, "maximum": 5}
    asked = ask(RUBRIC)
    assert all(
        text in asked for text in ("# Add.", "Reference answer:\n3", "Response:\n4", '{"feedback": "...", "score"')
    )


def test_a_question_of_ones_own(tmp_path):
    text = 'Task {instruction} with {input}: {response} for {output}? {prompt} Answer {"score": 1} or \\boxed{} {0}'
    question = read_question(text, [0, 10])
    told = 'Task Add. with 1, 2: {output} for 3? # Add. Answer {"score": 1} or \\boxed{} {0}'
    assert ask(question, "{output}") == told
    assert (question.schema, question.feedback, question.percent(7)) == (None, False, 70)
    path = tmp_path / "my prompt.txt"
    path.write_text(f"\ufeff{text}\n\n", encoding="utf-8")
    assert read_question(str(path), [0, 10]) == question
    assert read_question(text).scale == (0, 100)


@pytest.mark.parametrize(
    ("prompt", "scale", "message"),
    [
        ("Score {answer}", None, r"\{answer\}.*\{prompt\}, \{instruction\}, \{input\}, \{output\}, \{response\}"),
        ("Score {instruction}", None, r"lacks \{response\}"),
        ("Score {{response}}", None, "one pair of braces"),
        ("rubrik", None, r"judge\.prompt=rubrik: No such file.*score, rubric"),
        ("word " * 2000, None, "score, rubric, a text"),
        ("{response}", [5, 1], r"judge\.scale=\[5,1\]"),
        ("{response}", [5, 5], r"judge\.scale=\[5,5\]"),
        ("rubric", [0, 100], r"judge\.scale=\[0,100\] with judge\.prompt=rubric.*1 to 5"),
        (None, [1, 5], r"judge\.prompt=score.*0 to 100"),
    ],
)
def test_what_is_no_question(prompt, scale, message):
    with pytest.raises(InputError, match=message):
        read_question(prompt, scale)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_question(str(tmp_path / "p"))
    with pytest.raises(InputError, match="directory"):
        read_question(str(tmp_path))
