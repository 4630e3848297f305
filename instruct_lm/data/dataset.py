"""From a file to entries: load, validate, split, find duplicates."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError

_LISTED = 10  # faulty entries that a message names; the rest are counted
_TOKEN_START = re.compile(r"[^ \t\n\r]")


def sample_path() -> Path:
    """The embedded entries that `data=sample` stands for."""
    return Path(__file__).with_name("sample.json")


def load_examples(source: str | Path | Sequence[Mapping[str, Any]], limit: int | None = None) -> list[Example]:
    """Load and check instruction entries.

    An entry is an object with the strings `instruction` and `output`, neither blank, and `input`, which may be empty,
    null or absent. Other keys (`model_response`, for one) are ignored. Texts are kept as they are, not stripped.

    Args:
        source: The path of a JSON list or of JSON lines in UTF-8, with or without a byte-order mark; `sample`; or a
            list of entries.
        limit: Use the first `limit` entries only.

    Raises:
        InputError: The file cannot be read or parsed (the message names line and column), there are no entries, or some
            are malformed (it names the first ten by their number, from 1, and what is wrong with each).
    """
    if isinstance(source, (str, Path)):
        path = sample_path() if str(source) == "sample" else Path(source)
        name, entries = str(path), _parse(_read_text(path), path)
    else:
        name, entries = "the list of entries", [("", entry) for entry in source]
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: must be at least 1, or null for all entries.")
    entries = entries[:limit]
    if not entries:
        raise InputError(f"{name} holds no entries.")
    examples, faults = [], []
    for number, (place, entry) in enumerate(entries, start=1):
        if fault := _fault(entry):
            faults.append(f"  entry {number}{place}: {fault}")
        else:
            examples.append(Example(entry["instruction"], entry.get("input") or "", entry["output"]))
    if faults:
        more = [f"  and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        lines = [f"{name}: {len(faults)} of {len(entries)} entries are malformed.", *faults[:_LISTED], *more]
        raise InputError("\n".join(lines))
    return examples


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at offset {error.start}, line {data.count(10, 0, error.start) + 1}"
        raise InputError(f"{path} is not UTF-8 text: {place}. Save it as JSON in UTF-8.") from error


def _parse(text: str, path: Path) -> list[tuple[str, Any]]:
    """Entries with their places: "" in a JSON list, " (line n)" in JSON lines."""
    decoder, entries = json.JSONDecoder(), []
    position = _skip_whitespace(text, 0)
    line = 1 + text.count("\n", 0, position)
    try:
        while position < len(text):
            value, end = decoder.raw_decode(text, position)
            entries.append((f" (line {line})", value))
            end = _skip_whitespace(text, end)
            line += text.count("\n", position, end)
            position = end
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (RecursionError, ValueError) as error:  # brackets nested too deeply, a number of thousands of digits
        raise InputError(f"{path}, line {line}: {error}.") from error
    if len(entries) != 1:
        return entries
    value = entries[0][1]
    if isinstance(value, list):
        return [("", entry) for entry in value]
    if not isinstance(value, dict) or not {"instruction", "output"} & value.keys():
        raise InputError(f"{path} holds {_kind(value)}; expected a JSON list of entries, or JSON lines.")
    return entries


def _skip_whitespace(text: str, position: int) -> int:
    match = _TOKEN_START.search(text, position)
    return match.start() if match else len(text)


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _fault(entry: Any) -> str:
    """What is wrong with an entry; empty if nothing is."""
    if not isinstance(entry, Mapping):
        return f"is {_kind(entry)}, not an object"
    faults = []
    for key in ("instruction", "input", "output"):
        value = entry.get(key)
        if key == "input" and value is None:
            continue
        if key not in entry:
            faults.append(f"{key!r} is missing")
        elif not isinstance(value, str):
            faults.append(f"{key!r} is {_kind(value)}, not a string")
        elif key != "input" and not value.strip():
            faults.append(f"{key!r} is empty")
    return ", ".join(faults)


class Splits(NamedTuple):
    """Three disjoint parts of the entries, in the order in which they are taken."""

    train: list[Example]
    test: list[Example]
    validation: list[Example]


def split(
    examples: Sequence[Example],
    train_fraction: float = 0.85,
    test_fraction: float = 0.10,
    shuffle: bool = False,
    seed: int = 123,
) -> Splits:
    """Splits n entries as the book does: the first int(n · train_fraction), the next int(n · test_fraction), the rest.

    Args:
        examples: n entries.
        train_fraction: Share of the training split, in (0, 1).
        test_fraction: Share of the test split, in (0, 1).
        shuffle: Whether to shuffle a copy of the entries first; `seed` gives the same order on every machine.
        seed: Seed of the shuffle.

    Raises:
        InputError: If a split would be empty.
    """
    n = len(examples)
    train, test = int(n * train_fraction), int(n * test_fraction)
    validation = n - train - test
    if min(train, test, validation) < 1:
        raise InputError(
            f"{n} entries with train_fraction={train_fraction} and test_fraction={test_fraction} give train {train}, "
            f"test {test}, validation {validation}: each needs at least 1. Use more entries or other fractions."
        )
    order = list(examples)
    if shuffle:
        random.Random(seed).shuffle(order)
    return Splits(order[:train], order[train : train + test], order[train + test :])


@dataclass(frozen=True)
class Duplicate:
    """One instruction and input that stands in more than one split.

    Attributes:
        example: Its first occurrence.
        places: Split name → positions in that split, for each split that holds it.
    """

    example: Example
    places: dict[str, list[int]]


def duplicates_between(splits: Splits) -> list[Duplicate]:
    """Entries whose instruction and input, without case and spacing, stand in more than one split."""
    places: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(dict)
    first: dict[tuple[str, str], Example] = {}
    for name, examples in splits._asdict().items():
        for position, example in enumerate(examples):
            key = (_normalise(example.instruction), _normalise(example.input))
            first.setdefault(key, example)
            places[key].setdefault(name, []).append(position)
    return [Duplicate(first[key], found) for key, found in places.items() if len(found) > 1]


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())
