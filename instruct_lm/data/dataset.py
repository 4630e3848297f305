"""From a data source to conversations: load, check, split, find duplicates."""

import logging
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from instruct_lm.data.conversation import Conversation
from instruct_lm.data.files import read_records
from instruct_lm.data.records import RecordReader, Unusable
from instruct_lm.data.shapes import Malformed, shown, shown_columns, suggested_columns
from instruct_lm.data.wrapped import unwrapped
from instruct_lm.errors import InputError, listing, presentable

log = logging.getLogger(__name__)

_MOST_FAULTS = 10  # in one message
_SAMPLE = Path(__file__).with_name("sample.json")


class Loaded(NamedTuple):
    """The conversations of a source, and what there is to say about them.

    Attributes:
        conversations: In the order of the source.
        report: (logging level, line) pairs.
    """

    conversations: list[Conversation]
    report: list[tuple[int, str]]


def load_conversations(
    source: str | Path | Sequence[Mapping[str, Any]],
    limit: int | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    unusable: Literal["drop", "error"] = "drop",
    clean: bool = False,
) -> list[Conversation]:
    """Load and check conversations, and log what was taken.

    Each entry's shape is recognised by its keys (see `instruct_lm.data.shapes.SHAPES`): Alpaca (`instruction`, `input`,
    `output`, `system`, `history`), `messages`, ShareGPT (`conversations`) or `prompt` and `completion`. Texts are kept
    as they are, not stripped. Numbers count as their text; null and NaN count as blank.

    Args:
        source: The path of a file in a format of `instruct_lm.data.files.read_records`; `sample` for the embedded
            entries; or a list of entries.
        limit: Number of entries to read, from the first; None: all. The rest of the file is not looked at.
        columns: Field (such as `instruction`) → the key that holds it, for entries with other keys.
        unusable: What becomes of entries with a blank response or request, or without any: `drop` or `error`.
        clean: Whether an input that stands for none, such as `<noinput>`, becomes empty.

    Returns:
        The conversations, each with the number of its entry in the source, from 1.

    Raises:
        InputError: The file cannot be read; there are no entries, or none that can be used; or some are malformed, or
            unusable with `unusable="error"` (the message lists the first ten by number, with the fault of each).
    """
    conversations, report = read_conversations(source, limit, columns=columns, unusable=unusable, clean=clean)
    for level, line in report:
        log.log(level, "data: %s", line)
    return conversations


def data_file(source: str | Path) -> Path:
    """The file of a source that was fetched: `sample` stands for the entries that come with the package."""
    return _SAMPLE if str(source) == "sample" else Path(source)


def read_conversations(
    source: str | Path | Sequence[Mapping[str, Any]],
    limit: int | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    unusable: Literal["drop", "error"] = "drop",
    clean: bool = False,
) -> Loaded:
    """`load_conversations`, with the report returned rather than logged."""
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: must be at least 1, or null for all entries.")
    if unusable not in ("drop", "error"):
        raise InputError(f"unusable={unusable}: must be drop or error.")
    reader = RecordReader(columns, clean)
    report: list[tuple[int, str]] = []
    if isinstance(source, (str, Path)):
        path = data_file(source)
        name, records = str(path), unwrapped(read_records(path), path, reader.columns, report)
    else:
        name, records = "the list of entries", iter([("", entry) for entry in source])
    conversations, malformed, left_out, count = [], _Faults(), _Faults(), 0
    for count, (place, record) in enumerate(islice(records, limit), start=1):
        try:
            conversations.append(reader.read(record, count))
        except Malformed as error:
            malformed.add(f"entry {count}{place}: {error}")
        except Unusable as error:
            left_out.add(f"entry {count}{place}: {error}")
    if not count:
        raise InputError(f"{name} holds no entries.")
    if malformed.count:
        summary = f"{name}: {malformed.count} of {count} entries are malformed. {_remedy(name, reader)}"
        raise InputError("\n  ".join([summary, *malformed.listing()]))
    _check_columns_used(name, reader)
    if left_out.count and (unusable == "error" or not conversations):
        remedy = "Correct them" + (", or drop them with data.unusable=drop." if conversations else ".")
        summary = f"{name}: {left_out.count} of {count} entries are unusable. {remedy}"
        raise InputError("\n  ".join([summary, *left_out.listing()]))
    turns = sum(len(conversation.turns) for conversation in conversations)
    report.append((logging.INFO, f"{_taken(count, reader)}: {len(conversations)} conversations, {turns} turns"))
    if left_out.count:
        dropped = f"{left_out.count} of {count} entries are unusable and dropped (data.unusable=drop): "
        report.append((logging.WARNING, dropped + "; ".join(left_out.listing())))
    report += _remarks(reader)
    return Loaded(conversations, [(level, presentable(line)) for level, line in report])


class _Faults:
    """The first faults, and the number of all: a file of a gigabyte may have a fault in every line."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, words: str) -> None:
        self.count += 1
        if len(self.first) < _MOST_FAULTS:
            self.first.append(words)

    def listing(self) -> list[str]:
        return listing(self.first, _MOST_FAULTS, self.count)


def _remedy(name: str, reader: RecordReader) -> str:
    """What to do about malformed entries: name the columns if none has the keys of a shape."""
    keys = reader.unrecognised
    if reader.taken:
        return "Correct or remove them."
    if len(keys) < 2:
        needed = "an instruction and an output, or messages with roles and contents, each under a key of its own"
        return f"An entry is an object that has {needed}."
    columns = suggested_columns(keys) or {"instruction": "KEY", "output": "KEY"}
    options = shlex.join(f"{field}={key}" for field, key in columns.items())
    commands = f"data.columns={shown_columns(columns)} (python -m instruct_lm.data: --columns {options})"
    table = name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    named = f"columns (its first line: {shown(keys)})" if table else f"keys ({shown(keys)})"
    return f"Say what its {named} are: {commands}"


def _check_columns_used(name: str, reader: RecordReader) -> None:
    """An InputError if a key of `data.columns` is in no entry, or none of its shape's."""
    for field, key in reader.columns.items():
        if not any(field in layout.keys for layout in reader.layouts.values()):
            keys = shown(list(dict.fromkeys(chain.from_iterable(reader.layouts))))
            fault = f"data.columns={shown_columns(reader.columns)}: nothing in {name} takes {field} from {key}"
            raise InputError(f"{fault}. Its keys are {keys}; leave {field} out or give one of them.")


def _taken(count: int, reader: RecordReader) -> str:
    """Such as "1100 entries as Alpaca (instruction, input, output)"."""
    parts = []
    for name, taken in reader.taken.items():
        used = [layout.keys for layout in reader.layouts.values() if layout.shape.name == name]
        pairs = dict.fromkeys(pair for keys in used for pair in keys.items())
        fields = ", ".join(field if field == key else f"{field}={key}" for field, key in pairs)
        parts.append(f"{taken} as {name} ({fields})" if len(reader.taken) > 1 else f"as {name} ({fields})")
    return f"{count} entries{':' if len(parts) > 1 else ''} {', '.join(parts)}"


def _remarks(reader: RecordReader) -> Iterator[tuple[int, str]]:
    """What was counted, a line for each kind."""
    clean = "are dropped from the prompt" if reader.clean else "stay in the prompt; data.clean=true drops them"
    lines = {
        "number": (logging.INFO, "numbers count as their text: {}"),
        "null": (logging.INFO, "null and NaN count as blank: {}"),
        "placeholder": (logging.INFO if reader.clean else logging.WARNING, f"inputs that stand for none {clean}: {{}}"),
        "cut": (logging.WARNING, "what follows the last response is cut: {}"),
        "unused": (logging.WARNING, "keys that nothing uses: {}"),
    }
    for kind, (level, line) in lines.items():
        found = [(name, n) for (of, name), n in reader.counts.most_common() if of == kind]
        if found:
            named = [f"{shown([name])} ({n} {'entry' if n == 1 else 'entries'})" for name, n in found]
            yield level, line.format(", ".join(listing(named)))


class Splits(NamedTuple):
    """Three disjoint parts of the entries, in the order in which they are taken."""

    train: list[Conversation]
    test: list[Conversation]
    validation: list[Conversation]


def split(
    conversations: Sequence[Conversation],
    train_fraction: float = 0.85,
    test_fraction: float = 0.10,
    shuffle: bool = False,
    seed: int = 123,
) -> Splits:
    """Split n entries as the book does: the first int(n · train_fraction), the next int(n · test_fraction), the rest.

    Args:
        conversations: The n entries.
        train_fraction: Share of the training split, in (0, 1).
        test_fraction: Share of the test split, in (0, 1).
        shuffle: Whether to shuffle a copy of the entries first.
        seed: Seed of the shuffle; it gives the same order on every machine.

    Raises:
        InputError: A split would be empty.
    """
    n = len(conversations)
    train, test = int(n * train_fraction), int(n * test_fraction)
    validation = n - train - test
    if min(train, test, validation) < 1:
        raise InputError(
            f"{n} entries with train_fraction={train_fraction} and test_fraction={test_fraction} give train {train}, "
            f"test {test}, validation {validation}: each needs at least 1. Use more entries or other fractions."
        )
    order = list(conversations)
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
    for name, conversations in splits._asdict().items():
        for conversation in conversations:
            key = tuple(" ".join(text.casefold().split()) for turn in conversation.prompt for text in turn)
            duplicate = found.setdefault(key, Duplicate(conversation, {}))
            duplicate.places.setdefault(name, []).append(conversation.number)
    return [duplicate for duplicate in found.values() if len(duplicate.places) > 1]
