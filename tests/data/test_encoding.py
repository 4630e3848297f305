import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data.dataset import load_conversations
from instruct_lm.data.encoding import (
    EncodedExample,
    encode_cached,
    encode_conversations,
    loss_weights,
    resolve_prompt_loss_weight,
)
from instruct_lm.data.prompts import ALPACA, CHATML, PHI3, STYLES, Example, PromptStyle
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from tests.data import gpt2_file

BYTES = load_tokenizer("bytes")
END = BYTES.end_of_text
STYLE = PromptStyle("test", opening="Q:", input_lead="|", closing=";", header="A:")  # with BYTES: one token a character


def ids(text):
    return list(text.encode())


def test_encoding_is_prompt_header_response_and_one_end_token():
    rows = encode_conversations([Example("in", "put", "out"), Example("i", "", "o")], BYTES, STYLE)
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
    for example, row in zip(examples, encode_conversations(examples, BYTES, style), strict=True):
        prompt, response = row.prompt_length, row.prompt_length + row.header_length
        assert BYTES.decode(row.input_ids[:prompt]) == style.prompt(example)
        assert BYTES.decode(row.input_ids[prompt:response]) == style.header
        assert BYTES.decode(row.input_ids[response:-1]) == example.output
        assert (row.input_ids == END).tolist() == [False] * (len(row.input_ids) - 1) + [True]


def test_entries_of_100_000_characters():
    (row,) = encode_conversations([Example("a" * 100_000, "\U0001f600" * 100_000, "b " * 50_000)], BYTES, STYLE)
    assert len(row.input_ids) == len("Q:|;A:") + 100_000 + 400_000 + 100_000 + 1


def test_an_end_token_spelled_out_by_the_user_is_text():
    (row,) = encode_conversations([Example("<|endoftext|>", "<|im_end|>", "<|endoftext|>")], BYTES, CHATML)
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
    rows = encode_conversations([LONG, Example("s", "", "t")], BYTES, STYLE, max_length, overlong)
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
        encode_conversations([LONG, Example("s", "", "t")], BYTES, STYLE, 3, overlong)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate", "error"])
def test_a_row_of_exactly_max_length_is_kept_whole(overlong):
    rows = encode_conversations([LONG], BYTES, STYLE, 15, overlong)
    assert rows[0].input_ids.tolist() == [*ids("Q:abcdef;A:xyz"), END]
    assert (rows.dropped, rows.truncated) == (0, 0)


def test_overlong_error_names_the_entries_and_the_remedy():
    with pytest.raises(InputError) as error:
        encode_conversations([Example("s", "", "t"), LONG], BYTES, STYLE, 14, "error")
    assert "1 of 2 entries are longer than max_length=14: entry 2 (15 tokens)" in str(error.value)
    assert "drop, truncate_prompt, truncate" in str(error.value)
    with pytest.raises(InputError, match="overlong='cut'"):
        encode_conversations([LONG], BYTES, STYLE, 14, "cut")


@given(
    st.lists(st.builds(Example, st.text("ab", min_size=1), st.text("cd"), st.text("ef", min_size=1)), min_size=1),
    st.integers(8, 30),
    st.sampled_from(["drop", "truncate_prompt", "truncate"]),
)
def test_no_row_is_too_long_or_without_response_and_every_entry_is_accounted_for(examples, max_length, overlong):
    examples = [*examples, Example("s", "", "t")]
    rows = encode_conversations(examples, BYTES, STYLE, max_length, overlong)
    assert len(rows) + rows.dropped == len(examples)
    whole = encode_conversations(examples, BYTES, STYLE)
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

    rows = encode_conversations([Example("a", "", "\x04"), Example("a", "", "b")], Deaf(), STYLE)
    assert (rows.entries.tolist(), rows.dropped) == ([1], 1)
    with pytest.raises(InputError, match="none of the 1 entries"):
        encode_conversations([Example("a", "", "\x04")], Deaf(), STYLE)


# Cache


EXAMPLES = [LONG, Example("s", "i", "t"), Example("abc", "", "\ud800")]


def assert_equal(left, right):
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)
        assert getattr(value, "dtype", int) == getattr(getattr(right, name), "dtype", int)


def test_the_cache_gives_what_encoding_gives(tmp_path, monkeypatch):
    first = encode_cached(EXAMPLES, BYTES, STYLE, 14, "truncate", tmp_path / "new" / "folder")
    assert_equal(first, encode_conversations(EXAMPLES, BYTES, STYLE, 14, "truncate"))
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".npz"]
    monkeypatch.setattr("instruct_lm.data.encoding.encode_conversations", None)  # a second encoding would fail
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
        assert_equal(encode_cached(*case, tmp_path / "cache"), encode_conversations(*case))
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
    assert_equal(encoded, encode_conversations(EXAMPLES, BYTES, STYLE))
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
    (row,) = encode_conversations([Example("in", "put", "out")], BYTES, ALPACA)
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
    return load_conversations(shared_dir / "data" / "instruction-data.json")


@pytest.fixture(scope="module")
def gpt2(shared_dir):
    return load_tokenizer(gpt2_file(shared_dir, "vocab.bpe"))


def test_the_1100_entries_have_the_published_numbers(real, gpt2):
    rows = encode_conversations(real, gpt2, ALPACA)
    assert (len(rows), round(float(rows.lengths.mean()), 1), rows.lengths.max()) == (1100, 57.4, 92)
    same = [len({int(row.input_ids[i]) for row in rows}) == 1 for i in range(25)]
    assert same == [True] * 24 + [False]
    assert [(row.input_ids == 50256).sum() for row in rows] == [1] * 1100


@pytest.mark.parametrize("style", [ALPACA, PHI3], ids=lambda style: style.name)
def test_encoding_the_pieces_equals_encoding_the_joined_text(real, gpt2, style):
    rows = encode_conversations(real, gpt2, style)
    joined = [[*gpt2.encode(style.full(example)), 50256] for example in real]
    assert [row.input_ids.tolist() for row in rows] == joined
    assert [row.prompt_length for row in rows] == [len(gpt2.encode(style.prompt(example))) for example in real]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_smollm2_encodes_pieces_and_joined_text_alike(real, smollm2_gguf, style):
    smollm2 = load_tokenizer(smollm2_gguf)
    rows = encode_conversations(real, smollm2, style)
    assert [row.input_ids.tolist() for row in rows] == [[*smollm2.encode_special(style.full(e)), 0] for e in real]
    assert {int((row.input_ids == 2).sum()) for row in rows} == {int(style is CHATML)}  # it closes the user's turn
    assert {int((row.input_ids == 0).sum()) for row in rows} == {1}
    assert {int((row.input_ids == 0)[loss_weights(row, 0.0) > 0].sum()) for row in rows} == {1}
