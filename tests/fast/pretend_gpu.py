"""A device that is no CPU, made of CPU tensors: it finds tensors left on the wrong device, and where a GPU is waited for.

torch lets Python stand in for the kernels of one device of its own (the "PrivateUse1" key). Here each of them runs on the
CPU, so all values are real, but first it looks at the devices: a CPU tensor among tensors of this device is an error, as
it is on a GPU. What a GPU would have to be waited for is noted in `waits`: values that are fetched, counts that depend on
values, and data that is sent. It knows nothing of a GPU's kernels, dtypes and speed.

Registered once in a process and for good: `on_the_pretend_gpu.py` is run as a process of its own.
"""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import instruct_lm

_PACKAGE = Path(instruct_lm.__file__).parent


class _Module(_DummyBackendModule):
    """What torch asks of `torch.<device>`; autocast can be switched off, and casts nothing."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", _Module())
DEVICE = torch.device("pretend:0")

waits: list[tuple[str, str]] = []
"""What would be waited for (``fetch``, ``count`` or ``send``), and the file of this package that asked for it."""

_COUNTS = ("nonzero", "masked_select", "_unique2", "equal")  # the size of the result, or the branch, hangs on values


class PretendTensor(torch.Tensor):
    """A tensor on the device; ``inner`` holds its values on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendTensor":
        with torch.inference_mode(inner.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=DEVICE,
            )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


class Fetching(TorchFunctionMode):
    """Notes the calls that fetch values without an operator, and makes tensors that torch.tensor would not."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "pretend":
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        fetches = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__)
        if function in (*fetches, torch.Tensor.__bool__) and isinstance(args[0], PretendTensor):
            _note("fetch")
            return function(args[0].inner, *args[1:], **kwargs)
        return function(*args, **kwargs)


def _note(kind: str) -> None:
    files = [Path(frame.filename) for frame in traceback.extract_stack()]
    own = [file.relative_to(_PACKAGE).as_posix() for file in files if file.is_relative_to(_PACKAGE)]
    waits.append((kind, own[-1] if own else "elsewhere"))


def _run(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    flat, structure = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, PretendTensor)]
    name, asked = operator.overloadpacket.__name__, kwargs.get("device")
    on_device = bool(here) if asked is None else torch.device(asked).type == "pretend"
    foreign = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0]
    if name == "copy_" and foreign:
        _note("send" if isinstance(tensors[0], PretendTensor) else "fetch")
    elif name == "_to_copy":
        if on_device != bool(here):
            _note("send" if on_device else "fetch")
    elif here and foreign:
        shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name} takes tensors of two devices: {shapes}")
    if here and (name in _COUNTS or (name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:]))):
        _note("count")

    def inner(x: Any) -> Any:
        if isinstance(x, PretendTensor):
            return x.inner
        return torch.device("cpu") if isinstance(x, torch.device) else x

    args, kwargs = tree_unflatten([inner(x) for x in flat], structure)
    kwargs.pop("pin_memory", None)
    own = {id(x.inner): x for x in here}  # what was changed in place stays the same tensor

    def outer(x: torch.Tensor) -> torch.Tensor:
        return own[id(x)] if id(x) in own else PretendTensor(x) if on_device else x

    return tree_map_only(torch.Tensor, outer, operator(*args, **kwargs))


_library = torch.library.Library("_", "IMPL")  # kept, since what it registers ends with it
_library.fallback(lambda operator, *args, **kwargs: _run(operator, args, kwargs), "PrivateUse1")
_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
