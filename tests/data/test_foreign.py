"""Files that are not read are named, and the command in the message converts them."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pandas
import pyarrow
import pyarrow.feather
import pytest

from instruct_lm.data.files import read_records
from instruct_lm.errors import InputError

# What the commands must leave as it is: quotes of both kinds, what looks like a comment or a trailing comma, non-ASCII.
RECORDS = [{"a": 'x "y" , ] \\ // it\'s\n#,}', "b": None}, {"a": "é", "b": "/* */"}]
JSON = json.dumps(RECORDS, indent=1, ensure_ascii=False)
LITERAL = repr(RECORDS)


def packed(suffix):
    buffer = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(zipfile.ZipInfo("inside.json"), JSON)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo("inside.json")
            info.size = len(JSON.encode())
            archive.addfile(info, io.BytesIO(JSON.encode()))
    return buffer.getvalue()


def database():
    path = Path("made.db")
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (a, b)")
        connection.executemany("insert into t values (:a, :b)", RECORDS)
    connection.close()
    return path.read_bytes()


def arrow(stream):
    table, buffer = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    if stream:
        with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.feather.write_feather(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "what"),
    [
        (LITERAL, "a list.json", r", line 1, column 3: this is a Python list, not JSON; its keys: a, b\."),
        (LITERAL.replace("None", "nan"), "nan.json", "a Python list"),
        ('[{"a": True}]', "mixed.json", "a Python list"),
        ("\n".join(map(repr, RECORDS)), "it's.jsonl", r", line 1, column 2: this is Python dicts, one a line"),
        (LITERAL.encode("utf-16"), "utf16.json", "a Python list"),
        (gzip.compress(LITERAL.encode(), mtime=0), "zipped.json.gz", "a Python list"),
        (b"\xef\xbb\xbf" + LITERAL.encode(), "marked.json", "a Python list"),
        (
            JSON[:-2] + ",\n]",
            "comma.json",
            r", line 10, column 1: this is JSON with a comma before.*; its keys: a, b\.",
        ),
        (JSON.replace("\n }", ",\n }"), "commas.json", "JSON with a comma before a closing bracket"),
        (",\n".join(map(json.dumps, RECORDS)), "lines.json", ": this is JSON objects with commas between them"),
        (
            "".join(json.dumps(record) + ",\n" for record in RECORDS),
            "lines.jsonl",
            ": this is JSON objects with commas",
        ),
        ("// my entries\n" + JSON, "comments.json", ", line 1, column 1: this is JSON with comments"),
        ("[ # one\n" + JSON[1:-1] + "/* end\n */ ]", "comments.json", ", line 1, column 3: this is JSON with comments"),
        (JSON.encode("latin-1"), "latin.json", r"byte 0xe9 in position .* \(line 7\): this is not UTF-8 text"),
        (gzip.compress(JSON.encode("latin-1"), mtime=0), "latin.json.gz", "not UTF-8 text"),
        (JSON.encode("utf-16-le"), "unmarked.json", "UTF-16 text without a byte-order mark"),
        (JSON.encode("utf-16-be"), "unmarked.json", "UTF-16 text without a byte-order mark"),
        (bz2.compress(JSON.encode()), "data.json.bz2", "compressed by bzip2"),
        (lzma.compress(JSON.encode()), "data.json.xz", "compressed by xz"),
        (pickle.dumps(RECORDS), "list.pkl", "a Python pickle: opening it can run any code"),
        (pickle.dumps(pandas.DataFrame(RECORDS[1:])), "frame.pkl", "a Python pickle"),
        (packed("zip"), "data.zip", "a zip archive"),
        (packed("tar"), "data.tar", "a tar archive"),
        (database, "data.db", "an SQLite database"),
        (arrow(False), "data.arrow", "an Arrow file"),
        (arrow(True), "stream.arrow", "an Arrow stream"),
        ("- a: 1\n  b: 2\n", "data.yaml", "YAML"),
    ],
)
def test_the_command_in_the_message_converts_the_file(tmp_path, monkeypatch, content, name, what):
    monkeypatch.chdir(tmp_path)
    content = content() if callable(content) else content
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=what) as error:
        list(read_records(path))
    command = str(error.value).partition("Convert it: ")[2]
    convert(command, tmp_path)
    (made,) = set(tmp_path.iterdir()) - {path, tmp_path / "made.db", tmp_path / "python"}
    expected = {"data.yaml": [{"a": 1, "b": 2}], "mixed.json": [{"a": True}], "frame.pkl": RECORDS[1:]}.get(
        name, RECORDS
    )
    assert [record for _, record in read_records(made)] == expected


def convert(command, folder):
    """Run a command as if pasted into a shell in which `python` is this Python."""
    (folder / "python").symlink_to(sys.executable)
    environment = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\n<!DOCTYPE html><html>", "an HTML page, not data: give the address of the file itself"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b'<?xml version="1.0"?>', "XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the data: run git lfs pull"),
        (b"\x89PNG\r\n\x1a\n", "a PDF, an image, a model or a program"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd. Convert it: zstd -d < "),
        (b"PK\x03\x04 xl/workbook.xml", r"an Excel workbook \(pip install pandas openpyxl\). Convert it: python -c "),
        (gzip.compress(packed("zip"), mtime=0), "a zip archive.* compressed. Unpack it: gunzip -c "),
    ],
)
def test_a_file_that_holds_no_data_is_named(tmp_path, content, what):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"data.json.*{what}"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [("comments", "JSON with comments"), ("single_quotes", "a Python list"), ("trailing_comma", "a comma before")],
)
def test_the_reported_cases(shared_dir, tmp_path, name, words):
    path = shared_dir / "cases" / f"28_{name}.json"
    with pytest.raises(InputError, match=f"{words}.*its keys: instruction, input, output. Convert it: ") as error:
        list(read_records(path))
    convert(str(error.value).partition("Convert it: ")[2], tmp_path)
    assert sum(1 for _ in read_records(tmp_path / f"28_{name}.converted.json")) == 40


def test_files_that_hold_pickles_are_refused_with_the_reason(tmp_path):
    import numpy

    with zipfile.ZipFile(tmp_path / "data.pt", "w") as archive:  # as torch.save writes it
        archive.writestr("data/data.pkl", pickle.dumps({"a": 1}))
    numpy.save(tmp_path / "data.npy", numpy.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("data.pt", "data.npy"):
        with pytest.raises(InputError, match="in which a pickle can run any code"):
            list(read_records(tmp_path / name))
