"""Rotary positions (https://arxiv.org/abs/2104.09864). Shapes in comments: D = head_dim."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LLAMA3_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Keys of `config.json`, in the order of the arguments of `llama3_rope_factors`."""

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


def find_llama3_parameters(head_dim: int, base: float, factors: Sequence[float]) -> dict[str, float] | None:
    """The parameters of `llama3_rope_factors` that give these divisors, to the precision of a float32.

    With t_i for the i-th frequency over 2 π, the share of a frequency that is kept is a t_i − b in between, where
    a = original_length / (high − low) and b = low / (high − low). The divisors leave the scale of the three open, so
    low is taken to be 1, as in all models of Meta.

    Returns:
        The keys of `config.json` with their values; None if the divisors are of another kind.
    """
    factor = round(factors[-1], 5)  # of the lowest frequency, which is divided in full
    if factor <= 1:
        return None
    frequencies = [base ** (-2 * i / head_dim) / (2 * math.pi) for i in range(len(factors))]
    kept = [(1 / each - 1 / factor) / (1 - 1 / factor) for each in factors]
    between = [(t, k) for t, k in zip(frequencies, kept, strict=True) if 1e-4 < k < 1 - 1e-4]
    candidates = [(4.0, 8192)]  # high_freq_factor and original length of Llama 3.1 and later
    if len(between) > 1:
        (t1, k1), (t2, k2) = between[0], between[-1]
        a = (k1 - k2) / (t1 - t2)
        if (b := a * t1 - k1) > 0:
            candidates.append((round(1 + 1 / b, 3), round(a / b)))
    for high, length in candidates:
        made = llama3_rope_factors(head_dim, base, factor, 1.0, high, length)
        if all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(made, factors, strict=True)):
            values = (factor, 1.0, high, length)
            return dict(zip(LLAMA3_PARAMETERS, values, strict=True))
    return None
