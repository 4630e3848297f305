import json
import logging
from itertools import accumulate, pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.dataset import load_conversations
from instruct_lm.data.encoded import EncodedExample, loss_weights, resolve_prompt_loss_weight
from instruct_lm.data.encoding import encode_cached, encode_conversations, encode_pieces
from instruct_lm.data.pieces import Kind, Piece, prompt_pieces, prompt_text
from instruct_lm.data.prompts import ALPACA, CHATML, PHI3, STYLES, PlainStyle
from instruct_lm.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from instruct_lm.data.tokenizer_definition import PRE_TOKENIZERS, bpe_definition, byte_symbols, without_added
from instruct_lm.errors import InputError
from tests.data import gpt2_file
from tests.data.hub_tokenizers import train, write_gguf

BYTES = load_tokenizer("bytes")
END = BYTES.end_of_text
STYLE = PlainStyle("test", user="Q:", input_lead="|", user_end=";", header="A:")  # with BYTES: one token a character


def ids(text):
    return list(text.encode())


def kinds_of(row):
    return "".join(map(str, row.kinds))


def prompt_length(row):
    return int((row.kinds == Kind.PROMPT).sum())  # of one exchange


def test_encoding_is_prompt_header_response_and_one_end_token():
    rows = encode_conversations([Conversation.of("in", "put", "out"), Conversation.of("i", "", "o")], BYTES, STYLE)
    assert [row.input_ids.tolist() for row in rows] == [[*ids("Q:in|put;A:out"), END], [*ids("Q:i;A:o"), END]]
    assert [kinds_of(row) for row in rows] == ["000000000112222", "00001122"]
    assert (rows.lengths.tolist(), rows.entries.tolist(), rows.dropped, rows.truncated) == ([15, 8], [1, 2], 0, 0)
    assert rows.input_ids.dtype == np.int32
    assert rows[-1].input_ids.base is not None  # a view, not a copy
    with pytest.raises(IndexError):
        rows[2]


@given(
    st.lists(st.builds(Conversation.of, st.text(), st.text(), st.text(min_size=1)), min_size=1),
    st.sampled_from(list(STYLES)),
)
def test_any_example_decodes_to_its_text(examples, style):
    style = STYLES[style]
    for example, row in zip(examples, encode_conversations(examples, BYTES, style), strict=True):
        prompt, header, response = (row.input_ids[row.kinds == kind] for kind in Kind)
        assert BYTES.decode(prompt) == prompt_text(style, example.turns)
        assert BYTES.decode(header) == style.header
        assert BYTES.decode(response) == example.reference + "<|endoftext|>" + style.after
        assert (row.input_ids == END).sum() == 1
        assert sorted(kinds_of(row)) == list(kinds_of(row))


def test_entries_of_100_000_characters():
    (row,) = encode_conversations([Conversation.of("a" * 100_000, "\U0001f600" * 100_000, "b " * 50_000)], BYTES, STYLE)
    assert len(row.input_ids) == len("Q:|;A:") + 100_000 + 400_000 + 100_000 + 1


def test_an_end_token_spelled_out_by_the_user_is_text():
    (row,) = encode_conversations([Conversation.of("<|endoftext|>", "<|im_end|>", "<|endoftext|>")], BYTES, CHATML)
    assert (row.input_ids == END).sum() == 1


# With STYLE and BYTES: "Q:abcdef;A:xyz" and the end token, 15 ids, 9 of them the prompt.
LONG = Conversation.of("abcdef", "", "xyz")


@pytest.mark.parametrize(
    ("overlong", "max_length", "text", "prompt"),
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
def test_overlong(overlong, max_length, text, prompt):
    rows = encode_conversations([LONG, Conversation.of("s", "", "t")], BYTES, STYLE, max_length, overlong)
    assert rows[-1].input_ids.tolist() == [*ids("Q:s;A:t"), END]
    assert prompt_length(rows[-1]) == 4
    if text is None:
        assert (len(rows), rows.entries.tolist(), rows.dropped, rows.truncated) == (1, [2], 1, 0)
    else:
        assert rows[0].input_ids.tolist() == [END if c == "$" else ord(c) for c in text]
        assert prompt_length(rows[0]) == prompt
        assert (len(rows), rows.dropped, rows.truncated) == (2, 0, 1)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate", "error"])
def test_no_row_left_is_an_error(overlong):
    with pytest.raises(InputError, match=r"2 of 2 entries are longer than max_length=3: entry 1 \(15 tokens\), 2 \(8"):
        encode_conversations([LONG, Conversation.of("s", "", "t")], BYTES, STYLE, 3, overlong)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate", "error"])
def test_a_row_of_exactly_max_length_is_kept_whole(overlong):
    rows = encode_conversations([LONG], BYTES, STYLE, 15, overlong)
    assert rows[0].input_ids.tolist() == [*ids("Q:abcdef;A:xyz"), END]
    assert (rows.dropped, rows.truncated) == (0, 0)


def test_overlong_error_names_the_entries_and_the_remedy():
    with pytest.raises(InputError) as error:
        encode_conversations([Conversation.of("s", "", "t"), LONG], BYTES, STYLE, 14, "error")
    assert "1 of 2 entries are longer than max_length=14: entry 2 (15 tokens)" in str(error.value)
    assert "drop, truncate_prompt, truncate" in str(error.value)
    with pytest.raises(InputError, match="overlong='cut'"):
        encode_conversations([LONG], BYTES, STYLE, 14, "cut")


@given(
    st.lists(
        st.builds(Conversation.of, st.text("ab", min_size=1), st.text("cd"), st.text("ef", min_size=1)), min_size=1
    ),
    st.integers(8, 30),
    st.sampled_from(["drop", "truncate_prompt", "truncate"]),
)
def test_no_row_is_too_long_or_without_response_and_every_entry_is_accounted_for(examples, max_length, overlong):
    examples = [*examples, Conversation.of("s", "", "t")]
    rows = encode_conversations(examples, BYTES, STYLE, max_length, overlong)
    assert len(rows) + rows.dropped == len(examples)
    whole = encode_conversations(examples, BYTES, STYLE)
    cut = 0
    for row, entry in zip(rows, rows.entries, strict=True):
        response = row.input_ids[row.kinds == Kind.RESPONSE]
        expected = [*ids(examples[entry - 1].reference), END]
        assert len(row.input_ids) <= max_length
        assert len(response) >= 1
        assert response.tolist() == expected[: len(response)]
        assert response[0] != END
        assert overlong == "truncate" or len(response) == len(expected)
        cut += len(row.input_ids) < len(whole[int(entry) - 1].input_ids)
    assert rows.truncated == cut


def test_a_response_without_tokens_is_dropped_and_counted():
    class Deaf:  # stands for SmolLM2's vocabulary, in which a few control characters have no token
        name, end_of_text, bos, control_tokens = "deaf", END, None, {}
        end_token = Tokenizer.end_token

        def encode_parts(self, texts):
            return [[i for i in ids(text) if i != 4] for text in texts]

        def control_spans(self, text):
            return []

    rows = encode_conversations([Conversation.of("a", "", "\x04"), Conversation.of("a", "", "b")], Deaf(), STYLE)
    assert (rows.entries.tolist(), rows.dropped) == ([2], 1)
    with pytest.raises(InputError, match="none of the 1 entries"):
        encode_conversations([Conversation.of("a", "", "\x04")], Deaf(), STYLE)


# Cache


EXAMPLES = [LONG, Conversation.of("s", "i", "t"), Conversation.of("abc", "", "\ud800")]


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
    other_style = PlainStyle("test", user="Q:", input_lead="|", user_end=";", header="R:")
    (tmp_path / "m.txt").write_text("t h\n")
    cases = [
        (EXAMPLES, BYTES, STYLE, None, "drop"),
        (EXAMPLES[::-1], BYTES, STYLE, None, "drop"),
        (EXAMPLES[:2], BYTES, STYLE, None, "drop"),
        (
            [Conversation.of("abcde", "f", "xyz"), *EXAMPLES[1:]],
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


ROW = EncodedExample(np.arange(7, dtype=np.int32), np.array([0, 0, 0, 1, 1, 2, 2], dtype=np.uint8))


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
    (row,) = encode_conversations([Conversation.of("in", "put", "out")], BYTES, ALPACA)
    targets = row.input_ids[1:].copy()
    targets[: len(BYTES.encode(prompt_text(ALPACA, Conversation.of("in", "put", "out").turns))) - 1] = -100
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


def text_of(style, conversation):
    return "".join(piece.text for piece in style.pieces(conversation.turns) if not piece.ends)


@pytest.mark.parametrize("style", [ALPACA, PHI3], ids=lambda style: style.name)
def test_encoding_the_pieces_equals_encoding_the_joined_text(real, gpt2, style):
    rows = encode_conversations(real, gpt2, style)
    joined = [[*gpt2.encode(text_of(style, entry)), 50256] for entry in real]
    assert [row.input_ids.tolist() for row in rows] == joined
    assert [prompt_length(row) for row in rows] == [len(gpt2.encode(prompt_text(style, e.turns))) for e in real]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_smollm2_encodes_pieces_and_joined_text_alike(real, smollm2_gguf, style):
    smollm2 = load_tokenizer(smollm2_gguf)
    rows = encode_conversations(real, smollm2, style)
    end = "<|im_end|>" if style is CHATML else "<|endoftext|>"
    for entry, row in zip(real, rows, strict=True):
        text = "".join(end if piece.ends else piece.text for piece in style.pieces(entry.turns))
        assert row.input_ids.tolist() == smollm2.encode_special(text)
        assert ((row.input_ids == smollm2.control_tokens[end]) & (loss_weights(row, 0.0) > 0)).sum() == 1


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def hub_tokenizer(request, tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", train(request.param), request.param))


PIECES = st.text(st.sampled_from("ab .,!?\n\t7é"), min_size=1, max_size=12)


@given(PIECES, PIECES, st.text(st.sampled_from("ab \n"), max_size=4), st.sampled_from(list(STYLES)))
def test_a_prompt_has_the_ids_of_its_whole_text(hub_tokenizer, instruction, response, context, style):
    """Qwen2 and Llama 3 have tokens, such as `.` with line breaks, that reach from an instruction into the header."""
    turns = Conversation.of(instruction, context, response).turns
    encoded = encode_pieces(STYLES[style].pieces(turns), hub_tokenizer)
    place = next(i for i, item in enumerate(encoded) if item.piece.kind == Kind.RESPONSE)
    prompt = "".join(item.piece.text for item in encoded[:place])
    bos = [] if hub_tokenizer.bos is None else [hub_tokenizer.bos]
    assert [i for item in encoded[:place] for i in item.ids] == bos + hub_tokenizer.encode_special(prompt)
    assert [*encoded[place].ids] == hub_tokenizer.encode(response)


def test_a_token_across_pieces_belongs_to_the_first():
    class Pairs:  # one token for two characters
        name, bos, end_of_text, control_tokens = "pairs", None, END, {}
        end_token = Tokenizer.end_token

        def encode_parts(self, texts):
            ends = [0, *accumulate(map(len, texts))]
            starts = range(0, ends[-1], 2)
            return [[1000 + start for start in starts if i <= start < j] for i, j in pairwise(ends)]

        def control_spans(self, text):
            return []

    (row,) = encode_conversations([Conversation.of("x", "", "yz")], Pairs(), STYLE)
    # Q: x; A: yz $
    assert row.input_ids.tolist() == [1000, 1002, 1004, 1000, END]
    assert kinds_of(row) == "00122"
    pieces = STYLE.pieces(Conversation.of("x", "", "yz").turns)
    # Q: x ;A: yz $
    assert [list(ids) for _, ids in encode_pieces(pieces, Pairs(), apart=True)] == [
        *([1000], [1000], [1000], [1002], [1000], [END])
    ]


@given(st.lists(st.text("ab ,.\n\t7é😀語\u0301\u0323\0<|endoftext|>'"), min_size=1, max_size=5))
def test_texts_encoded_together_have_the_ids_of_the_whole_and_the_characters_of_each(hub_tokenizer, texts):
    for tokenizer in (hub_tokenizer, BYTES):
        parts = tokenizer.encode_parts(texts)
        assert len(parts) == len(texts)
        assert [i for part in parts for i in part] == tokenizer.encode("".join(texts))
    assert [bytes(part).decode() for part in parts] == texts  # with one token a byte, each has its own


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def all_pairs(request, tmp_path_factory):
    """A tokenizer that merges all neighbours of a word, up to four characters."""
    symbols = [*byte_symbols()]
    pairs = [(x, y) for x in "aĠĊ.1'" for y in "aĠĊ.1'"]
    tokens = ["".join(pair) for pair in pairs]
    merges = [" ".join(pair) for pair in [*pairs, *((x, y) for x in tokens for y in tokens)]]
    joined = dict.fromkeys([*symbols, *(merge.replace(" ", "") for merge in merges)])
    vocabulary = {token: i for i, token in enumerate(joined)}
    definition = bpe_definition(vocabulary, merges, {len(vocabulary): END_OF_TEXT}, request.param)
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    return load_tokenizer(folder)


@given(st.lists(st.text("a .\n1'", max_size=9), min_size=2, max_size=4))
def test_no_split_of_a_text_shows_in_its_ids(all_pairs, texts):
    parts = all_pairs.encode_parts(texts)
    assert [i for part in parts for i in part] == all_pairs.encode("".join(texts))


@pytest.fixture(scope="module")
def gpt2_merges(tmp_path_factory):
    merges = [" ".join(merge) for merge in json.loads(train("gpt-2").to_str())["model"]["merges"]]
    path = tmp_path_factory.mktemp("merges") / "merges.txt"
    path.write_text("\n".join(merges), encoding="utf-8")
    return load_tokenizer(path)  # which tiktoken encodes


@given(st.lists(st.text("ab ,.\n\t7é😀語<|endoftext|>"), min_size=1, max_size=5))
def test_tiktoken_tells_texts_apart_as_tokenizers_does(gpt2_merges, texts):
    parts = gpt2_merges.encode_parts(texts)
    spans = tokenizers.Tokenizer.from_str(json.dumps(without_added(gpt2_merges.definition(), {END_OF_TEXT}))).encode(
        "".join(texts)
    )
    ends = [0, *accumulate(map(len, texts))]
    starts = [(i, start) for i, (start, _) in zip(spans.ids, spans.offsets, strict=True)]
    assert parts == [[i for i, start in starts if first <= start < last] for first, last in pairwise(ends)]


class Together:
    """Notes which texts are encoded together; each has one token."""

    bos, end_of_text, control_tokens = None, 0, {"|": 1}
    end_token = Tokenizer.end_token

    def __init__(self):
        self.runs = []

    def encode_parts(self, texts):
        self.runs.append(" ".join(texts))
        return [[9] for _ in texts]

    def control_spans(self, text):
        return [(at, at + 1, 1) for at, character in enumerate(text) if character == "|"]


@pytest.mark.parametrize(
    ("apart", "runs"),
    [(False, ["a", "b u h", "r", "n", "| s"]), (True, ["a", "b", "u", "h", "r", "n", "|", "s"])],
)
def test_tokens_never_reach_across_a_control_token_an_end_or_the_beginning_of_a_response(apart, runs):
    tokenizer = Together()
    pieces = [
        *(Piece("a|b", Kind.PROMPT), Piece("u", Kind.PROMPT, own=False), Piece("h", Kind.HEADER)),
        *(Piece("r", Kind.RESPONSE, own=False), Piece("", Kind.RESPONSE, ends=True), Piece("n|", Kind.PROMPT)),
        *(Piece("|", Kind.PROMPT, own=False), Piece("s", Kind.PROMPT)),
    ]
    encoded = encode_pieces(pieces, tokenizer, apart)
    assert tokenizer.runs == runs
    assert [piece for piece, _ in encoded] == pieces
    assert [ids for _, ids in encoded] == [[9, 1, 9], [9], [9], [9], [0], [9, 1], [9], [9]]


def test_a_lone_surrogate_of_a_style_is_replaced():
    style = PlainStyle("t", "Q\ud800:", "|", ";", "A:")
    (row,) = encode_conversations([Conversation.of("x", "", "y")], BYTES, style)
    assert BYTES.decode(row.input_ids) == "Q\ufffd:x;A:y<|endoftext|>"


# Several turns

CHAT = Conversation(
    (
        Turn("system", "s"),
        Turn("user", "u1"),
        Turn("assistant", "a1"),
        Turn("user", "u2", "in"),
        Turn("assistant", "a2"),
    )
)


def test_every_assistant_turn_is_trained_and_the_rest_is_prompt():
    style = PlainStyle("t", "Q:", "|", ";", "A:", after="!", between="/", system="S:", system_end=".")
    (row,) = encode_conversations([CHAT], BYTES, style)
    assert BYTES.decode(row.input_ids) == "S:s.Q:u1;A:a1<|endoftext|>!/Q:u2|in;A:a2<|endoftext|>!"
    #                        S:s.Q:u1; A: a1$! /Q:u2|in; A: a2$!
    assert kinds_of(row) == "000000000112222000000000112222"
    assert loss_weights(row, 0.0, mask_header=True).tolist() == [float(kind == "2") for kind in kinds_of(row)]


TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab<|im_end|>\n", min_size=1, max_size=8)), max_size=6
)


@given(TURNS, st.text("xyz", min_size=1), st.sampled_from(list(STYLES)), st.booleans())
def test_a_prompt_is_the_beginning_of_the_row_at_every_response(turns, last, style, with_system):
    """Generation after any number of turns sees the ids that training has before that response."""
    system = [Turn("system", "be brief")] if with_system else []
    turns = (*system, Turn("user", "q"), *(Turn(*turn) for turn in turns), Turn("assistant", last))
    (row,) = encode_conversations([Conversation(turns)], BYTES, STYLES[style])
    for end, turn in enumerate(turns, start=1):
        if turn.role == "assistant":
            pieces = prompt_pieces(STYLES[style].pieces(turns[:end]))
            prompt = [i for item in encode_pieces(pieces, BYTES) for i in item.ids]
            assert row.input_ids[: len(prompt)].tolist() == prompt
            said = row.input_ids[len(prompt) :][: len(ids(turn.text))]
            assert bytes(said.tolist()).decode() == turn.text
    assert (row.input_ids == END).sum() == sum(turn.role == "assistant" for turn in turns)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (54, "S:s.Q:u1;A:a1$Q:u2|in;A:a2$"),
        (26, "S:s.Q:u2|in;A:a2$"),  # without the first exchange
        (16, "S:s.Q:u2|i;A:a2$"),
        (13, "S:s.Q:u;A:a2$"),  # one token of each text stays
        (12, None),
    ],
)
def test_long_conversations_lose_their_earliest_exchanges_first(limit, text):
    style = PlainStyle("t", "Q:", "|", ";", "A:", system="S:", system_end=".")
    other = Conversation.of("q", "", "r")
    rows = encode_conversations([CHAT, other], BYTES, style, limit, "truncate_prompt")
    if text is None:
        assert rows.entries.tolist() == [2]
    else:
        assert rows[0].input_ids.tolist() == [END if c == "$" else ord(c) for c in text]


def test_numbers_in_messages_are_those_of_the_file():
    entries = [Conversation.of("a", "", "b", number=7), Conversation.of("a" * 99, "", "b", number=12)]
    with pytest.raises(InputError, match=r"entry 12 \("):
        encode_conversations(entries, BYTES, STYLE, 50, "error")
    assert encode_conversations(entries, BYTES, STYLE, 50).entries.tolist() == [7]


def test_a_limit_that_the_style_alone_fills_is_named():
    own = len(ALPACA.default_system + ALPACA.user + ALPACA.header) + 1  # bytes and the end token
    with pytest.raises(InputError, match=f"The prompt style alone takes {own} tokens: raise max_length, or choose"):
        encode_conversations([LONG], BYTES, ALPACA, 16)


def test_a_tokenizers_bos_begins_every_row_once():
    class WithBos:
        name, bos, end_of_text, control_tokens = "b", 1, END, {}
        end_token = Tokenizer.end_token

        def encode_parts(self, texts):
            return [ids(text) for text in texts]

        def control_spans(self, text):
            return [(0, 1, 1)] if text.startswith("^") else []

    for style in (STYLE, PlainStyle("t", "^Q:", "|", ";", "A:")):
        (row,) = encode_conversations([Conversation.of("x", "", "y")], WithBos(), style)
        assert row.input_ids.tolist() == [1, *ids("Q:x;A:y"), END]
        assert kinds_of(row) == "000001122" if style is STYLE else "00000" + "1122"
