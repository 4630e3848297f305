"""Answers kept as they are made, so that an evaluation that was killed goes on, and several processes can share it.

Entries are answered in batches of similar length. Which entries share a batch depends on nothing but the entries, and a
batch that was cut is answered again as a whole: so an answer is the same, to the bit, however often the work was
interrupted and however many processes did it. (The sampling seeds are those of the entries; but sums over rows of other
lengths round differently, and a token may hang on that.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.data.conversation import Conversation
from instruct_lm.io.files import finite, shown
from instruct_lm.io.records import digest, record_line, record_lines

if TYPE_CHECKING:  # it imports torch
    from instruct_lm.respond import Responder, Response

logger = logging.getLogger(__name__)


def answer_entries(
    responder: Responder,
    examples: Sequence[Conversation],
    folder: Path,
    made_by: Mapping[str, Any],
    rank: int = 0,
    world_size: int = 1,
    on_done: Callable[[int], None] | None = None,
) -> list[Response] | None:
    """Answer this process's share of the entries, but for those that a call before has answered.

    Each finished batch is appended to `answers.<rank>.jsonl` and synced. Each line carries a fingerprint of `made_by`
    and the entries, and a check of its own content: lines of other answers and damaged ones do not count.

    Args:
        responder: The model with all that it needs to answer.
        examples: (n,) the entries.
        folder: Where to keep the answers.
        made_by: Everything that determines the answers, as JSON values.
        rank: The number of this process, from 0: it takes every `world_size`-th batch.
        world_size: Number of processes.
        on_done: Called with numbers of answers that are there: first with those of earlier calls and of other
            processes so far, then with those just made.

    Returns:
        (n,) The answers, in the order of the entries; None while other processes have not made all of theirs. When all
        have returned, another call gives them.

    Raises:
        InputError: As for `Responder.prompt_ids`.
        OSError: The answers cannot be written.
    """
    fingerprint = digest(finite({"made_by": made_by, "entries": [example.as_entry() for example in examples]}))
    found = _read_answers(folder, fingerprint)
    if on_done is not None:
        on_done(len(found))
    batches = responder.batches(examples)
    todo = [batch for batch in batches[rank::world_size] if not found.keys() >= set(batch)]
    if todo:
        if found:
            logger.info("%s: continuing after %d of %d answers", shown(folder), len(found), len(examples))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"answers.{rank}.jsonl"
        _keep(path, fingerprint)
        with path.open("ab") as file:
            for batch in todo:
                answers = responder.answer([examples[i] for i in batch], numbers=batch)
                file.write("".join(_lines(fingerprint, batch, answers)).encode())
                file.flush()
                os.fsync(file.fileno())
                if on_done is not None:
                    on_done(len(set(batch) - found.keys()))
        found = _read_answers(folder, fingerprint)
    return [found[i] for i in range(len(examples))] if len(found) == len(examples) else None


def forget_answers(folder: Path) -> None:
    """Delete the answers of all processes, which another file now holds."""
    for path in folder.glob("answers.*.jsonl"):
        path.unlink()


def _lines(fingerprint: str, batch: Sequence[int], answers: Sequence[Response]) -> Iterator[str]:
    for index, answer in zip(batch, answers, strict=True):
        values = {"fingerprint": fingerprint, "index": index, **answer._asdict()}
        yield record_line(values) + "\n"


def _read_answers(folder: Path, fingerprint: str) -> dict[int, Response]:
    """Index → answer of all processes."""
    from instruct_lm.respond import Response

    found = {}
    for path in sorted(folder.glob("answers.*.jsonl")):
        for values in _whole_lines(path, fingerprint):
            found[values["index"]] = Response(values["text"], values["tokens"], values["ended"])
    return found


def _whole_lines(path: Path, fingerprint: str) -> Iterator[dict[str, Any]]:
    for _, values in record_lines(path.read_text(encoding="utf-8", errors="replace")):
        if values.get("fingerprint") == fingerprint:
            yield values


def _keep(path: Path, fingerprint: str) -> None:
    """Begin a file of other answers anew; end a line that was cut."""
    if not path.exists():
        return
    if next(_whole_lines(path, fingerprint), None) is None:
        path.unlink()
    elif not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
