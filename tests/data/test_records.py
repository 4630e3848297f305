"""From one record to a conversation: roles, texts, blank values, what is counted."""

import json
import math
from decimal import Decimal

import numpy as np
import pytest

from instruct_lm.data.conversation import Turn
from instruct_lm.data.records import RecordReader, Unusable
from instruct_lm.data.shapes import Malformed

EXCHANGE = (Turn("user", "q"), Turn("assistant", "a"))
THREE = (Turn("system", "s"), *EXCHANGE, Turn("user", "q2"), Turn("assistant", "a2"))
ROLES = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")]
MESSAGES = [{"role": role, "content": text} for role, text in ROLES]
LAST = {"instruction": "q2", "output": "a2"}


def turns(record, **options):
    return RecordReader(**options).read(record, 1).turns


def messages(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES[1:], "system": "s"},
        {"messages": [message | {"content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]},
        {"messages": [{"Role": role.upper(), "Content": [*text]} for role, text in ROLES]},
        {"messages": [{"role": "developer", "content": "s"}, *MESSAGES[1:]]},
        {"messages": [message | {"tool_calls": None, "name": None, "from": None, "value": None} for message in MESSAGES]},
        {"messages": np.array(MESSAGES, dtype=object)},
        {"messages": json.dumps(MESSAGES)},
        {"messages": repr(MESSAGES)},
        {"conversations": [{"from": role, "value": text} for role, text in ROLES]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in ROLES[1:]], "system": "s"},
        {"conversations": MESSAGES},
        {"messages": [{"role": {"user": "prompter"}.get(role, role), "text": text} for role, text in ROLES]},  # OASST
        {"conversations": [{"role": None, "content": None, "from": role, "value": text} for role, text in ROLES]},
        {"system": "s", "history": [["q", "a"]], **LAST},
        {"system": "s", "history": MESSAGES[1:3], **LAST},
        {"history": MESSAGES[:3], **LAST},
        {"system": "s", "history": '[["q", "a"]]', **LAST},
        {"system": "s", "history": [["q", "a"]], "prompt": "q2", "completion": "a2"},
        {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]},
        {"prompt": MESSAGES[:4], "response": "a2"},
    ],
)  # fmt: skip
def test_one_conversation_in_every_shape(record):
    reader = RecordReader()
    conversation = reader.read(record, 7)
    assert conversation.turns == THREE
    assert conversation.number == 7
    assert not reader.counts


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a", "input": None, "system": None, "history": None},
        {"instruction": "q", "output": "a", "input": " \n", "system": "", "history": []},
        {"instruction": "q", "output": "a", "input": math.nan, "system": math.nan, "history": math.nan},
        {"prompt": "q", "completion": "a", "history": ""},
        messages(("system", "  "), ("user", "q"), ("assistant", "a")),
    ],
)
def test_what_is_blank_is_left_out(record):
    assert turns(record) == EXCHANGE


def test_alpaca_keeps_the_input_apart_and_texts_as_they_are():
    assert turns({"instruction": " q\n", "input": " i ", "output": "\ta"})[0] == Turn("user", " q\n", " i ")
    assert turns({"instruction": "", "input": "i", "output": "a"})[0] == Turn("user", "", "i")


def test_leading_system_turns_are_joined_and_the_rest_stays_in_order():
    record = messages(
        ("system", "2"), ("developer", "3"), ("assistant", "hi"), ("user", "q"), ("user", "r"), ("assistant", "a")
    )
    given = [(turn.role, turn.text) for turn in turns(record | {"system": "1"})]
    assert given == [("system", "1\n\n2\n\n3"), ("assistant", "hi"), ("user", "q"), ("user", "r"), ("assistant", "a")]


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "bing", "bard", "model", "Assistant"])
def test_names_of_assistants(role):
    assert turns(messages(("human", "q"), (role, "a"))) == EXCHANGE


def test_turns_after_the_last_response_are_cut_and_counted():
    reader = RecordReader()
    record = messages(("user", "q"), ("assistant", "a"), ("user", "x"), ("user", ""))
    assert reader.read(record, 1).turns == EXCHANGE
    assert reader.counts == {("cut", "turns"): 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (2.0, "2.0"), (True, "true"), (0, "0"), (-0.5, "-0.5"), (Decimal("1.50"), "1.50"), (np.int64(3), "3")],
)
def test_a_number_counts_as_its_text(value, text):
    reader = RecordReader()
    assert reader.read({"instruction": "q", "output": value}, 1).reference == text
    assert reader.read(messages(("user", value), ("assistant", "a")), 2).turns[0].text == text
    assert reader.counts == {("number", "output"): 1, ("number", "messages"): 1}


def test_null_and_nan_inputs_are_counted():
    reader = RecordReader()
    for value in (None, math.nan, np.float32("nan"), "", "x"):
        reader.read({"instruction": "q", "input": value, "output": "a"}, 1)
    assert reader.counts == {("null", "input"): 3}


@pytest.mark.parametrize(
    "text",
    ["<noinput>", "No input", "N/A", "None", "nan", "(no input)", "<No Input>", "n/a.", "NULL", "No input required.",
     " [no input] ", "Not applicable", "no_input"],
)  # fmt: skip
def test_placeholders_are_counted_and_dropped_on_request(text):
    record = {"instruction": "q", "input": text, "output": "a"}
    reader, cleaner = RecordReader(), RecordReader(clean=True)
    assert reader.read(record, 1).turns[0].input == text
    assert cleaner.read(record, 1).turns == EXCHANGE
    assert reader.counts == cleaner.counts == {("placeholder", text.strip()): 1}


@pytest.mark.parametrize("text", ["No input is a good input", "Nonesuch", "-", "<>", "input", "5", "Nantes", "nano"])
def test_other_inputs_are_no_placeholders(text):
    assert turns({"instruction": "q", "input": text, "output": "a"}, clean=True)[0].input == text


def test_only_the_input_has_placeholders():
    assert turns({"instruction": "None", "output": "N/A"}, clean=True) == (
        Turn("user", "None"),
        Turn("assistant", "N/A"),
    )


def test_keys_that_nothing_uses_are_counted_where_they_hold_something():
    reader = RecordReader()
    reader.read({"instruction": "q", "output": "a", "model_response": "x", "tags": [], "note": None}, 1)
    reader.read({"instruction": "q", "output": "a", "model_response": "y", "tags": ["t"], "note": " "}, 2)
    weighted = [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a", "weight": 0}]
    reader.read({"messages": weighted, "id": 0}, 3)
    unused = {"model_response": 2, "tags": 1, "messages: weight": 1, "id": 1}
    assert reader.counts == {("unused", key): n for key, n in unused.items()}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "q", "output": " \n\t"}, "the response is blank"),
        ({"instruction": "q", "output": None}, "the response is blank"),
        ({"instruction": "q", "output": math.nan}, "the response is blank"),
        ({"instruction": "", "input": "", "output": "a"}, "the request is blank"),
        ({"prompt": None, "completion": "a"}, "the request is blank"),
        (messages(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "")), "response 2 is blank"),
        (messages(("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "a")), "response 1 is blank"),
        (messages(("user", "q"), ("user", " "), ("assistant", "a")), "request 2 is blank"),
        (messages(("user", "q")), "there is no response"),
        (messages(("system", "s"), ("assistant", "a")), "there is no request"),
        ({"messages": []}, "there is no response"),
        ({"messages": None}, "there is no response"),
    ],
)
def test_blank_entries_are_unusable(record, reason):
    with pytest.raises(Unusable) as error:
        turns(record)
    assert str(error.value) == reason


def test_a_placeholder_that_is_dropped_can_leave_nothing():
    with pytest.raises(Unusable, match="the request is blank"):
        turns({"instruction": " ", "input": "<noinput>", "output": "a"}, clean=True)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("text", "it is text, not an object with keys"),
        ([1], "it is a list, not an object with keys"),
        (None, "it is null, not an object with keys"),
        (5, "it is a number, not an object with keys"),
        ({"instruction": ["x"], "output": "a"}, "instruction is a list, not text"),
        ({"instruction": "q", "output": {"a": 1}}, "output is an object, not text"),
        ({"instruction": "q", "output": b"a"}, "output is of type bytes, not text"),
        ({"instruction": "q", "output": "a", "input": []}, "input is a list, not text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history 1 is a list, not a pair of request and response"),
        ({"instruction": "q", "output": "a", "history": "before"}, "history is text, not a list"),
        ({"messages": "hello"}, "messages is text, not a list"),
        ({"messages": {"role": "user"}}, "messages is an object, not a list"),
        ({"messages": ["hello"]}, "messages, turn 1 is text, not an object with role and content"),
        ({"messages": [{"content": "x"}]}, "messages, turn 1: role is missing (its keys: content)"),
        ({"messages": [{"role": "user", "body": "x"}]}, "messages, turn 1: content is missing (its keys: role, body)"),
        ({"conversations": [{"from": "human"}]}, "conversations, turn 1: value is missing (its keys: from)"),
        (messages(("user", "q"), ("tool", "x")), "messages, turn 2: the role 'tool' cannot be trained on, only system, "),
        (messages(("user", "q"), (None, "x")), "messages, turn 2: the role None cannot be trained on"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "messages, turn 1: tool_calls cannot be trained on"),
        (messages(("user", [{"type": "image_url", "image_url": {}}])), "messages, turn 1: a part of type 'image_url' cannot be trained on"),
        (messages(("user", [{"type": "text"}])), "messages, turn 1: a part has no text (its keys: type)"),
        (messages(("user", [[]])), "messages, turn 1 is a list, not text"),
        (messages(("user", "q"), ("system", "s"), ("assistant", "a")), "a system turn stands behind other turns"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named_by_its_fault(record, fault):
    with pytest.raises(Malformed) as error:
        turns(record)
    assert str(error.value).startswith(fault)


def test_a_history_that_is_no_list_of_python_is_malformed() -> None:
    with pytest.raises(Malformed, match="history"):
        RecordReader().read({"instruction": "x", "output": "y", "history": "{{1}}"}, 1)
