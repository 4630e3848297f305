"""Formats, compression and encodings: the same records whatever the file, or an error that names the place."""

import csv
import gzip
import io
import itertools
import json

import pandas
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.data import files
from instruct_lm.data.files import read_records
from instruct_lm.errors import InputError

RECORDS = [
    {"a": ' x,\n"y"; ', "b": "01"},
    {"a": "é🙏\u2028\t", "b": "NA"},
    {"a": "null", "b": ""},
    {"a": "1e5", "b": "\r\n"},
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
BUFFER = io.BytesIO()
pandas.DataFrame(RECORDS).to_parquet(BUFFER)


def table(separator):
    return pandas.DataFrame(RECORDS).to_csv(index=False, sep=separator)


TEXTS = {
    "list": json.dumps(RECORDS),
    "indented list": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "lines": "\n".join(LINES),
    "blank lines": "\n\n" + "\r\n\r\n".join(LINES) + "\n\n",
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "two lists": json.dumps(RECORDS[:1]) + json.dumps(RECORDS[1:]),
    "CSV": table(","),
    "semicolons": table(";"),
    "TSV": table("\t"),
}


@pytest.fixture
def read(tmp_path):
    def read(content, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [record for _, record in read_records(path)]

    return read


@pytest.mark.parametrize("name", ["data.json", "data.csv", "data"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_content_decides_whatever_name_encoding_and_compression(read, text, encoding, name):
    content = text.encode(encoding)
    assert read(content, name) == read(gzip.compress(content), name) == RECORDS


@pytest.mark.parametrize("name", ["data.parquet", "data.json.gz"])
def test_parquet(read, name):
    assert read(BUFFER.getvalue(), name) == read(gzip.compress(BUFFER.getvalue()), name) == RECORDS


def test_parquet_keeps_numbers_lists_and_nulls(read):
    rows = [
        {"n": 1, "f": 2.5, "t": [{"role": "user", "content": "x"}], "s": None},
        {"n": 2, "f": None, "t": [], "s": "y"},
    ]
    buffer = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(buffer)
    assert read(buffer.getvalue()) == rows


def test_the_1100_entries_are_the_same_from_csv_and_parquet(read, shared_dir):
    entries = json.loads((shared_dir / "data" / "instruction-data.json").read_text())
    frame, buffer = pandas.DataFrame(entries), io.BytesIO()
    frame.to_parquet(buffer)
    assert read(frame.to_csv(index=False), "data.csv") == read(buffer.getvalue(), "data.parquet") == entries


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(
    records=st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_texts_come_back_as_they_were(tmp_path_factory, records, data):
    path, columns, buffer = tmp_path_factory.mktemp("any") / "data", list(records[0]), io.StringIO()
    writer = csv.DictWriter(buffer, columns, delimiter=data.draw(st.sampled_from(",;\t")))  # ends lines by CRLF
    writer.writeheader()
    writer.writerows(records)
    parquet = io.BytesIO()
    pandas.DataFrame(records).to_parquet(parquet)
    texts = [json.dumps(records), json.dumps(records, indent=1, ensure_ascii=False), buffer.getvalue()]
    texts += ["\n".join(json.dumps(record, ensure_ascii=data.draw(st.booleans())) for record in records)]
    for content in (*(text.encode() for text in texts), parquet.getvalue()):
        path.write_bytes(content)
        assert [record for _, record in read_records(path)] == records


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(
    "text", [*itertools.islice(TEXTS.values(), 6), "[1, 23, -4.5e6, true, null, NaN, [], {}]", "12 34"]
)
def test_values_that_lie_across_pieces_of_the_file(read, monkeypatch, text, size):
    whole = read(text)
    monkeypatch.setattr(files, "_CHUNK", size)
    assert repr(read(text)) == repr(whole)


def test_json_lines_have_places_and_lists_have_none(tmp_path):
    path = tmp_path / "data"
    path.write_text('\n{"a": \n1}\n\n{"a": 2} {"a": 3}')
    assert [place for place, _ in read_records(path)] == [" (line 2)", " (line 5)", " (line 5)"]
    path.write_text('[{"a": 1}]')
    assert [place for place, _ in read_records(path)] == [""]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}, broken', '{"a": 1}\n{"a": 2}\nbroken', "a,b\n1,2\n3,4\n5,6,7"])
def test_what_follows_is_not_looked_at(tmp_path, text):
    path = tmp_path / "data"
    path.write_text(text)
    assert len(list(itertools.islice(read_records(path), 2))) == 2
    with pytest.raises(InputError):
        list(read_records(path))


def test_a_large_file_is_read_piece_by_piece(tmp_path, monkeypatch):
    path, sizes = tmp_path / "data.json", []
    path.write_text(json.dumps([{"a": "x" * 1000}] * 1000))
    monkeypatch.setattr(files, "_CHUNK", 5000)
    step = files._JsonReader._read_on
    monkeypatch.setattr(files._JsonReader, "_read_on", lambda self: (step(self), sizes.append(len(self.buffer)))[0])
    assert sum(1 for _ in read_records(path)) == 1000
    assert max(sizes) < 10_000


HEADER = "instruction,output\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n {"instruction": "x",\n  "output" "y"}]', r", line 3, column 12: not JSON: Expecting ':' delimiter"),
        (b'[{"instruction": "x"', ", line 1, column 21: not JSON: Expecting ',' delimiter"),
        (b'[{"a": 1} {"a": 2}]', ", line 1, column 11: not JSON: Expecting ',' delimiter"),
        (b'[{"a": 1},', ", line 1, column 11: not JSON: Expecting value"),
        (b'{"a": "y"}\n{"a": "x\n', ", line 2, column 9: not JSON: a line end or tab in a text is written"),
        (rb'[{"a": "\d"}]', r", line 1, column 9: not JSON: a backslash in a text is written \\\\\."),
        (b"# Title\n\nText.\n", "Expecting value. The file is none of JSON, JSON lines, CSV, TSV and Parquet"),
        (b"404: Not Found", "Expecting value. The file is none of JSON, JSON lines, CSV, TSV and Parquet"),
        (b'{"a": "y"}\n{"a": "x', ", line 2, column 7: not JSON: Unterminated string"),
        (b'{"a": "y"}\nnonsense', ", line 2, column 1: not JSON: Expecting value"),
        (b"nonsense", "Expecting value. The file is none of JSON, JSON lines, CSV, TSV and Parquet"),
        (b"\x00\x01\x02", ", line 1, column 1: not JSON: Expecting value"),
        (b"[" * 200_000, ", line 1: "),
        (b"[" + b"9" * 5000 + b"]", ", line 1: "),
        (HEADER + 'a,"b\nc,d\n', ", line 3: not CSV: unexpected end of data"),
        (HEADER + 'a,"b" c\n', ", line 2: not CSV: ',' expected after '\"'"),
        (HEADER + "a\n", r", line 2: 2 names in the header \(instruction, output\), here 1"),
        (HEADER + "a,b\n\n\nc,d,e\n", r", line 5: 2 names in the header \(instruction, output\), here 3"),
        ("a,b,a\n1,2,3\n", ": more than one column is named a. Rename or remove one."),
        (gzip.compress(b'[{"a": "b"}]', mtime=0)[:-9], "gzip data is damaged"),
        (BUFFER.getvalue()[:-9], "Parquet data is damaged"),
    ],
)
def test_a_fault_is_named_with_its_place(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert len(str(error.value)) < 400


def test_a_parquet_column_that_is_there_twice(read):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"]], names=["a", "a"]), buffer)
    with pytest.raises(InputError, match="more than one column is named a"):
        read(buffer.getvalue())


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_bytes_that_are_no_text_are_named_with_position_and_line(read, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    content = '[\n{"a": "ü", "b": "'.encode() + "café".encode("latin-1") + b'"}]'
    with pytest.raises(
        InputError, match=rf"byte 0xe9 in position {content.index(0xE9)} \(line 2\): .*iconv -f WINDOWS-1252"
    ):
        read(content)
    with pytest.raises(InputError, match="position 10"):
        read(b'{"a": 1}\n \xc3')  # cut inside a character
    with pytest.raises(InputError, match="not UTF-16 text"):
        read('{"a": 1}'.encode("utf-16") + b"\x00\xd8")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: No such file"):
        list(read_records(tmp_path / "gone.json"))
    with pytest.raises(InputError, match=f"{tmp_path.name}: "):
        list(read_records(tmp_path))


@pytest.mark.parametrize("piece", [b"0 ", b'"', b"a,b\n", b" "])
def test_a_file_that_unpacks_to_gigabytes_is_refused(read, piece, monkeypatch):
    monkeypatch.setattr(files, "_BOMB", 1 << 17)
    monkeypatch.setattr(files, "_CHUNK", 1 << 14)
    bomb = gzip.compress(piece * (2_000_000 // len(piece))) * 1000  # a gzip file may have several members
    with pytest.raises(InputError, match=r"bytes become more than \d+, as no data do"):
        read(bomb)


def test_a_value_that_never_ends_is_refused(read, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    monkeypatch.setattr(files, "_LONGEST", 10_000)
    assert read('["' + "x" * 9_000 + '"]') == ["x" * 9_000]
    with pytest.raises(InputError, match="line 1: a value is longer than 10000 characters, or a quote"):
        read('["' + "x" * 100_000)
    with pytest.raises(InputError, match="field larger than field limit"):
        read('a,b\n"' + "x" * 100_000)


def test_thousands_of_columns_take_no_time(read):
    names = [f"c{i}" for i in range(20_000)]
    assert read(",".join(names) + "\n" + "," * 19_999 + "\n") == [dict.fromkeys(names, "")]
    with pytest.raises(InputError, match=r"more than one column is named c0, c1, .* and 19990 more"):
        read(",".join(names * 2) + "\n")


def test_a_parquet_file_with_an_unknown_time_zone_is_refused(read):
    column = pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Base"))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"when": column}), buffer)
    with pytest.raises(InputError, match="its Parquet data is damaged"):
        read(buffer.getvalue())
