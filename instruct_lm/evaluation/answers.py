"""Answers kept as they are made, so that several processes can share the work."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_lm.data.conversation import Conversation
from instruct_lm.io.records import digest
from instruct_lm.respond import Responder, Response


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

    Args:
        responder: The model with all that it needs to answer.
        examples: (n,) the entries.
        folder: Each answer is appended to `answers.<rank>.jsonl` there.
        made_by: Everything that determines the answers, as JSON values.
        rank, world_size: The number of this process, from 0, and number of processes.
        on_done: Called with the number of answers that have just been made.

    Returns:
        (n,) The answers, in the order of the entries; None while other processes have not made all of theirs.
    """
    fingerprint = digest({"made_by": dict(made_by), "entries": [example.as_entry() for example in examples]})
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[int, Response] = {}
    for path in sorted(folder.glob("answers.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if (made := json.loads(line))["of"] == fingerprint:
                found[made["index"]] = Response(*made["response"])
    todo = [i for i in range(rank, len(examples), world_size) if i not in found]
    with (folder / f"answers.{rank}.jsonl").open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), responder.batch_size):
            batch = todo[start : start + responder.batch_size]
            for i, response in zip(batch, responder.answer([examples[i] for i in batch], on_done), strict=True):
                found[i] = response
                file.write(json.dumps({"of": fingerprint, "index": i, "response": response}) + "\n")
    return [found[i] for i in range(len(examples))] if len(found) == len(examples) else None
