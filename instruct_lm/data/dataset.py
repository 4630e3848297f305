"""From a file to entries: load, validate, split, find duplicates."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from instruct_lm.data.conversation import Conversation
from instruct_lm.errors import InputError, listing

_NOT_SPACE = re.compile(r"[^ \t\n\r]")  # JSON's whitespace, which is not Unicode's
_SAMPLE = Path(__file__).with_name("sample.json")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "String should not be blank")
    return text


class _Entry(BaseModel):
    instruction: Annotated[str, AfterValidator(_not_blank)]
    input: str | None = None
    output: Annotated[str, AfterValidator(_not_blank)]


_ENTRIES = TypeAdapter(list[_Entry])


def load_conversations(source: str | Path | Sequence[dict[str, Any]], limit: int | None = None) -> list[Conversation]:
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
        path = _SAMPLE if str(source) == "sample" else Path(source)
        name, entries = str(path), _parse(_read_text(path), path)
    else:
        name, entries = "the list of entries", [("", entry) for entry in source]
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: must be at least 1, or null for all entries.")
    entries = entries[:limit]
    if not entries:
        raise InputError(f"{name} holds no entries.")
    try:
        checked = _ENTRIES.validate_python([entry for _, entry in entries])
    except ValidationError as error:
        faults: dict[Any, list[str]] = defaultdict(list)
        for detail in error.errors():
            index, *keys = detail["loc"]
            faults[index].append(": ".join([*map(str, keys), detail["msg"].partition(" or instance")[0]]))
        lines = [f"entry {i + 1}{entries[i][0]}: {', '.join(found)}" for i, found in faults.items()]
        expected = "expected a JSON list, or JSON lines, of objects with the keys instruction, input and output"
        summary = f"{name}: {len(faults)} of {len(entries)} entries are malformed; {expected}."
        raise InputError("\n  ".join([summary, *listing(lines)])) from error
    return [Conversation.of(e.instruction, e.input or "", e.output, i) for i, e in enumerate(checked, start=1)]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 text: {error} (line {line}). Save it as JSON in UTF-8.") from error


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
    if len(entries) == 1 and isinstance(entries[0][1], list):
        return [("", entry) for entry in entries[0][1]]
    return entries


class Splits(NamedTuple):
    """Three disjoint parts of the entries, in the order in which they are taken."""

    train: list[Conversation]
    test: list[Conversation]
    validation: list[Conversation]


def split(
    examples: Sequence[Conversation],
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
    """A prompt that occurs in more than one split.

    Attributes:
        first: Its first occurrence.
        places: Split name → entry numbers, for each split that holds it.
    """

    first: Conversation
    places: dict[str, list[int]]


def duplicates_between(splits: Splits) -> list[Duplicate]:
    """Prompts that occur in more than one split; case and spacing do not matter."""
    found: dict[tuple[str, ...], Duplicate] = {}
    for name, examples in splits._asdict().items():
        for example in examples:
            key = tuple(" ".join(text.casefold().split()) for turn in example.prompt for text in turn)
            found.setdefault(key, Duplicate(example, {})).places.setdefault(name, []).append(example.number)
    return [duplicate for duplicate in found.values() if len(duplicate.places) > 1]
