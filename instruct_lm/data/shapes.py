"""The shapes of records (Alpaca, messages, ShareGPT, prompt/completion), which are recognised by their keys."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

from instruct_lm.config import DataField
from instruct_lm.errors import InputError, listing

FIELDS: tuple[str, ...] = get_args(DataField)
"""The keys that the shapes have, and those of `data.columns`."""
_COMMON_NAMES = {
    "instruction": ("question", "query", "problem", "prompt", "task", "user", "q", "inputs", "input", "text"),
    "input": ("context", "passage"),
    "output": ("answer", "response", "completion", "target", "targets", "solution", "label", "chosen", "a"),
    "system": ("system_prompt", "system_message"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
}


class Malformed(ValueError):
    """A record that is no entry; the message names its fault."""


class Shape(NamedTuple):
    """A kind of record, with the fields that it must and may have."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


SHAPES = (
    Shape("messages", ("messages",), ("system",)),
    Shape("ShareGPT", ("conversations",), ("system",)),
    Shape("Alpaca", ("instruction", "output"), ("input", "system", "history")),
    Shape("prompt/completion", ("prompt", "completion"), ("system", "history")),
    Shape("prompt/completion", ("prompt", "response"), ("system", "history")),
)
"""In the order in which they are tried; those with a field that `columns` names come first."""


class Layout(NamedTuple):
    """How records with the same keys are read.

    Attributes:
        shape: Their shape.
        keys: Field → the record's key, for the shape's fields that the record has.
        unused: The record's other keys.
    """

    shape: Shape
    keys: dict[str, str]
    unused: tuple[str, ...]


def recognise(keys: Sequence[str], columns: Mapping[str, str]) -> Layout:
    """Find the shape of records by their keys; case does not matter.

    Args:
        keys: The keys of a record.
        columns: Field → key, for records with other keys than the shapes have.

    Raises:
        Malformed: The keys fit no shape; the message names those that are missing from the nearest one.
    """
    folded = {key.strip().casefold(): key for key in reversed(keys)} | {key: key for key in keys}
    mapped = {field: folded.get(key, folded.get(key.casefold())) for field, key in columns.items()}
    own = {field: folded[field] for field in FIELDS if field in folded and folded[field] not in mapped.values()}
    found = {field: key for field, key in (own | mapped).items() if key is not None}
    missing: dict[str, list[str]] = {}
    for shape in sorted(SHAPES, key=lambda shape: columns.keys().isdisjoint(shape.required)):
        lacking = [columns.get(field, field) for field in shape.required if field not in found]
        if not lacking:
            names = {
                field: found[field] for field in FIELDS if field in found and field in shape.required + shape.optional
            }
            return Layout(shape, names, tuple(key for key in keys if key not in names.values()))
        if len(lacking) < len(shape.required):
            missing.setdefault(shape.name, lacking)
    if not missing:
        raise Malformed(f"its keys fit no known shape: {shown(keys)}" if keys else "it has no keys")
    (lacking, *_) = missing.values()
    raise Malformed(f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing (its keys: {shown(keys)})")


def check_columns(columns: Mapping[str, str]) -> None:
    """Check the names of fields.

    Raises:
        InputError: There is no such field.
    """
    if unknown := [field for field in columns if field not in FIELDS]:
        raise InputError(f"data.columns={shown_columns(columns)}: {unknown[0]} is none of {', '.join(FIELDS)}.")


def shown(keys: Sequence[str]) -> str:
    """Keys in a message."""
    return ", ".join(listing([key if key.isprintable() and len(key) <= 40 else f"{key[:40]!a}…" for key in keys]))


def shown_columns(columns: Mapping[str, str]) -> str:
    """`columns` as the user types it."""
    pairs = ((ours, key if re.fullmatch(r"[\w .-]+", key) else json.dumps(key)) for ours, key in columns.items())
    return "'{" + ", ".join(f"{ours}: {key}" for ours, key in pairs) + "}'"


def suggested_columns(keys: Sequence[str]) -> dict[str, str] | None:
    """`columns` that would read records with these keys, by common names; None if there are no such names."""
    folded = {key.strip().casefold(): key for key in reversed(keys)}
    found = {}
    for field, names in _COMMON_NAMES.items():
        if field not in folded and (name := next((name for name in names if name in folded), None)):
            found[field] = folded[name]
    if not found.keys() | folded.keys() >= {"instruction", "output"}:
        return {"messages": found["messages"]} if "messages" in found else None
    if (
        "prompt" in folded
        and found.get("instruction") == folded["prompt"]
        and not {"input"} & (found.keys() | folded.keys())
    ):
        # A prompt may be a list of messages; an instruction is a text.
        found["completion"] = found.pop("output", folded.get("output", ""))
        del found["instruction"]
    return {field: key for field, key in found.items() if field != "messages"}
