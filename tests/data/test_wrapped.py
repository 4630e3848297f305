"""JSON objects that hold the records of a file."""

import json

import pandas
import pytest

from instruct_lm.data.dataset import read_conversations
from instruct_lm.errors import InputError

ENTRIES = [{"instruction": f"q{i}", "input": None if i else "x", "output": f"a{i}"} for i in range(3)]
FRAME = pandas.DataFrame(ENTRIES)
CHAT = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]


@pytest.fixture
def read(tmp_path):
    def read(content, **options):
        path = tmp_path / "data.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_conversations(path, **options)

    return read


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"data": ENTRIES}, "under its key data"),
        ({"version": "1.0", "schema": {"fields": []}, "train": ENTRIES, "test": []}, "under its key train"),
        ({key: [entry[key] for entry in ENTRIES] for key in ENTRIES[0]}, "by columns"),
        *((FRAME.to_json(orient=orient), where) for orient, where in (("columns", "by columns"), ("index", "by rows"))),
        *((FRAME.to_json(orient=orient), "under its key data") for orient in ("table", "split")),
    ],
    ids=["key", "key among others", "columns", "pandas columns", "pandas index", "pandas table", "pandas split"],
)
def test_records_inside_an_object(read, content, where):
    conversations, report = read(content)
    assert conversations == read(ENTRIES).conversations
    assert [conversation.number for conversation in conversations] == [1, 2, 3]
    assert report[0][1] == f"the entries are those of one object, {where}"


def test_columns_of_other_names_and_of_messages(read):
    columns = {"instruction": "q", "output": "a"}
    assert len(read({"q": {"0": "x", "1": "y"}, "a": {"0": "x", "1": "y"}}, columns=columns).conversations) == 2
    assert len(read({"messages": [CHAT, CHAT]}).conversations) == 2


@pytest.mark.parametrize(
    "entry", [ENTRIES[0], {"messages": CHAT}, {"messages": CHAT, "sources": [{"url": "x"}]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
)  # fmt: skip
def test_an_entry_is_no_wrapper(read, entry):
    conversations, report = read(entry)
    assert len(conversations) == 1
    assert not any("one object" in line for _, line in report)


def test_several_lists_are_refused_with_their_keys(read):
    with pytest.raises(InputError, match=r'several lists, train, test\..*json.load\(sys.stdin.buffer\)\["train"\]'):
        read({"train": ENTRIES, "test": ENTRIES})


def test_several_objects_are_entries(read):
    with pytest.raises(
        InputError, match=r"2 of 2 entries are malformed.*\n.*entry 1 \(line 1\): its keys fit no known"
    ):
        read('{"data": [{"instruction": "q"}]}\n{"data": []}')
    preference = json.dumps({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]})
    with pytest.raises(InputError, match=r"2 of 2 entries are malformed.*data\.columns='{completion: chosen}'"):
        read(f"{preference}\n{preference}")
    assert len(read(f"{preference}\n{preference}", columns={"completion": "chosen"}).conversations) == 2
