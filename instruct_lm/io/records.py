"""JSON records, a file or a line each, that carry their own hash, so that a damaged one is recognised."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instruct_lm.io.files import finite, write_json

logger = logging.getLogger(__name__)

HASH, CHECK = "sha256", "check"
"""The key of the hash in a file, and in a line."""


def write_record(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object atomically, with the hash of its values under `HASH`."""
    values = finite({key: value for key, value in values.items() if key != HASH})
    write_json({**values, HASH: digest(values)}, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """The values that `write_record` wrote; None, with a warning unless there is no file, if they are not whole."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop(HASH, None) == digest(values):
            return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    logger.warning("%s is damaged, or something else has written it: it does not count", path)
    return None


def record_line(values: Mapping[str, Any]) -> str:
    """A line of JSON lines with the hash of its values under `CHECK`, without its end."""
    return json.dumps({**values, CHECK: digest(values)})


def record_lines(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that `record_line` made, with their values, without those that a kill has cut or that are damaged."""
    for line in text.split("\n"):
        try:
            values = json.loads(line)
            whole = values.pop(CHECK) == digest(values)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
        if whole:
            yield line, values


def digest(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys: 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
