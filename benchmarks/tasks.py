"""What every contender is given: the same entries, batches and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Row:
    """Token ids of an entry, end token included, and the length of its prompt without the response header."""

    ids: list[int]
    prompt_length: int
    response_start: int


@cache
def model_conf(size: str) -> dict[str, Any]:
    """The sizes of a model, from `conf/model`."""
    from instruct_lm.io.conf_files import model_config

    return model_config(size).model_dump()


@cache
def rows(size: str) -> tuple[str, list[Row]]:
    """The 1100 real entries where they are at hand, else the embedded ones; and what they are called.

    In the ids of the model's own vocabulary, or where GPT-2's is not at hand in SmolLM2's, which is smaller.
    """
    from instruct_lm.data.dataset import load_conversations
    from instruct_lm.data.encoding import encode_conversations
    from instruct_lm.data.pieces import Kind
    from instruct_lm.data.prompts import ALPACA
    from instruct_lm.data.tokenizer import load_tokenizer
    from instruct_lm.io.fetcher import Fetcher

    real, gpt2 = SHARED / "data" / "instruction-data.json", sorted(SHARED.glob("tiktoken/*"), key=_file_size)
    if size.startswith("gpt2") and gpt2:
        tokenizer = load_tokenizer(gpt2[0])  # merges.txt; the other file is the vocabulary that follows from it
    else:
        model = model_conf("smollm2-135m")
        tokenizer = load_tokenizer(Fetcher().fetch(model["weights"], sha256=model["weights_sha256"]))
    name, source = ("1100 entries", real) if real.is_file() else ("embedded entries", "sample")
    encoded = encode_conversations(load_conversations(source), tokenizer, ALPACA)
    return name, [
        Row(row.input_ids.tolist(), int((row.kinds < Kind.HEADER).sum()), int((row.kinds < Kind.RESPONSE).sum()))
        for row in encoded
    ]


def _file_size(path: Path) -> int:
    return path.stat().st_size


def batches(size: str, n: int, batch_size: int = 8, seed: int = 123) -> list[list[Row]]:
    """The first batches of a shuffled training split (its first 85%)."""
    everything = rows(size)[1]
    train = everything[: int(len(everything) * 0.85)]
    order = np.random.default_rng(seed).permutation(len(train))
    return [[train[i] for i in order[k * batch_size : (k + 1) * batch_size]] for k in range(n)]


def long_batches(n: int, batch_size: int = 8, seed: int = 123) -> list[list[Row]]:
    """Random examples of 300 to 1000 tokens, the lower half of each its prompt, behind a common prefix of 24."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 49_000, 24).tolist()
    made = []
    for _ in range(n):
        lengths = rng.integers(300, 1001, batch_size)
        made.append([Row(prefix + rng.integers(0, 49_000, m - 24).tolist(), m // 2, m // 2) for m in lengths])
    return made


def prompts(size: str) -> list[list[int]]:
    """The prompts of the test split (the tenth after the training split), response header included."""
    everything = rows(size)[1]
    start, count = int(len(everything) * 0.85), int(len(everything) * 0.1)
    return [row.ids[: row.response_start] for row in everything[start : start + count]]
