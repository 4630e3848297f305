"""Files of answers: `responses.json` and the record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError
from instruct_lm.io.files import write_json
from instruct_lm.respond import Response

RESPONSES, MADE_BY = "responses.json", "responses.made.json"


def save_responses(
    folder: Path, examples: Sequence[Example], responses: Sequence[Response], made_by: Mapping[str, Any]
) -> None:
    """Write `responses.json`, the list that other tools of the book read, and beside it how it was made.

    Args:
        folder: where to.
        examples: the entries.
        responses: their answers, in the same order.
        made_by: all that decides the answers, as plain values.
    """
    entries = [
        {**asdict(example), "model_response": response.text}
        for example, response in zip(examples, responses, strict=True)
    ]
    made = [{"tokens": response.tokens, "ended": response.ended} for response in responses]
    _write(folder, entries, {"made_by": made_by, "responses": made})


def copy_responses(source: Path, entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write entries that were loaded from ``source`` as `responses.json`, with its record of how they were made."""
    _write(folder, entries, _record(source))


def _write(folder: Path, entries: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None) -> None:
    """Whenever it is stopped, no record stands beside responses that are not its own."""
    (folder / MADE_BY).unlink(missing_ok=True)
    write_json(entries, folder / RESPONSES)
    if record is not None:
        write_json(record, folder / MADE_BY)


def _record(responses: Path) -> dict[str, Any] | None:
    """How a file of responses was made; None if we did not make it."""
    if responses.name != RESPONSES:
        return None
    try:
        return json.loads(responses.with_name(MADE_BY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_responses(folder: Path, made_by: Mapping[str, Any]) -> Path | None:
    """A folder whose responses were made in exactly this way: this one, or one beside it (another judge's)."""
    for candidate in [folder, *sorted(path for path in folder.parent.glob("*") if path.is_dir())]:
        record = _record(candidate / RESPONSES)
        if record is not None and record["made_by"] == made_by and (candidate / RESPONSES).is_file():
            return candidate
    return None


def load_responses(path: Path) -> list[dict[str, Any]]:
    """Entries with their ``model_response``, whoever made them.

    Raises:
        InputError: no readable JSON list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"responses file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"responses file {path} is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"responses file {path}: expected a JSON list of entries with model_response")
    return entries


def answer_statistics(responses: Path) -> dict[str, float]:
    """Mean tokens an answer and the share that the model ended itself; nothing for a file that others made."""
    record = _record(responses)
    if record is None:
        return {}
    made = record["responses"]
    n = len(made)
    return {"mean_tokens": sum(x["tokens"] for x in made) / n, "ended": sum(x["ended"] for x in made) / n}
