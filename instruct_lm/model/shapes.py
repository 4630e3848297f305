"""Models with shapes alone, to be counted or to be filled from a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutInit(TorchFunctionMode):
    """Lets the functions of `torch.nn.init` return their tensor as it is, as Lightning Fabric's `_EmptyInit` does.

    On the meta device they compute nothing, but `normal_` takes half a second to import SymPy for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made inside have parameters with shapes and dtypes but without values, on the meta device."""
    with torch.device("meta"), _WithoutInit():
        yield
