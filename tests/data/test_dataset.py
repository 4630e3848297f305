import gzip
import json
import logging
import math
import shlex
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import instruct_lm.data
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.dataset import Splits, duplicates_between, load_conversations, read_conversations, split
from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher
from tests.conftest import ROOT

ENTRY = {"instruction": "Say hi.", "input": "", "output": "Hi."}
of = Conversation.of


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def lines(report, level=None):
    return [line for at, line in report if level in (None, at)]


# Loading


def test_a_list_of_entries_is_read_as_a_file_is(write):
    entries = [ENTRY, {"prompt": "q", "completion": 5}, ENTRY | {"output": math.nan}, ENTRY | {"x": 1}]
    assert read_conversations(entries) == read_conversations(write(entries))
    assert [conversation.number for conversation in load_conversations(entries)] == [1, 2, 4]


def test_a_lone_surrogate_is_kept_for_the_tokenizer(write):
    assert load_conversations(write([ENTRY | {"output": "\ud800"}])) == [of("Say hi.", "", "\ud800", 1)]


def test_the_report_says_what_was_taken(write):
    entries = [
        ENTRY | {"category": "x", "score": 1},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "r"},
            ]
        },
        ENTRY | {"input": "<noinput>", "output": 5, "category": "y"},
        ENTRY | {"input": None},
        ENTRY | {"output": " "},
        {"messages": []},
    ]
    assert read_conversations(write(entries)).report == [
        (20, "6 entries: 4 as Alpaca (instruction, input, output), 2 as messages (messages): 4 conversations, 8 turns"),
        (30, "2 of 6 entries are unusable and dropped (data.unusable=drop): entry 5: the response is blank; entry 6: there is no response"),
        (20, "numbers count as their text: output (1 entry)"),
        (20, "null and NaN count as blank: input (1 entry)"),
        (30, "inputs that stand for none stay in the prompt; data.clean=true drops them: <noinput> (1 entry)"),
        (30, "what follows the last response is cut: turns (1 entry)"),
        (30, "keys that nothing uses: category (2 entries), score (1 entry)"),
    ]  # fmt: skip
    (line,) = (line for line in lines(read_conversations(entries, clean=True).report) if "none" in line)
    assert line == "inputs that stand for none are dropped from the prompt: <noinput> (1 entry)"


def test_the_report_is_logged(write, caplog):
    with caplog.at_level(logging.INFO):
        load_conversations(
            write([{"Question": "q", "Answer": "a"}]), columns={"instruction": "Question", "output": "Answer"}
        )
    assert caplog.messages == [
        "data: 1 entries as Alpaca (instruction=Question, output=Answer): 1 conversations, 2 turns"
    ]


def test_limit_takes_the_first_entries_and_does_not_read_on(write):
    path = write(json.dumps([ENTRY, ENTRY | {"output": ""}, "broken"])[:-1].encode() + b" never closed")
    assert [conversation.number for conversation in load_conversations(path, limit=2)] == [1]
    with pytest.raises(InputError, match=r"not JSON: Expecting ',' delimiter"):
        load_conversations(path)
    with pytest.raises(InputError, match="limit=0"):
        load_conversations(path, limit=0)


def test_sample_is_the_packaged_file():
    conversations = load_conversations("sample")
    packaged = Path(instruct_lm.data.__file__).with_name("sample.json")
    assert len(conversations) == len(json.loads(packaged.read_text(encoding="utf-8"))) >= 500
    assert len({conversation.prompt for conversation in conversations}) == len(conversations)


def test_malformed_entries_are_named_with_number_and_fault_also_with_drop(write):
    path = write([ENTRY, {"instruction": "x"}, ENTRY | {"output": ""}, ENTRY | {"output": ["x"]}, 5])
    with pytest.raises(InputError) as error:
        load_conversations(path, unusable="drop")
    assert str(error.value).split("\n") == [
        f"{path}: 3 of 5 entries are malformed. Correct or remove them.",
        "  entry 2: output is missing (its keys: instruction)",
        "  entry 4: output is a list, not text",
        "  entry 5: it is a number, not an object with keys",
    ]


def test_a_malformed_json_line_is_named_with_its_line(write):
    text = "\n".join([json.dumps(ENTRY), "", json.dumps({"instruction": "x"})])
    with pytest.raises(InputError, match=r"entry 2 \(line 3\): output is missing"):
        load_conversations(write(text.encode()))


def test_ten_faults_are_listed_and_all_are_counted(write):
    with pytest.raises(InputError) as error:
        load_conversations(write([ENTRY] + [{}] * 25))
    first, *listed, last = str(error.value).split("\n")
    assert "25 of 26 entries are malformed" in first
    assert [line.split(":")[0] for line in listed] == [f"  entry {n}" for n in range(2, 12)]
    assert last == "  and 15 more"


@pytest.mark.parametrize(
    ("keys", "remedy", "options"),
    [
        (["question", "answer"], "'{instruction: question, output: answer}'", "instruction=question output=answer"),
        (["instruction", "response"], "'{output: response}'", "output=response"),
        (["x", "y"], "'{instruction: KEY, output: KEY}'", "instruction=KEY output=KEY"),
    ],
)
def test_keys_that_no_entry_has_are_a_matter_of_columns(write, keys, remedy, options):
    path = write([dict.fromkeys(keys, "x")] * 3)
    with pytest.raises(InputError) as error:
        load_conversations(path)
    first = f"{path}: 3 of 3 entries are malformed. Say what its keys ({', '.join(keys)}) are: data.columns={remedy}"
    assert str(error.value).split("\n")[0] == f"{first} (python -m instruct_lm.data: --columns {options})"
    if "KEY" not in remedy:
        assert len(load_conversations(path, columns=yaml.safe_load(shlex.split(remedy)[0]))) == 3


@pytest.mark.parametrize("records", [[["q", "a"]], [{"text": "### Human: q### Assistant: a"}], [{}]])
def test_records_that_no_columns_can_be_named_for(write, records):
    with pytest.raises(
        InputError, match=r"1 of 1 entries are malformed\. An entry is an object that has an instruction"
    ):
        load_conversations(write(records))


def test_the_columns_of_a_table_without_a_header(tmp_path):
    (path := tmp_path / "data.csv").write_text("Add 1 and 2.,3\nAdd 2 and 3.,5\n")
    with pytest.raises(InputError, match=r"what its columns \(its first line: Add 1 and 2\., 3\) are"):
        load_conversations(path)


def test_columns_that_no_entry_has(write):
    path = write([ENTRY])
    with pytest.raises(
        InputError,
        match=r"nothing in .*data.json takes system from persona\. Its keys are instruction, input, output; leave",
    ):
        load_conversations(path, columns={"system": "persona"})
    with pytest.raises(InputError, match=r"entry 1: answer is missing \(its keys: instruction, input, output\)"):
        load_conversations(path, columns={"output": "answer"})
    with pytest.raises(InputError, match="answer is none of"):
        load_conversations(path, columns={"answer": "output"})


def test_unusable_entries_are_refused_on_request_or_if_nothing_is_left(write):
    path = write([ENTRY, ENTRY | {"output": None}, ENTRY, ENTRY | {"instruction": " "}])
    assert [conversation.number for conversation in load_conversations(path)] == [1, 3]
    with pytest.raises(InputError) as error:
        load_conversations(path, unusable="error")
    assert str(error.value).split("\n") == [
        f"{path}: 2 of 4 entries are unusable. Correct them, or drop them with data.unusable=drop.",
        "  entry 2: the response is blank",
        "  entry 4: the request is blank",
    ]
    with pytest.raises(
        InputError, match=r"2 of 2 entries are unusable. Correct them\.\n  entry 1: the response is blank"
    ):
        load_conversations(write([ENTRY | {"output": ""}] * 2))
    with pytest.raises(InputError, match="unusable=skip: must be drop or error"):
        load_conversations(path, unusable="skip")


@pytest.mark.parametrize(
    "content", [b"", b" \n\n", b"[]", b"\xef\xbb\xbf", b"[] []", b"instruction,output\n", gzip.compress(b"", mtime=0)]
)
def test_a_file_without_entries(write, content):
    with pytest.raises(InputError, match=r"data\.json holds no entries"):
        load_conversations(write(content))


@pytest.mark.parametrize("content", [b'"text"', b"5", b"null"])
def test_values_that_are_no_entries(write, content):
    with pytest.raises(InputError, match=r"entry 1 \(line 1\): it is .*, not an object with keys"):
        load_conversations(write(content))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_entries_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("junk") / "data.json"
    path.write_bytes(content)
    with pytest.raises(InputError):  # no drawn bytes make a whole entry
        load_conversations(path)


def test_entries_of_100_000_characters(write):
    entry = {"instruction": "a" * 100_000, "input": "\U0001f600" * 100_000, "output": "b " * 50_000}
    expected = [of(**entry, number=1)]
    assert load_conversations(write([entry])) == expected
    assert load_conversations(write(pandas.DataFrame([entry]).to_csv(index=False).encode())) == expected


CASES = {
    "01_empty_outputs.json": (38, "2 of 40 entries are unusable and dropped (data.unusable=drop): entry 4: the response is blank; entry 18"),
    "02_noinput.json": (40, "<noinput> (1 entry), No input (1 entry), nan (1 entry), N/A (1 entry), None (1 entry), Noinput (1 entry)"),
    "03_messages.jsonl": (40, "as messages (messages): 40 conversations, 80 turns"),
    "03_sharegpt.json": (40, "as ShareGPT (conversations): 40 conversations, 80 turns"),
    "03_prompt_completion.jsonl": (40, "as prompt/completion (prompt, completion): 40 conversations, 80 turns"),
    "03_system_history.jsonl": (40, "as Alpaca (instruction, input, output, system, history): 40 conversations, 200 turns"),
    "04_nan_input.json": (40, "null and NaN count as blank: input (20 entries)"),
    "04_int_output.json": (40, "numbers count as their text: output (40 entries)"),
    "05_ja_dup.json": (40, "as Alpaca (instruction, input, output)"),
    "07_control_text.json": (40, "as Alpaca (instruction, input, output)"),
    "28_capital_keys.json": (40, "as Alpaca (instruction=Instruction, input=Input, output=Output)"),
    "28_data.csv": (40, "as Alpaca (instruction, input, output)"),
    "28_data.json.gz": (40, "as Alpaca (instruction, input, output)"),
    "28_data.parquet": (40, "as Alpaca (instruction, input, output)"),
    "28_gzip_named.json": (40, "as Alpaca (instruction, input, output)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_reported_cases(shared_dir, name):
    conversations, report = read_conversations(shared_dir / "cases" / name)
    count, said = CASES[name]
    assert len(conversations) == count
    assert said in "\n".join(lines(report))


def test_what_pandas_makes_of_chats_is_read_back(tmp_path):
    turns = [{"role": "user", "content": 'it\'s "q"'}, {"role": "assistant", "content": "a\nb"}]
    frame = pandas.DataFrame({"id": [1, 2], "messages": [turns, turns * 2]})
    frame.to_csv(tmp_path / "chat.csv", index=False)
    frame.to_parquet(tmp_path / "chat.parquet")
    expected = load_conversations(frame.to_dict("records"))
    assert load_conversations(tmp_path / "chat.csv") == load_conversations(tmp_path / "chat.parquet") == expected
    assert expected[1].turns == tuple(Turn(turn["role"], turn["content"]) for turn in turns * 2)


@pytest.fixture
def server(tmp_path):
    """A local server in place of GitHub; yields its address and the folder that it serves."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served"
        server.shutdown()


def test_stanford_alpaca_is_read_whole_but_for_its_blank_outputs(tmp_path, server):
    address, folder = server
    source = yaml.safe_load((ROOT / "conf/data/alpaca.yaml").read_text())["source"]
    blank = set(range(65, 52_000, 1900))  # 28 places
    entries = [
        {
            "instruction": f'Describe object {i} – and say "why".',
            "input": "<noinput>" if i % 1000 == 7 else f"Object {i}" if i % 3 == 0 else "",
            "output": "" if i in blank else f"Object {i} is round.\n\n" * 4,
        }
        for i in range(52_002)
    ]
    file = folder / source.removeprefix("https://")  # a mirror has a folder for each host
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(entries, indent=4, ensure_ascii=False), encoding="utf-8")
    conversations, report = read_conversations(Fetcher(tmp_path / "cache", mirror=address).fetch(source))
    assert len(blank) == 28
    assert [c.number for c in conversations] == [i + 1 for i in range(52_002) if i not in blank]
    assert lines(report)[0] == "52002 entries as Alpaca (instruction, input, output): 51974 conversations, 103948 turns"
    assert lines(report)[1].startswith("28 of 52002 entries are unusable and dropped")
    assert lines(report)[1].endswith("and 18 more")
    assert lines(report)[2].endswith("<noinput> (52 entries)")


# Splitting


def conversations_of(count):
    return [of(f"instruction {i}", "", "x", i + 1) for i in range(count)]


def test_split_takes_train_then_test_then_the_rest():
    conversations = conversations_of(1100)
    splits = split(conversations)
    assert [len(part) for part in splits] == [935, 110, 55]
    assert splits.train + splits.test + splits.validation == conversations
    assert splits._fields == ("train", "test", "validation")


@given(st.integers(20, 300), st.booleans(), st.integers(0, 5))
def test_split_loses_and_repeats_nothing(count, shuffle, seed):
    conversations = conversations_of(count)
    splits = split(conversations, 0.5, 0.25, shuffle, seed)
    assert (len(splits.train), len(splits.test)) == (count // 2, count // 4)
    assert sorted(e.turns[0].text for part in splits for e in part) == sorted(e.turns[0].text for e in conversations)
    assert splits == split(conversations, 0.5, 0.25, shuffle, seed)


def test_shuffle_depends_on_the_seed_and_leaves_the_list_as_it_was():
    conversations = conversations_of(100)
    orders = [
        [e.turns[0].text for part in split(conversations, shuffle=True, seed=seed) for e in part] for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert conversations == conversations_of(100)
    pinned = split(
        conversations_of(20), 0.2, 0.1, shuffle=True, seed=123
    ).train  # another order would change shuffled runs
    assert [e.turns[0].text for e in pinned] == [f"instruction {i}" for i in (7, 17, 3, 4)]


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
        split(conversations_of(count), train, test)


def test_duplicates_between_splits_are_found_whatever_their_case_and_spacing():
    a, b, c = of("Say hi.", "to  Ann", "Hi.", 3), of("say HI.", " to ann ", "Hello.", 5), of("Say hi.", "", "Hi.", 4)
    splits = Splits([a, c, a], [b], [of("Other", "", "x", 8), b])
    (duplicate,) = duplicates_between(splits)
    assert duplicate.first == a
    assert duplicate.places == {"train": [3, 3], "test": [5], "validation": [5]}
    assert duplicates_between(Splits([a, a], [c], [])) == []


def test_a_duplicate_has_the_same_turns_before_the_last():
    user, reply = Turn("user", "q"), Turn("assistant", "a")
    one, two = Conversation((user, reply)), Conversation((user, reply, user, reply))
    other = Conversation((user, Turn("assistant", "b"), user, reply))
    system = Conversation((Turn("system", "s"), user, reply))
    assert duplicates_between(Splits([one], [two], [system])) == []
    assert duplicates_between(Splits([two], [other], [])) == []
    (duplicate,) = duplicates_between(Splits([two], [Conversation((*two.prompt, Turn("assistant", "new")))], []))
    assert duplicate.first == two


def test_the_1100_entries_split_and_repeat_as_published(shared_dir):
    real = load_conversations(shared_dir / "data" / "instruction-data.json")
    splits = split(real)
    assert [len(part) for part in splits] == [935, 110, 55]
    duplicates = duplicates_between(splits)
    texts = [[text.casefold().split() for text in conversation.turns[0]] for conversation in real]
    assert len(duplicates) == 5
    for duplicate in duplicates:
        text = [text.casefold().split() for text in duplicate.first.turns[0]]
        assert texts.count(text) == sum(map(len, duplicate.places.values())) >= 2


def test_a_million_faults_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("0 " * 100_000)
    with pytest.raises(InputError, match="100000 of 100000 entries are malformed") as caught:
        load_conversations(path)
    assert len(str(caught.value).splitlines()) == 12
    assert "and 99990 more" in str(caught.value)


def test_what_a_file_holds_writes_nothing_to_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    entry = {"instruction": "x", "output": "y", "\x1b[2J": 1, "input": "<\x9bnone>"}
    with caplog.at_level("INFO"):
        load_conversations([entry])
    assert "\\x1b[2J" in caplog.text
    assert not {"\x1b", "\x9b"} & set(caplog.text)
