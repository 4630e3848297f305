import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import instruct_lm.data
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.dataset import Splits, duplicates_between, load_conversations, split
from instruct_lm.errors import InputError

ENTRY = {"instruction": "Say hi.", "input": "", "output": "Hi."}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "data.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


# Loading


ENTRIES = [{"instruction": " a\u2028 ", "input": "é", "output": "b\n"}, {"instruction": "c", "output": "d", "x": [1]}]
LINES = [json.dumps(entry, ensure_ascii=False) for entry in ENTRIES]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ENTRIES),
        json.dumps(ENTRIES, indent=2, ensure_ascii=False),
        "\n".join(LINES),
        "\n\n" + "\r\n\r\n".join(LINES) + "\n\n",
        "\n".join(json.dumps(entry, indent=2) for entry in ENTRIES),
    ],
    ids=["list", "indented", "lines", "blank lines", "indented objects"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
def test_lists_and_lines_are_read_alike(write, text, mark):
    expected = [Conversation.of(" a\u2028 ", "é", "b\n"), Conversation.of("c", "", "d")]
    assert load_conversations(write((mark + text).encode())) == expected


def test_input_may_be_absent_null_or_empty(write):
    entries = [{"instruction": "a", "output": "b"} | extra for extra in ({}, {"input": None}, {"input": ""})]
    assert load_conversations(write(entries)) == [Conversation.of("a", "", "b")] * 3


def test_a_lone_surrogate_is_kept_for_the_tokenizer(write):
    assert load_conversations(write([ENTRY | {"output": "\ud800"}])) == [Conversation.of("Say hi.", "", "\ud800")]


def test_one_json_line_is_one_entry(write):
    assert load_conversations(write(ENTRY)) == [Conversation.of("Say hi.", "", "Hi.")]


def test_limit_takes_the_first_entries_and_does_not_look_at_others(write):
    path = write([ENTRY, ENTRY, "broken"])
    assert len(load_conversations(path, limit=2)) == 2
    with pytest.raises(InputError, match="entry 3"):
        load_conversations(path, limit=3)
    with pytest.raises(InputError, match="limit=0"):
        load_conversations(path, limit=0)


def test_sample_is_the_packaged_file():
    examples = load_conversations("sample")
    packaged = Path(instruct_lm.data.__file__).with_name("sample.json")
    assert len(examples) == len(json.loads(packaged.read_text(encoding="utf-8"))) >= 500
    assert len({(e.instruction, e.input) for e in examples}) == len(examples)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"input": "", "output": "x"}, "instruction: Field required"),
        ({"instruction": "x", "input": ""}, "output: Field required"),
        ({}, "instruction: Field required, output: Field required"),
        ({"instruction": "x", "output": " \n\t"}, "output: String should not be blank"),
        ({"instruction": "", "output": "x"}, "instruction: String should not be blank"),
        ({"instruction": "x", "output": 5}, "output: Input should be a valid string"),
        ({"instruction": "x", "output": None}, "output: Input should be a valid string"),
        ({"instruction": ["x"], "output": "x"}, "instruction: Input should be a valid string"),
        ({"instruction": "x", "output": "x", "input": False}, "input: Input should be a valid string"),
        ({"instruction": "x", "output": "x", "input": {}}, "input: Input should be a valid string"),
        ("text", "Input should be a valid dictionary"),
        ([1], "Input should be a valid dictionary"),
        (None, "Input should be a valid dictionary"),
    ],
)
def test_a_malformed_entry_is_named_with_its_number_and_fault(write, entry, fault):
    path = write([ENTRY, entry, ENTRY])
    with pytest.raises(InputError) as error:
        load_conversations(path)
    summary = (
        "1 of 3 entries are malformed; expected a JSON list, or JSON lines, of objects with the keys "
        "instruction, input and output."
    )
    assert str(error.value) == f"{path}: {summary}\n  entry 2: {fault}"


def test_a_malformed_json_line_is_named_with_its_line(write):
    lines = [json.dumps(ENTRY), "", json.dumps({"instruction": "x"})]
    with pytest.raises(InputError, match=r"entry 2 \(line 3\): output: Field required"):
        load_conversations(write("\n".join(lines).encode()))


def test_ten_faults_are_listed_and_all_are_counted(write):
    with pytest.raises(InputError) as error:
        load_conversations(write([ENTRY] + [{}] * 25))
    lines = str(error.value).split("\n")
    assert "25 of 26 entries are malformed" in lines[0]
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"  entry {n}" for n in range(2, 12)]
    assert lines[-1] == "  and 15 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no entries"),
        (b" \n\n", "holds no entries"),
        (b"[]", "holds no entries"),
        (b"\xef\xbb\xbf", "holds no entries"),
        (b'[\n {"instruction": "x",\n  "output" "y"}]', r"line 3, column 12: Expecting ':' delimiter"),
        (b'[{"instruction": "x"', "line 1, column 21: Expecting ',' delimiter"),
        (b'{"instruction": "x", "output": "y"}\n{"instruction": "x\n', r"line 2, column 19: Invalid control character"),
        (b'{"instruction": "x", "output": "y"}\nnonsense', "line 2, column 1: Expecting value"),
        (b"[] []", "2 of 2 entries are malformed"),
        (
            b'{"entries": [\n1]}',
            r"1 of 1 entries are malformed; expected a JSON list, or JSON lines.*\n  entry 1 \(line 1\): instruction: Field required",
        ),
        (b'"text"', r"entry 1 \(line 1\): Input should be a valid dictionary"),
        (b"5", r"entry 1 \(line 1\): Input should be a valid dictionary"),
        (b"null", r"entry 1 \(line 1\): Input should be a valid dictionary"),
        (b"<!DOCTYPE html><html>", "line 1, column 1: Expecting value"),
        (b"\x00\x01\x02", "line 1, column 1: Expecting value"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text: .*byte 0x89 in position 0: .*line 1"),
        ('[\n{"instruction": "caf\u00e9"}]'.encode("latin-1"), "byte 0xe9 in position 22: .*line 2"),
        ('[{"instruction": "x"}]'.encode("utf-16"), "not UTF-8 text: .*byte 0xff in position 0"),
        (b"[" * 200_000, "line 1: "),
        (b"[" + b"9" * 5000 + b"]", "line 1: "),
    ],
)
def test_files_that_hold_no_entries_are_named_with_the_place(write, content, message):
    path = write(content)
    with pytest.raises(InputError, match=message) as error:
        load_conversations(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_entries_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("junk") / "data.json"
    path.write_bytes(content)
    with pytest.raises(InputError):  # no drawn bytes make a whole entry
        load_conversations(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: No such file"):
        load_conversations(tmp_path / "gone.json")
    with pytest.raises(InputError, match=f"{tmp_path.name}: "):
        load_conversations(tmp_path)


def test_entries_of_100_000_characters(write):
    entry = {"instruction": "a" * 100_000, "input": "\U0001f600" * 100_000, "output": "b " * 50_000}
    (example,) = load_conversations(write([entry]))
    assert example._asdict() == entry


# Splitting


def examples_of(count):
    return [Conversation.of(f"instruction {i}", "", "x") for i in range(count)]


def test_split_takes_train_then_test_then_the_rest():
    examples = examples_of(1100)
    splits = split(examples)
    assert [len(part) for part in splits] == [935, 110, 55]
    assert splits.train + splits.test + splits.validation == examples
    assert splits._fields == ("train", "test", "validation")


@given(st.integers(20, 300), st.booleans(), st.integers(0, 5))
def test_split_loses_and_repeats_nothing(count, shuffle, seed):
    examples = examples_of(count)
    splits = split(examples, 0.5, 0.25, shuffle, seed)
    assert (len(splits.train), len(splits.test)) == (count // 2, count // 4)
    assert sorted(e.instruction for part in splits for e in part) == sorted(e.instruction for e in examples)
    assert splits == split(examples, 0.5, 0.25, shuffle, seed)


def test_shuffle_depends_on_the_seed_and_leaves_the_list_as_it_was():
    examples = examples_of(100)
    orders = [[e.instruction for part in split(examples, shuffle=True, seed=seed) for e in part] for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert examples == examples_of(100)
    pinned = split(examples_of(20), 0.2, 0.1, shuffle=True, seed=123).train  # another order would change shuffled runs
    assert [e.instruction for e in pinned] == [f"instruction {i}" for i in (7, 17, 3, 4)]


@pytest.mark.parametrize(
    ("count", "train", "test", "sizes"),
    [
        (5, 0.85, 0.1, "train 4, test 0, validation 1"),
        (10, 0.5, 0.5, "train 5, test 5, validation 0"),
        (10, 0.8, 0.4, "train 8, test 4, validation -2"),
        (0, 0.85, 0.1, "train 0, test 0, validation 0"),
    ],
)
def test_an_empty_split_is_an_error(count, train, test, sizes):
    with pytest.raises(InputError, match=sizes):
        split(examples_of(count), train, test)


def test_duplicates_between_splits_are_found_whatever_their_case_and_spacing():
    a, b, c = (
        Conversation.of("Say hi.", "to  Ann", "Hi."),
        Conversation.of("say HI.", " to ann ", "Hello."),
        Conversation.of("Say hi.", "", "Hi."),
    )
    splits = Splits([a, c, a], [b], [Conversation.of("Other", "", "x"), b])
    (duplicate,) = duplicates_between(splits)
    assert duplicate.example == a
    assert duplicate.places == {"train": [0, 2], "test": [0], "validation": [1]}
    assert duplicates_between(Splits([a, a], [c], [])) == []


def test_the_1100_entries_split_and_repeat_as_published(shared_dir):
    real = load_conversations(shared_dir / "data" / "instruction-data.json")
    splits = split(real)
    assert [len(part) for part in splits] == [935, 110, 55]
    duplicates = duplicates_between(splits)
    texts = [(e.instruction.casefold().split(), e.input.casefold().split()) for e in real]
    assert len(duplicates) == 5
    for duplicate in duplicates:
        text = (duplicate.example.instruction.casefold().split(), duplicate.example.input.casefold().split())
        assert texts.count(text) == sum(map(len, duplicate.places.values())) >= 2
