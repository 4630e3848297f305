import json
import logging
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data.dataset import (
    EncodedExample,
    Splits,
    duplicates_between,
    encode_cached,
    encode_examples,
    load_examples,
    loss_weights,
    resolve_prompt_loss_weight,
    sample_path,
    split,
)
from instruct_lm.data.prompts import ALPACA, CHATML, PHI3, STYLES, Example, PromptStyle
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from tests.data import gpt2_file

ENTRY = {"instruction": "Say hi.", "input": "", "output": "Hi."}
BYTES = load_tokenizer("bytes")
END = BYTES.end_of_text
STYLE = PromptStyle("test", opening="Q:", input_lead="|", closing=";", header="A:")  # with BYTES: one token a character


def ids(text):
    return list(text.encode())


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
    expected = [Example(" a\u2028 ", "é", "b\n"), Example("c", "", "d")]
    assert load_examples(write((mark + text).encode())) == expected


def test_input_may_be_absent_null_or_empty(write):
    entries = [{"instruction": "a", "output": "b"} | extra for extra in ({}, {"input": None}, {"input": ""})]
    assert load_examples(write(entries)) == [Example("a", "", "b")] * 3


def test_one_json_line_is_one_entry(write):
    assert load_examples(write(ENTRY)) == [Example("Say hi.", "", "Hi.")]


def test_limit_takes_the_first_entries_and_does_not_look_at_others(write):
    path = write([ENTRY, ENTRY, "broken"])
    assert len(load_examples(path, limit=2)) == 2
    with pytest.raises(InputError, match="entry 3"):
        load_examples(path, limit=3)
    with pytest.raises(InputError, match="limit=0"):
        load_examples(path, limit=0)


def test_sample_is_the_packaged_file():
    examples = load_examples("sample")
    assert len(examples) == len(json.loads(sample_path().read_text(encoding="utf-8"))) >= 500
    assert len({(e.instruction, e.input) for e in examples}) == len(examples)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"input": "", "output": "x"}, "'instruction' is missing"),
        ({"instruction": "x", "input": ""}, "'output' is missing"),
        ({}, "'instruction' is missing, 'output' is missing"),
        ({"instruction": "x", "output": " \n\t"}, "'output' is empty"),
        ({"instruction": "", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "x", "output": 5}, "'output' is a number, not a string"),
        ({"instruction": "x", "output": None}, "'output' is null, not a string"),
        ({"instruction": ["x"], "output": "x"}, "'instruction' is a list, not a string"),
        ({"instruction": "x", "output": "x", "input": False}, "'input' is a boolean, not a string"),
        ({"instruction": "x", "output": "x", "input": {}}, "'input' is an object, not a string"),
        ("text", "is a string, not an object"),
        ([1], "is a list, not an object"),
        (None, "is null, not an object"),
    ],
)
def test_a_malformed_entry_is_named_with_its_number_and_fault(write, entry, fault):
    path = write([ENTRY, entry, ENTRY])
    with pytest.raises(InputError) as error:
        load_examples(path)
    assert str(error.value) == f"{path}: 1 of 3 entries are malformed.\n  entry 2: {fault}"


def test_a_malformed_json_line_is_named_with_its_line(write):
    lines = [json.dumps(ENTRY), "", json.dumps({"instruction": "x"})]
    with pytest.raises(InputError, match=r"entry 2 \(line 3\): 'output' is missing"):
        load_examples(write("\n".join(lines).encode()))


def test_ten_faults_are_listed_and_all_are_counted(write):
    with pytest.raises(InputError) as error:
        load_examples(write([ENTRY] + [{}] * 25))
    lines = str(error.value).split("\n")
    assert lines[0].endswith("25 of 26 entries are malformed.")
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
        (b'{"entries": [\n1]}', "holds an object; expected a JSON list of entries, or JSON lines"),
        (b'"text"', "holds a string; expected"),
        (b"5", "holds a number; expected"),
        (b"null", "holds null; expected"),
        (b"<!DOCTYPE html><html>", "line 1, column 1: Expecting value"),
        (b"\x00\x01\x02", "line 1, column 1: Expecting value"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text: byte 0x89 at offset 0, line 1"),
        ('[\n{"instruction": "caf\u00e9"}]'.encode("latin-1"), "byte 0xe9 at offset 22, line 2"),
        ('[{"instruction": "x"}]'.encode("utf-16"), "not UTF-8 text: byte 0xff at offset 0"),
        (b"[" * 200_000, "line 1: "),
        (b"[" + b"9" * 5000 + b"]", "line 1: "),
    ],
)
def test_files_that_hold_no_entries_are_named_with_the_place(write, content, message):
    path = write(content)
    with pytest.raises(InputError, match=message) as error:
        load_examples(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_entries_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("junk") / "data.json"
    path.write_bytes(content)
    with pytest.raises(InputError):  # no drawn bytes make a whole entry
        load_examples(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: No such file"):
        load_examples(tmp_path / "gone.json")
    with pytest.raises(InputError, match=f"{tmp_path.name}: "):
        load_examples(tmp_path)


def test_entries_of_100_000_characters(write):
    entry = {"instruction": "a" * 100_000, "input": "\U0001f600" * 100_000, "output": "b " * 50_000}
    (example,) = load_examples(write([entry]))
    assert asdict(example) == entry
    (row,) = encode_examples([example], BYTES, STYLE)
    assert len(row.input_ids) == len("Q:|;A:") + 100_000 + 400_000 + 100_000 + 1


# Splitting


def examples_of(count):
    return [Example(f"instruction {i}", "", "x") for i in range(count)]


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
        Example("Say hi.", "to  Ann", "Hi."),
        Example("say HI.", " to ann ", "Hello."),
        Example("Say hi.", "", "Hi."),
    )
    splits = Splits([a, c, a], [b], [Example("Other", "", "x"), b])
    (duplicate,) = duplicates_between(splits)
    assert duplicate.example == a
    assert duplicate.places == {"train": [0, 2], "test": [0], "validation": [1]}
    assert duplicates_between(Splits([a, a], [c], [])) == []


# Encoding


def test_encoding_is_prompt_header_response_and_one_end_token():
    rows = encode_examples([Example("in", "put", "out"), Example("i", "", "o")], BYTES, STYLE)
    assert [row.input_ids.tolist() for row in rows] == [[*ids("Q:in|put;A:out"), END], [*ids("Q:i;A:o"), END]]
    assert [row.prompt_length for row in rows] == [9, 4]
    assert [row.header_length for row in rows] == [2, 2]
    assert (rows.lengths.tolist(), rows.entries.tolist(), rows.dropped, rows.truncated) == ([15, 8], [0, 1], 0, 0)
    assert rows.input_ids.dtype == np.int32
    assert rows[-1].input_ids.base is not None  # a view, not a copy
    with pytest.raises(IndexError):
        rows[2]


@given(
    st.lists(st.builds(Example, st.text(), st.text(), st.text(min_size=1)), min_size=1), st.sampled_from(list(STYLES))
)
def test_any_example_decodes_to_its_text(examples, style):
    style = STYLES[style]
    for example, row in zip(examples, encode_examples(examples, BYTES, style), strict=True):
        prompt, response = row.prompt_length, row.prompt_length + row.header_length
        assert BYTES.decode(row.input_ids[:prompt]) == style.prompt(example)
        assert BYTES.decode(row.input_ids[prompt:response]) == style.header
        assert BYTES.decode(row.input_ids[response:-1]) == example.output
        assert (row.input_ids == END).tolist() == [False] * (len(row.input_ids) - 1) + [True]


def test_an_end_token_spelled_out_by_the_user_is_text():
    (row,) = encode_examples([Example("<|endoftext|>", "<|im_end|>", "<|endoftext|>")], BYTES, CHATML)
    assert (row.input_ids == END).sum() == 1


# With STYLE and BYTES: "Q:abcdef;A:xyz" and the end token, 15 ids, 9 of them the prompt.
LONG = Example("abcdef", "", "xyz")


@pytest.mark.parametrize(
    ("overlong", "max_length", "text", "prompt_length"),
    [
        ("drop", 14, None, None),
        ("truncate_prompt", 14, "Q:abcde;A:xyz$", 8),
        ("truncate_prompt", 10, "Q:a;A:xyz$", 4),
        ("truncate_prompt", 9, None, None),  # nothing of the instruction would be left
        ("truncate", 14, "Q:abcdef;A:xyz", 9),  # no end token: the response goes on
        ("truncate", 12, "Q:abcdef;A:x", 9),
        ("truncate", 11, None, None),  # nothing of the response would be left
    ],
)
def test_overlong(overlong, max_length, text, prompt_length):
    rows = encode_examples([LONG, Example("s", "", "t")], BYTES, STYLE, max_length, overlong)
    assert rows[-1].input_ids.tolist() == [*ids("Q:s;A:t"), END]
    assert rows[-1].prompt_length == 4
    if text is None:
        assert (len(rows), rows.entries.tolist(), rows.dropped, rows.truncated) == (1, [1], 1, 0)
    else:
        assert rows[0].input_ids.tolist() == [END if c == "$" else ord(c) for c in text]
        assert rows[0].prompt_length == prompt_length
        assert (len(rows), rows.dropped, rows.truncated) == (2, 0, 1)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate", "error"])
def test_no_row_left_is_an_error(overlong):
    with pytest.raises(InputError, match=r"2 of 2 entries are longer than max_length=3: entry 1 \(15 tokens\), 2 \(8"):
        encode_examples([LONG, Example("s", "", "t")], BYTES, STYLE, 3, overlong)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate", "error"])
def test_a_row_of_exactly_max_length_is_kept_whole(overlong):
    rows = encode_examples([LONG], BYTES, STYLE, 15, overlong)
    assert rows[0].input_ids.tolist() == [*ids("Q:abcdef;A:xyz"), END]
    assert (rows.dropped, rows.truncated) == (0, 0)


def test_overlong_error_names_the_entries_and_the_remedy():
    with pytest.raises(InputError) as error:
        encode_examples([Example("s", "", "t"), LONG], BYTES, STYLE, 14, "error")
    assert "1 of 2 entries are longer than max_length=14: entry 2 (15 tokens)" in str(error.value)
    assert "drop, truncate_prompt, truncate" in str(error.value)
    with pytest.raises(InputError, match="overlong='cut'"):
        encode_examples([LONG], BYTES, STYLE, 14, "cut")


@given(
    st.lists(st.builds(Example, st.text("ab", min_size=1), st.text("cd"), st.text("ef", min_size=1)), min_size=1),
    st.integers(8, 30),
    st.sampled_from(["drop", "truncate_prompt", "truncate"]),
)
def test_no_row_is_too_long_or_without_response_and_every_entry_is_accounted_for(examples, max_length, overlong):
    examples = [*examples, Example("s", "", "t")]
    rows = encode_examples(examples, BYTES, STYLE, max_length, overlong)
    assert len(rows) + rows.dropped == len(examples)
    whole = encode_examples(examples, BYTES, STYLE)
    cut = 0
    for row, entry in zip(rows, rows.entries, strict=True):
        response = row.input_ids[row.prompt_length + row.header_length :]
        expected = [*ids(examples[entry].output), END]
        assert len(row.input_ids) <= max_length
        assert len(response) >= 1
        assert response.tolist() == expected[: len(response)]
        assert response[0] != END
        assert overlong == "truncate" or len(response) == len(expected)
        cut += len(row.input_ids) < len(whole[int(entry)].input_ids)
    assert rows.truncated == cut


def test_a_response_without_tokens_is_dropped_and_counted():
    class Deaf:  # stands for SmolLM2's vocabulary, in which a few control characters have no token
        name, end_of_text, encode_special = "deaf", END, staticmethod(ids)

        def encode(self, text):
            return ids(text.replace("\x04", ""))

    rows = encode_examples([Example("a", "", "\x04"), Example("a", "", "b")], Deaf(), STYLE)
    assert (rows.entries.tolist(), rows.dropped) == ([1], 1)
    with pytest.raises(InputError, match="none of the 1 entries"):
        encode_examples([Example("a", "", "\x04")], Deaf(), STYLE)


# Cache


EXAMPLES = [LONG, Example("s", "i", "t"), Example("abc", "", "\ud800")]


def assert_equal(left, right):
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)
        assert getattr(value, "dtype", int) == getattr(getattr(right, name), "dtype", int)


def test_the_cache_gives_what_encoding_gives(tmp_path, monkeypatch):
    first = encode_cached(EXAMPLES, BYTES, STYLE, 14, "truncate", tmp_path / "new" / "folder")
    assert_equal(first, encode_examples(EXAMPLES, BYTES, STYLE, 14, "truncate"))
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".npz"]
    monkeypatch.setattr("instruct_lm.data.dataset.encode_examples", None)  # a second encoding would fail
    assert_equal(first, encode_cached(EXAMPLES, BYTES, STYLE, 14, "truncate", tmp_path / "new" / "folder"))


def test_whatever_changes_the_ids_changes_the_cache_file(tmp_path, monkeypatch):
    other_style = PromptStyle("test", opening="Q:", input_lead="|", closing=";", header="R:")
    (tmp_path / "m.txt").write_text("t h\n")
    cases = [
        (EXAMPLES, BYTES, STYLE, None, "drop"),
        (EXAMPLES[::-1], BYTES, STYLE, None, "drop"),
        (EXAMPLES[:2], BYTES, STYLE, None, "drop"),
        (
            [Example("abcde", "f", "xyz"), *EXAMPLES[1:]],
            BYTES,
            STYLE,
            None,
            "drop",
        ),  # the same characters, cut elsewhere
        (EXAMPLES, load_tokenizer(tmp_path / "m.txt"), STYLE, None, "drop"),
        (EXAMPLES, BYTES, other_style, None, "drop"),
        (EXAMPLES, BYTES, STYLE, 14, "drop"),
        (EXAMPLES, BYTES, STYLE, 14, "truncate"),
    ]
    for number, case in enumerate(cases, start=1):
        assert_equal(encode_cached(*case, tmp_path / "cache"), encode_examples(*case))
        assert len(list((tmp_path / "cache").iterdir())) == number


@pytest.mark.parametrize("damage", ["empty", "half", "junk", "flipped", "other"])
def test_a_damaged_cache_is_made_anew(tmp_path, caplog, damage):
    expected = encode_cached(EXAMPLES, BYTES, STYLE, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    place = whole.index(np.int32(ord("Q")).tobytes() + np.int32(ord(":")).tobytes())
    flipped = whole[:place] + b"\x07" + whole[place + 1 :]
    if damage == "other":
        np.savez(path, something=np.arange(3))
    else:
        path.write_bytes(
            {"empty": b"", "half": whole[: len(whole) // 2], "junk": b"\x00" * 99, "flipped": flipped}[damage]
        )
    with caplog.at_level(logging.WARNING):
        assert_equal(encode_cached(EXAMPLES, BYTES, STYLE, cache_dir=tmp_path), expected)
    assert "damaged" in caplog.text
    caplog.clear()
    assert_equal(encode_cached(EXAMPLES, BYTES, STYLE, cache_dir=tmp_path), expected)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    encoded = encode_cached(EXAMPLES, BYTES, STYLE, cache_dir=tmp_path / "file")
    assert_equal(encoded, encode_examples(EXAMPLES, BYTES, STYLE))
    assert "cannot write the token cache" in caplog.text


# Weights


ROW = EncodedExample(np.arange(7, dtype=np.int32), prompt_length=3, header_length=2)  # 2 of response and end token


@pytest.mark.parametrize(
    ("weight", "mask_header", "expected"),
    [
        (1.0, False, [0, 1, 1, 1, 1, 1, 1]),
        (0.0, False, [0, 0, 0, 1, 1, 1, 1]),
        (0.0, True, [0, 0, 0, 0, 0, 1, 1]),
        (0.25, False, [0, 0.25, 0.25, 1, 1, 1, 1]),
        (0.25, True, [0, 0.25, 0.25, 0.25, 0.25, 1, 1]),
        (1.0, True, [0, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_loss_weights(weight, mask_header, expected):
    weights = loss_weights(ROW, weight, mask_header)
    assert weights.tolist() == expected
    assert weights.dtype == np.float32


def test_masking_equals_the_books_exercise():
    """Exercise 7.2: `targets[i, :instruction_length - 1] = -100`, with targets = the ids from the second on."""
    (row,) = encode_examples([Example("in", "put", "out")], BYTES, ALPACA)
    targets = row.input_ids[1:].copy()
    targets[: len(BYTES.encode(ALPACA.prompt(Example("in", "put", "out")))) - 1] = -100
    ours = np.where(loss_weights(row, 0.0)[1:] == 1, row.input_ids[1:], -100)
    assert ours.tolist() == targets.tolist()


def test_resolve_prompt_loss_weight():
    assert resolve_prompt_loss_weight(False, None) == 1
    assert resolve_prompt_loss_weight(True, None) == 0
    assert [resolve_prompt_loss_weight(mask, 0.1) for mask in (False, True)] == [0.1, 0.1]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="prompt_loss_weight="):
            resolve_prompt_loss_weight(True, wrong)


# The 1100 entries: the numbers of the design


@pytest.fixture(scope="module")
def real(shared_dir):
    return load_examples(shared_dir / "data" / "instruction-data.json")


@pytest.fixture(scope="module")
def gpt2(shared_dir):
    return load_tokenizer(gpt2_file(shared_dir, "vocab.bpe"))


def test_the_1100_entries_have_the_published_numbers(real, gpt2):
    rows = encode_examples(real, gpt2, ALPACA)
    assert [len(part) for part in split(real)] == [935, 110, 55]
    assert (len(rows), round(float(rows.lengths.mean()), 1), rows.lengths.max()) == (1100, 57.4, 92)
    same = [len({int(row.input_ids[i]) for row in rows}) == 1 for i in range(25)]
    assert same == [True] * 24 + [False]
    assert [(row.input_ids == 50256).sum() for row in rows] == [1] * 1100


@pytest.mark.parametrize("style", [ALPACA, PHI3], ids=lambda style: style.name)
def test_encoding_the_pieces_equals_encoding_the_joined_text(real, gpt2, style):
    rows = encode_examples(real, gpt2, style)
    joined = [[*gpt2.encode(style.full(example)), 50256] for example in real]
    assert [row.input_ids.tolist() for row in rows] == joined
    assert [row.prompt_length for row in rows] == [len(gpt2.encode(style.prompt(example))) for example in real]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_smollm2_encodes_pieces_and_joined_text_alike(real, smollm2_gguf, style):
    smollm2 = load_tokenizer(smollm2_gguf)
    rows = encode_examples(real, smollm2, style)
    assert [row.input_ids.tolist() for row in rows] == [[*smollm2.encode_special(style.full(e)), 2] for e in real]
    turns = 1 + (style is CHATML)  # chatml closes the user's turn with the same token
    assert {int((row.input_ids == 2).sum()) for row in rows} == {turns}
    assert {int((row.input_ids == 2)[loss_weights(row, 0.0) > 0].sum()) for row in rows} == {1}


def test_duplicates_among_the_1100_entries(real):
    duplicates = duplicates_between(split(real))
    texts = [(e.instruction.casefold().split(), e.input.casefold().split()) for e in real]
    assert len(duplicates) == 5
    for duplicate in duplicates:
        text = (duplicate.example.instruction.casefold().split(), duplicate.example.input.casefold().split())
        assert texts.count(text) == sum(map(len, duplicate.places.values())) >= 2
