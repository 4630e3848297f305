"""Files of answers: `responses.json`, and `responses.made.json` with what determined the answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.data.conversation import ROLES, Conversation
from instruct_lm.errors import InputError
from instruct_lm.io.files import sha256_of, write_json
from instruct_lm.io.records import read_record, write_record
from instruct_lm.io.run_files import MADE_BY, RESPONSES

if TYPE_CHECKING:  # it imports torch
    from instruct_lm.respond import Response

logger = logging.getLogger(__name__)

_HASH = "responses_sha256"  # in the record
TEXTS = ("instruction", "input", "output", "model_response")


def save_responses(
    folder: Path, examples: Sequence[Conversation], responses: Sequence[Response], made_by: Mapping[str, Any]
) -> None:
    """Write `responses.json`, the list that the book's tools read, and the record of how the answers were made.

    Args:
        folder: Where to write.
        examples: The entries.
        responses: Their answers, in the same order.
        made_by: Everything that determines the answers (model, data, seed, …), as JSON values.
    """
    pairs = list(zip(examples, responses, strict=True))
    entries = [{**example.as_entry(), "model_response": response.text} for example, response in pairs]
    made = [{"tokens": response.tokens, "ended": response.ended} for response in responses]
    _write(folder, entries, {"made_by": made_by, "responses": made})


def copy_responses(source: Path, entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write entries that were loaded from `source` to another folder, with the record that lies beside `source`."""
    _write(folder, entries, _read_record(source))


def find_responses(folder: Path, made_by: Mapping[str, Any]) -> Path | None:
    """The folder whose answers were made with exactly `made_by`: `folder`, or one beside it; None if there is none."""
    for candidate in [folder, *sorted(path for path in folder.parent.glob("*") if path.is_dir())]:
        if made_by_of(candidate / RESPONSES) == made_by:
            return candidate
    return None


def made_by_of(responses: Path) -> dict[str, Any]:
    """What determined the answers of a file; empty if that is not recorded, or the file is not as it was recorded."""
    return dict(_read_record(responses).get("made_by", {}))


def load_responses(path: Path) -> list[dict[str, Any]]:
    """Load entries with their `model_response` from a JSON list, also one that another program wrote.

    Raises:
        InputError: The file cannot be read or holds no JSON list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON list of entries with model_response: {error}") from error
    return entries


def entry_texts(entry: Any, place: str) -> dict[str, Any]:
    """The four texts of an entry with its answer, and its `system` and `history` if it has them.

    `input` may be missing or null; other keys are left out.

    Raises:
        InputError: A text is missing or is no text; the message begins with `place`.
    """
    texts: dict[str, Any] = {key: entry.get(key) if isinstance(entry, Mapping) else None for key in TEXTS}
    if texts["input"] is None:
        texts["input"] = ""
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{place}: {key!r} must be a text, and is {value!r}")
    texts |= {key: entry[key] for key in ("system", "history") if entry.get(key)}
    try:
        turns = Conversation.from_entry(texts).turns
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{place}: 'history' must be a list of messages or pairs ({error!r})") from error
    for turn in turns:
        if turn.role not in ROLES or not isinstance(turn.text, str):
            raise InputError(f"{place}: {turn!r:.80} is no turn: 'system' and 'history' must hold texts")
    return texts


def answer_statistics(responses: Path) -> dict[str, float]:
    """`mean_tokens` per answer and the share `ended` by the model itself; empty if no record lies beside the file."""
    made = _read_record(responses).get("responses", [])
    totals = {"mean_tokens": sum(answer["tokens"] for answer in made), "ended": sum(answer["ended"] for answer in made)}
    return {name: total / len(made) for name, total in totals.items()} if made else {}


def _write(folder: Path, entries: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    # The old record goes first: an interruption must not leave it beside other answers.
    (folder / MADE_BY).unlink(missing_ok=True)
    write_json(entries, folder / RESPONSES)
    if record:
        write_record({**record, _HASH: sha256_of(folder / RESPONSES)}, folder / MADE_BY)


def _read_record(responses: Path) -> dict[str, Any]:
    """The record of how a file of responses was made; empty for another program's file, and where either is damaged."""
    if responses.name != RESPONSES or not responses.is_file():
        return {}
    record = read_record(responses.with_name(MADE_BY)) or {}
    if record and record.get(_HASH) != sha256_of(responses):
        logger.warning("%s is damaged, or something else has written it: its record does not count", responses)
        return {}
    return record
