"""Recognition by keys."""

import pytest

from instruct_lm.data.shapes import (
    FIELDS,
    SHAPES,
    Malformed,
    check_columns,
    recognise,
    shown_columns,
    suggested_columns,
)
from instruct_lm.errors import InputError


@pytest.mark.parametrize(
    ("keys", "columns", "shape", "found", "unused"),
    [
        ("instruction output", {}, "Alpaca", "instruction output", ""),
        ("output text input instruction system history", {}, "Alpaca", "instruction input output system history", "text"),
        ("messages", {}, "messages", "messages", ""),
        ("conversations id system", {}, "ShareGPT", "conversations system", "id"),
        ("prompt completion", {}, "prompt/completion", "prompt completion", ""),
        ("prompt response score", {}, "prompt/completion", "prompt response", "score"),
        # several shapes fit: the first in SHAPES
        ("prompt messages completion", {}, "messages", "messages", "prompt completion"),
        ("instruction output conversations", {}, "ShareGPT", "conversations", "instruction output"),
        ("prompt instruction completion output", {}, "Alpaca", "instruction output", "prompt completion"),
        # other names
        ("question answer", {"instruction": "question", "output": "answer"}, "Alpaca", "instruction=question output=answer", ""),
        ("instruction answer", {"output": "answer"}, "Alpaca", "instruction output=answer", ""),
        ("instruction output answer", {"output": "answer"}, "Alpaca", "instruction output=answer", "output"),
        ("output input", {"output": "input", "instruction": "output"}, "Alpaca", "instruction=output output=input", ""),
        ("dialogue", {"messages": "dialogue"}, "messages", "messages=dialogue", ""),
        ("messages q a", {"instruction": "q", "output": "a"}, "Alpaca", "instruction=q output=a", "messages"),
        # case and spacing
        ("Instruction OUTPUT Text", {}, "Alpaca", "instruction=Instruction output=OUTPUT", "Text"),
        ("Output output instruction", {}, "Alpaca", "instruction output", "Output"),
        ("Question Answer", {"instruction": "question", "output": "answer"}, "Alpaca", "instruction=Question output=Answer", ""),
    ],
)  # fmt: skip
def test_recognition(keys, columns, shape, found, unused):
    layout = recognise(keys.split(), columns)
    pairs = [pair.partition("=") for pair in found.split()]
    assert layout.shape.name == shape
    assert list(layout.keys.items()) == [(field, key or field) for field, _, key in pairs]
    assert layout.unused == tuple(unused.split())


@pytest.mark.parametrize(
    ("keys", "columns", "fault"),
    [
        ("instruction input", {}, "output is missing (its keys: instruction, input)"),
        ("output", {}, "instruction is missing (its keys: output)"),
        ("prompt text", {}, "completion is missing (its keys: prompt, text)"),
        ("instruction response", {}, "output is missing (its keys: instruction, response)"),
        ("question answer", {}, "its keys fit no known shape: question, answer"),
        ("question", {"instruction": "question", "output": "answer"}, "answer is missing (its keys: question)"),
        ("instruction output", {"output": "answer"}, "answer is missing (its keys: instruction, output)"),
        ("", {}, "it has no keys"),
    ],
)
def test_keys_that_are_missing(keys, columns, fault):
    with pytest.raises(Malformed) as error:
        recognise(keys.split(), columns)
    assert str(error.value) == fault


def test_every_field_belongs_to_a_shape():
    assert {field for shape in SHAPES for field in shape.required + shape.optional} == set(FIELDS)


def test_columns_name_fields():
    check_columns(dict.fromkeys(FIELDS, "x"))
    with pytest.raises(InputError, match=r"data\.columns='{question: instruction}': question is none of instruction, "):
        check_columns({"question": "instruction"})


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        ("question answer id", "'{instruction: question, output: answer}'"),
        ("instruction context response category", "'{input: context, output: response}'"),
        ("Query Response", "'{instruction: Query, output: Response}'"),
        ("id dialogue", "'{messages: dialogue}'"),
        ("kind input target", "'{instruction: input, output: target}'"),  # firefly
        ("inputs targets", "'{instruction: inputs, output: targets}'"),  # xP3
        ("id system_prompt question response", "'{instruction: question, output: response, system: system_prompt}'"),
        ("prompt chosen rejected", "'{completion: chosen}'"),
        ("prompt context answer", "'{instruction: prompt, input: context, output: answer}'"),
        ("a b", None),
    ],
)
def test_a_suggestion_reads_the_keys(keys, columns):
    suggested = suggested_columns(keys.split())
    assert (suggested and shown_columns(suggested)) == columns
    if suggested:
        assert recognise(keys.split(), suggested).shape.name in ("Alpaca", "messages", "prompt/completion")
