"""Rotary positions (https://arxiv.org/abs/2104.09864). Shapes in comments: D = head_dim."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosines and sines, (..., 1, D / 2) each


def make_rope(
    position_ids: Tensor, head_dim: int, base: float, factors: Sequence[float] | None, dtype: torch.dtype
) -> Rope:
    """Cosines and sines of each position's angles, (..., 1, D / 2) in ``dtype``.

    Args:
        position_ids: int64 (...).
        head_dim: D.
        base: The angle of pair i is the position times base^(-2 i / D).
        factors: D / 2 divisors of the angles; None: all 1.
        dtype: Of the result; angles are computed in float32.
    """
    dims = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = 1.0 / base ** (dims / head_dim)  # (D / 2,); rounded as in transformers
    if factors is not None:
        inverse_frequency = inverse_frequency / torch.tensor(factors, device=dims.device)
    angles = (position_ids[..., None].float() * inverse_frequency)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x, (..., heads, D), by its positions, in two halves as HF's Llama."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def llama3_rope_factors(
    head_dim: int, base: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: float
) -> tuple[float, ...]:
    """The divisors of the rotary frequencies of Llama 3.1 and later, ``head_dim / 2`` numbers.

    A frequency that turns more than ``high_freq_factor`` times within the original length stays; one that turns less
    than ``low_freq_factor`` times is divided by ``factor``; the frequencies between are interpolated.
    Source: ``apply_scaling`` in https://github.com/meta-llama/llama-models (models/llama3/model.py).

    Args:
        head_dim: Width of a head.
        base: Base of the frequencies.
        factor, low_freq_factor, high_freq_factor: As in `config.json`.
        original_length: ``original_max_position_embeddings``, in tokens.

    Raises:
        ValueError: ``high_freq_factor`` is not above ``low_freq_factor``.
    """
    if high_freq_factor <= low_freq_factor:
        raise ValueError(f"high_freq_factor={high_freq_factor} must be above low_freq_factor={low_freq_factor}")
    factors = []
    for dim in range(0, head_dim, 2):
        turns = original_length * base ** (-dim / head_dim) / (2 * math.pi)
        kept = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return tuple(factors)
