"""JSON files that hold their records in one object: under a key, or by columns."""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from instruct_lm.data.foreign import Foreign, python_command, refusal
from instruct_lm.data.shapes import Malformed, recognise
from instruct_lm.errors import InputError

Record = tuple[str, Any]


def unwrapped(
    records: Iterator[Record], path: Path, columns: Mapping[str, str], report: list[tuple[int, str]]
) -> Iterator[Record]:
    """The records of a file, also where one object holds all of them.

    Such are `{"data": [record, …]}` and what pandas writes: `{key: [value, …]}`, `{key: {row: value}}` and
    `{row: record}`, `{"columns": […], "index": […], "data": [[value, …], …]}`.

    Args:
        records: What `read_records` yields.
        path: Their file.
        columns: As for `recognise`.
        report: Takes a line (logging level, text) on where they were found.

    Raises:
        InputError: The object holds several lists of records.
    """
    first = next(records, None)
    if first is None:
        return
    found = _inside(first[1], path, columns) if isinstance(first[1], Mapping) else None
    if found is None or (second := next(records, None)) is not None:
        yield from chain([first], [] if found is None else [second], records)
        return
    if isinstance(found, InputError):
        raise found
    where, inner = found
    report.append((logging.INFO, f"the entries are those of one object, {where}"))
    yield from (("", record) for record in inner)


def _inside(
    record: Mapping[str, Any], path: Path, columns: Mapping[str, str]
) -> tuple[str, list[Any]] | InputError | None:
    """Where in an object its records are, and the records; None if it is a record itself; or why that is not clear."""
    values = list(record.values())
    if {"columns", "data"} <= record.keys() <= {"columns", "index", "data"} and all(
        isinstance(row, list) and len(row) == len(record["columns"]) for row in record["data"]
    ):
        return "under its key data", [dict(zip(record["columns"], row, strict=True)) for row in record["data"]]
    if values and all(isinstance(value, list) for value in values):
        rows = [list(value) for value in values]
        if (
            rows[0]
            and len(set(map(len, rows))) == 1
            and not any(isinstance(item, Mapping) for row in rows for item in row)
        ):
            return "by columns", [dict(zip(record, row, strict=True)) for row in zip(*rows, strict=True)]
    if values and all(isinstance(value, Mapping) and value.keys() == values[0].keys() for value in values):
        if _is_shape(list(record), columns):
            return "by columns", [{key: column[row] for key, column in record.items()} for row in values[0]]
        return "by rows", values
    if _is_shape(list(record), columns):
        return None
    lists = [key for key, value in record.items() if isinstance(value, list) and isinstance((value or [0])[0], Mapping)]
    if len(lists) > 1:
        code = f"import json, sys; json.dump(json.load(sys.stdin.buffer)[{json.dumps(lists[0])}], sys.stdout)"
        name = f"one object with several lists, {', '.join(lists)}. Give one of them"
        return refusal(path, Foreign(name, python_command(code)))
    return (f"under its key {lists[0]}", record[lists[0]]) if lists else None


def _is_shape(keys: list[str], columns: Mapping[str, str]) -> bool:
    try:
        recognise(keys, columns)
    except Malformed:
        return False
    return True
