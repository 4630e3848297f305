"""Make `docs/evidence/longer-prompts.json`: long prompts with short responses, out of the embedded entries.

    python -m benchmarks.longer_prompts

An entry that changes or judges one sentence becomes an entry that does so with one of six, which it names by number:

    Rewrite the sentence in the past tense.     →  Rewrite sentence 4 of the text in the past tense.
    She walks to school.                           1. The soup was cold. 2. … 4. She walks to school. …

The response stays as it is. The other sentences are inputs of other entries of the same split, so that no split shows
anything of another. Each source entry is in one split; in training it stands four times, with other neighbours and
another number each time; for test and validation it stands once, so that their entries are independent of each other.
"""

import json
import random
import re
from pathlib import Path

from instruct_lm.data.dataset import load_conversations

OUT = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "longer-prompts.json"
SENTENCES, REPEATS, TEST, VALIDATION, SEED = 6, 4, 75, 20, 1
NAMED = re.compile(r"\bthe (following )?((passive|active) )?(sentence|statement|text)\b")


def sources() -> list[dict[str, str]]:
    """Embedded entries whose instruction speaks of one sentence, and whose input is one."""
    entries = [conversation.as_entry() for conversation in load_conversations("sample")]
    return [
        entry
        for entry in entries
        if len(NAMED.findall(entry["instruction"])) == 1
        and len(entry["input"].split()) >= 3
        and "\n" not in entry["input"]
        and len(re.findall(r"[.?!]\s", entry["input"])) == 0
    ]


def longer(entry: dict[str, str], others: list[dict[str, str]], choose: random.Random) -> dict[str, str]:
    """The entry with five sentences of others around its own."""
    inputs = sorted({other["input"] for other in others} - {entry["input"]})
    text, place = choose.sample(inputs, SENTENCES - 1), choose.randrange(SENTENCES)
    text.insert(place, entry["input"])
    return {
        "instruction": NAMED.sub(f"sentence {place + 1} of the text", entry["instruction"]),
        "input": "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(text, 1)),
        "output": entry["output"],
    }


def make() -> list[dict[str, str]]:
    """The entries in file order: training, test, validation."""
    choose, found = random.Random(SEED), sources()
    choose.shuffle(found)
    test, validation, train = found[:TEST], found[TEST : TEST + VALIDATION], found[TEST + VALIDATION :]
    made = [longer(entry, train, choose) for _ in range(REPEATS) for entry in choose.sample(train, len(train))]
    return made + [longer(entry, part, choose) for part in (test, validation) for entry in part]


if __name__ == "__main__":
    made = make()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(made)} entries, {len(made) - TEST - VALIDATION} of them for training, in {OUT}")
