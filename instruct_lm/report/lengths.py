"""Entries by the length of the response relative to that of the prompt, on which the effect of masking depends.

Published results on training on prompts name this ratio as the variable that decides: Shi et al., arXiv 2405.14394;
Huerta-Enochian and Ko, 2401.13586; Chatterjee et al., 2507.07817.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instruct_lm.data.conversation import Conversation

MIN_ENTRIES = 30  # ten for each third


class Part(NamedTuple):
    """Entries with ratios from `low` to `high`."""

    low: float
    high: float
    places: list[int]


def length_ratios(examples: Sequence[Conversation]) -> np.ndarray:
    """(n,) float64: characters of the reference per character of the prompt's texts, without the prompt's template.

    Characters, since words have no meaning in Chinese.

    Example: "Name it." with the input "a cat" (8 + 5 characters) and the reference "Tom" (3) has a ratio of 3 / 13.
    """
    prompts = (sum(len(turn.text) + len(turn.input) for turn in example.prompt) for example in examples)
    return np.array([len(e.reference) / max(1, n) for e, n in zip(examples, prompts, strict=True)])


def thirds(examples: Sequence[Conversation]) -> list[Part]:
    """Three parts of the same size (to one entry), the smallest ratios first; empty for few entries.

    Entries with the same ratio stay in their order.
    """
    if len(examples) < MIN_ENTRIES:
        return []
    ratios = length_ratios(examples)
    parts = np.array_split(np.argsort(ratios, kind="stable"), 3)
    return [Part(float(ratios[part[0]]), float(ratios[part[-1]]), sorted(part.tolist())) for part in parts]
