"""From a file to entries: load, validate, split, find duplicates."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError

_LISTED = 10  # malformed entries that a message names; it counts the rest
_NOT_SPACE = re.compile(r"[^ \t\n\r]")  # JSON's whitespace, which is not Unicode's
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}  # JSON's names


def sample_path() -> Path:
    """The path of the embedded entries, which `data=sample` selects."""
    return Path(__file__).with_name("sample.json")


def load_examples(source: str | Path | Sequence[Mapping[str, Any]], limit: int | None = None) -> list[Example]:
    """Load and check instruction entries.

    An entry is an object with the strings `instruction` and `output`, neither of them blank, and `input`, which may be
    empty, null or absent. Other keys, such as `model_response`, are ignored. Texts are kept as they are, not stripped.

    Args:
        source: The path of a JSON list or of JSON lines in UTF-8, with or without a byte-order mark; `sample` for the
            embedded entries; or a list of entries.
        limit: Number of entries to use, from the first; None: all. The others are not checked.

    Raises:
        InputError: The file cannot be read or parsed (the message gives line and column), there are no entries, or some
            are malformed (the message lists the first ten by number, from 1, with the fault of each).
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
    faults = [
        f"  entry {number}{place}: {fault}"
        for number, (place, entry) in enumerate(entries, start=1)
        if (fault := _fault(entry))
    ]
    if faults:
        summary = f"{name}: {len(faults)} of {len(entries)} entries are malformed."
        more = [f"  and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        raise InputError("\n".join([summary, *faults[:_LISTED], *more]))
    return [Example(entry["instruction"], entry.get("input") or "", entry["output"]) for _, entry in entries]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        data, start = error.object, error.start
        place = f"byte 0x{data[start]:02x} at offset {start}, line {data.count(10, 0, start) + 1}"
        raise InputError(f"{path} is not UTF-8 text: {place}. Save it as JSON in UTF-8.") from error


def _parse(text: str, path: Path) -> list[tuple[str, Any]]:
    """Entries with their places: "" in a JSON list, " (line n)" in JSON lines."""
    decoder, entries = json.JSONDecoder(), []
    position, line = 0, 1
    try:
        # Read one JSON value after the other: a list of entries is one value, each of the JSON lines is one.
        while found := _NOT_SPACE.search(text, position):
            start = found.start()
            line += text.count("\n", position, start)
            value, position = decoder.raw_decode(text, start)
            entries.append((f" (line {line})", value))
            line += text.count("\n", start, position)
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


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


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
    """Split n entries as the book does: the first int(n · train_fraction), the next int(n · test_fraction), the rest.

    Args:
        examples: The n entries.
        train_fraction: Share of the training split, in (0, 1).
        test_fraction: Share of the test split, in (0, 1).
        shuffle: Whether to shuffle a copy of the entries first.
        seed: Seed of the shuffle; it gives the same order on every machine.

    Raises:
        InputError: A split would be empty.
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


class Duplicate(NamedTuple):
    """A pair of instruction and input that occurs in more than one split.

    Attributes:
        example: Its first occurrence.
        places: Split name → positions in that split, for each split that holds the pair.
    """

    example: Example
    places: dict[str, list[int]]


def duplicates_between(splits: Splits) -> list[Duplicate]:
    """Entries whose instruction and input occur in more than one split; case and spacing do not matter."""
    places: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(dict)
    first: dict[tuple[str, ...], Example] = {}
    for name, examples in splits._asdict().items():
        for position, example in enumerate(examples):
            key = tuple(" ".join(text.casefold().split()) for text in (example.instruction, example.input))
            first.setdefault(key, example)
            places[key].setdefault(name, []).append(position)
    return [Duplicate(first[key], found) for key, found in places.items() if len(found) > 1]
