"""The same numbers, faster: applied to a built model from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def accelerate(module: nn.Module) -> None:
    """Make a built model faster in place."""
