"""Encoded entries, and the weight of each of their tokens in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from instruct_lm.errors import InputError


class EncodedExample(NamedTuple):
    """Token ids of one entry.

    Attributes:
        input_ids: int32 (length,); a view into the dataset.
        kinds: uint8 (length,); the `Kind` of each token.
    """

    input_ids: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class EncodedDataset(Sequence[EncodedExample]):
    """All encoded entries in flat arrays; 52,000 of Alpaca's take about 40 MB.

    Rows follow each other without padding, and ``offsets`` says where each begins; see the example.

    Attributes:
        input_ids: int32 (Σ lengths,).
        kinds: uint8 (Σ lengths,); the `Kind` of each token.
        offsets: int64 (n + 1,); row i is ``input_ids[offsets[i] : offsets[i + 1]]``.
        entries: int32 (n,); number of each row's entry in its file, or its place in the list that was encoded, from 1.
        dropped: Number of entries left out, because they are too long or a response has no tokens.
        truncated: Number of rows that were cut.

    Example:
        Two rows, with the prompts 8 7 and 8 7 7, the header 9, a response and the end token 5:

        >>> ids, offsets = np.array([8, 7, 9, 1, 5, 8, 7, 7, 9, 2, 3, 5]), np.array([0, 5, 12])
        >>> kinds = np.array([0, 0, 1, 2, 2, 0, 0, 0, 1, 2, 2, 2])
        >>> data = EncodedDataset(ids, kinds, offsets, entries=np.array([1, 2]))
        >>> [row.input_ids.tolist() for row in data], data.lengths.tolist()
        ([[8, 7, 9, 1, 5], [8, 7, 7, 9, 2, 3, 5]], [5, 7])
    """

    input_ids: np.ndarray
    kinds: np.ndarray
    offsets: np.ndarray
    entries: np.ndarray
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> EncodedExample:  # type: ignore[override]  # no slices
        row = range(len(self))[index]  # accepts negative indices; raises IndexError past the end
        place = slice(self.offsets[row], self.offsets[row + 1])
        return EncodedExample(self.input_ids[place], self.kinds[place])

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,); number of tokens of each row, end tokens included."""
        return np.diff(self.offsets)


def resolve_prompt_loss_weight(mask_instructions: bool, prompt_loss_weight: float | None) -> float:
    """The weight of prompt tokens in the loss: the given one, else 0 with masked instructions and 1 without.

    Raises:
        InputError: The weight is outside [0, 1].
    """
    if prompt_loss_weight is None:
        return 0.0 if mask_instructions else 1.0
    if not 0 <= prompt_loss_weight <= 1:
        raise InputError(f"prompt_loss_weight={prompt_loss_weight}: must be from 0 (masked) to 1, or null.")
    return float(prompt_loss_weight)


def loss_weights(example: EncodedExample, prompt_loss_weight: float = 1.0, mask_header: bool = False) -> np.ndarray:
    """The weight of each token of an entry as a target of the loss.

    Args:
        example: An encoded entry of n tokens.
        prompt_loss_weight: Weight of the prompt's tokens.
        mask_header: Whether the response header gets the prompt's weight; else its weight is 1, as in the book's
            exercise 7.2.

    Returns:
        float32 (n,), aligned with `input_ids`, so it must be shifted together with the labels. No position predicts the
        first token, so its weight is 0. Response and end token have weight 1.

    Example:
        Three prompt tokens 8, two header tokens 9, the response 1 and the end token 5:

        >>> row = EncodedExample(np.array([8, 8, 8, 9, 9, 1, 5]), kinds=np.array([0, 0, 0, 1, 1, 2, 2]))
        >>> loss_weights(row, prompt_loss_weight=0.25).tolist()
        [0.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
        >>> loss_weights(row, prompt_loss_weight=0.25, mask_header=True).tolist()
        [0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0]
    """
    of_kind = np.array([prompt_loss_weight, prompt_loss_weight if mask_header else 1, 1], dtype=np.float32)
    weights = of_kind[example.kinds]
    weights[0] = 0
    return weights
