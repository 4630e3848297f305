"""What every contender is given: the same entries, batches and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SIZES = ("gpt2", "gpt2-medium", "smollm2-135m")


@dataclass(frozen=True)
class Row:
    """Token ids of an entry, end token included, and the length of its prompt without the response header."""

    ids: list[int]
    prompt_length: int
    response_start: int


@cache
def model_conf(size: str) -> dict[str, Any]:
    """The sizes of a model, from `conf/model`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from instruct_lm.cli import CONF, register

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("train", [f"model={size}"]).model, resolve=True)  # type: ignore[return-value]


@cache
def rows() -> tuple[str, list[Row]]:
    """The 1100 real entries where they are at hand, with GPT-2's vocabulary; else the embedded ones with SmolLM2's."""
    from instruct_lm.data.dataset import load_examples
    from instruct_lm.data.encoding import encode_examples
    from instruct_lm.data.prompts import ALPACA
    from instruct_lm.data.tokenizer import load_tokenizer
    from instruct_lm.sources import Fetcher

    merges = sorted(SHARED.glob("tiktoken/*"), key=lambda path: path.stat().st_size)
    if (real := SHARED / "data" / "instruction-data.json").is_file() and merges:
        name, examples, tokenizer = "1100 entries", load_examples(real), load_tokenizer(merges[0])
    else:
        model = model_conf("smollm2-135m")
        path = Fetcher().fetch(model["weights"], sha256=model["weights_sha256"])
        name, examples, tokenizer = "embedded entries", load_examples("sample"), load_tokenizer(path)
    encoded = encode_examples(examples, tokenizer, ALPACA)
    return name, [
        Row(row.input_ids.tolist(), row.prompt_length, row.prompt_length + row.header_length) for row in encoded
    ]


def batches(n: int, size: int = 8, seed: int = 123) -> list[list[Row]]:
    """The first batches of a shuffled training split (its first 85%)."""
    train = rows()[1][: int(len(rows()[1]) * 0.85)]
    order = np.random.default_rng(seed).permutation(len(train))
    return [[train[i] for i in order[k * size : (k + 1) * size]] for k in range(n)]


def long_batches(n: int, size: int = 8, seed: int = 123) -> list[list[Row]]:
    """Random examples of 300 to 1000 tokens, the lower half of each its prompt, behind a common prefix of 24."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 49_000, 24).tolist()
    made = []
    for _ in range(n):
        lengths = rng.integers(300, 1001, size)
        made.append([Row(prefix + rng.integers(0, 49_000, m - 24).tolist(), m // 2, m // 2) for m in lengths])
    return made


def prompts() -> list[list[int]]:
    """The prompts of the test split (the tenth after the training split), response header included."""
    everything = rows()[1]
    start, count = int(len(everything) * 0.85), int(len(everything) * 0.1)
    return [row.ids[: row.response_start] for row in everything[start : start + count]]
