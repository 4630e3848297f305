"""Hostile data files: every format, every shape, compressed or not."""

import csv
import decimal
import functools
import gzip
import io
import json
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from faults.files_mutate import CONTROLS, dump, grown, hostile, mutate_bytes, mutate_value

_TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]
_TURNS += [{"role": "assistant", "content": "4"}]
SHAPES: tuple[list[dict[str, Any]], ...] = (
    [{"instruction": f"Add {i} and 2.", "input": "", "output": str(i + 2)} for i in range(12)],
    [{"instruction": "Go on.", "output": "Yes.", "system": "Be brief.", "history": [["Hi.", "Hello."]]}] * 3,
    [{"messages": _TURNS}] * 3,
    [{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "system": "s"}] * 3,
    [{"prompt": "Hi.", "completion": "Hello."}] * 3,
    [{"prompt": _TURNS[:2], "response": _TURNS[2:]}] * 3,
    [{"Question": "1+1?", "Answer": 2, "id": 1.5, "ok": True, "none": None}] * 3,
)
# fmt: off
_KEYS = (
    "instruction", "input", "output", "messages", "conversations", "role", "content", "from", "value", "prompt",
    "completion", "system", "history", "data", "columns", "index", "text", "type", "tool_calls", "", "\x1b[2J",
)
# fmt: on
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(CONTROLS)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS) | st.text(), inner, max_size=5),
    max_leaves=20,
)
# What is almost JSON or CSV.
_WORDS = "[ ] { } , : // /* # ; | null None NaN nan True 1e999 - 0 instruction output <html> PAR1"
_STRANGE = (
    '"',
    "'",
    "\\",
    "\n",
    "\r",
    "\t",
    " ",
    '"instruction"',
    '"output"',
    '"a"',
    "\\ud800",
    "\x00",
    "- a: 1",
    "PK\x03\x04",
    "\x1f\x8b",
    "\ufeff",
    "\x1b[2J",
)
_TOKENS = st.sampled_from([*_WORDS.split(), *_STRANGE])
_SOUP = st.lists(_TOKENS, max_size=40).map("".join)


def data(random: Random, folder: Path) -> Callable[[], object]:
    """A data file that is almost right, and the function that reads it as training does."""
    name = random.choice(("data.json", "data.jsonl", "data.csv", "data.tsv", "data.parquet", "data", "d\x1b[2J.json"))
    makers = (_json, _json, _lines, _table, _table, _parquet, _wrapped, _grammar, _soup, _wide)
    content = random.choice(makers)(random)
    if random.random() < 0.35:
        content = mutate_bytes(random, content)
    if random.random() < 0.15:
        name, content = f"{name}.gz", gzip.compress(content, 1)
        if random.random() < 0.5:
            content = mutate_bytes(random, content)
    elif random.random() < 0.003:
        content = _bomb(random.choice((b"[", b"0 ", b'{"a":"', b'"', b"a,b\n", b"[],", b'a,b\n"')), random)
    path = folder / name
    path.write_bytes(content)
    options: dict[str, Any] = {"limit": random.choice((None, None, 1, 5)), "clean": random.random() < 0.2}
    options["unusable"] = random.choice(("drop", "error"))
    if random.random() < 0.2:
        options["columns"] = {"instruction": "Question", "output": random.choice(("Answer", "\x1b[2J"))}
    return lambda: _read(path, options)


def _read(path: Path, options: dict[str, Any]) -> object:
    from instruct_lm.data.dataset import read_conversations
    from instruct_lm.data.encoding import encode_conversations
    from instruct_lm.data.prompts import get_style

    loaded = read_conversations(path, **options)
    for _, line in loaded.report:
        if not all(c.isprintable() or c in "\n\t\u3000" for c in line):
            raise AssertionError(f"a control character in the report: {line[:200]!a}")
    return encode_conversations(loaded.conversations[:50], _bytes(), get_style("alpaca", _bytes()), 1024, "truncate")


@functools.cache
def _bytes() -> Any:
    from instruct_lm.data.tokenizer import load_tokenizer

    return load_tokenizer("bytes")


def _records(random: Random) -> list[Any]:
    records = random.choice(SHAPES)
    return mutate_value(random, records, random.choice((0, 1, 1, 2, 6)))


def _json(random: Random) -> bytes:
    return dump(random, _records(random))


def _lines(random: Random) -> bytes:
    records = _records(random)
    lines = [dump(random, record) for record in (records if isinstance(records, list) else [records])]
    return random.choice((b"\n", b"\n", b"\r\n", b" ", b"", b",\n")).join(lines)


def _wrapped(random: Random) -> bytes:
    """Records in one object, as pandas and others write them."""
    records = random.choice(SHAPES)
    keys = list(records[0])
    wrapped = random.choice(
        (
            {"data": records, "version": 1},
            {"train": records, "test": records},
            {key: [record.get(key) for record in records] for key in keys},
            {key: {str(i): record.get(key) for i, record in enumerate(records)} for key in keys},
            {str(i): record for i, record in enumerate(records)},
            {"columns": keys, "index": [0], "data": [list(record.values()) for record in records]},
        )
    )
    return dump(random, mutate_value(random, wrapped, random.choice((0, 1, 2))))


def _table(random: Random) -> bytes:
    records = random.choice((SHAPES[0], SHAPES[1], SHAPES[6], SHAPES[2]))
    text = io.StringIO(newline="")
    writer = csv.writer(
        text, delimiter=random.choice(",;|\t"), quoting=random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    )
    writer.writerow(hostile(random) if random.random() < 0.1 else key for key in records[0])
    for record in records:
        writer.writerow(_cell(hostile(random) if random.random() < 0.1 else value) for value in record.values())
    return text.getvalue().encode(random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")), "surrogatepass")


def _cell(value: Any) -> str:
    try:
        return value if isinstance(value, str) else repr(value) if isinstance(value, tuple) else json.dumps(value)
    except RecursionError:
        return "(" * 3000


def _parquet(random: Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strange = (
        pa.array([b"\xff\x00", b"x", None]),
        pa.array([2**62, -(2**63), None], pa.timestamp("ns")),
        pa.array([2**62, -(2**63), None], pa.timestamp("us", tz="Mars/Base")),
        pa.array([decimal.Decimal("1e30"), None, None], pa.decimal256(70, 3)),
        pa.array([timedelta(days=9), None, None]),
        pa.array([date(1, 1, 1), None, None]),
        pa.array([datetime(9999, 1, 1), None, None]),
        pa.array([2**40, None, 0], pa.date64()),
        pa.array([[1.5, float("nan")], [], None]),
        pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        pa.array(["x", "x", None]).dictionary_encode(),
        pa.nulls(3),
        pa.array([{"role": "user", "content": None}] * 3),
        pa.array([[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 3),
    )
    columns: list[Any] = [
        pa.array(["a", "b\x1b", None]) if random.random() < 0.6 else random.choice(strange) for _ in "ab"
    ]
    names = random.choice(
        (["instruction", "output"], ["messages", "x"], ["a", "a"], ["\x1b[2J", ""], ["prompt", "completion"])
    )
    buffer = io.BytesIO()
    compression = random.choice(("none", "snappy", "zstd", "gzip"))
    pq.write_table(pa.Table.from_arrays(columns, names=names), buffer, compression=compression)
    return mutate_bytes(random, buffer.getvalue()) if random.random() < 0.7 else buffer.getvalue()


def _grammar(random: Random) -> bytes:
    return dump(random, grown(st.lists(_VALUES, max_size=6) | _VALUES, random))


def _soup(random: Random) -> bytes:
    return (grown(_SOUP, random) or "").encode("utf-8", "surrogatepass")


def _wide(random: Random) -> bytes:
    """Many keys, many turns, many records without sense."""
    n = random.choice((100, 20_000))
    return random.choice(
        (
            lambda: dump(random, [{f"k{i}": i} for i in range(n)]),
            lambda: dump(random, [{f"k{i}": i for i in range(n)}] * 2),
            lambda: dump(random, [{"messages": [{"role": "user", "content": "x"}] * n}]),
            lambda: b"[]\n" * n,
            lambda: b'{"instruction": "", "output": ""}\n' * n,
            lambda: ",".join(f"c{i}" for i in range(n)).encode() + b"\n" + b"," * (n - 1) + b"\n",
            lambda: b"a,b\n" + b'"' * n,
            lambda: b"[" + b"-" * n,
            lambda: b'{"history": "' + b"-" * n + b'1", "instruction": "x", "output": "y"}',
            lambda: b'{"history": "' + b"(" * n + b'", "instruction": "x", "output": "y"}',
        )
    )()


def _bomb(piece: bytes, random: Random) -> bytes:
    """Two gigabytes of one piece, compressed to a thousandth: a gzip file may have several members."""
    return gzip.compress(piece * (10_000_000 // len(piece)), 9) * random.choice((20, 200))
