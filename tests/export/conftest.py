"""The models of `tests/model`."""

from tests.model.conftest import model

__all__ = ["model"]
