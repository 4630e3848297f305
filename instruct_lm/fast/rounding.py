"""Mixed precision on a CPU: fp32 weights, and copies of them in bf16 that are rounded once per optimizer step.

`torch.autocast` switches it on, as it does for torch's own layers, which round each weight in each product and make a
full bf16 gradient beside the fp32 one. Here the copies of all blocks are made together, before the first product that
needs them, and used until their weight changes: forward, in the backward pass and in validation. In training a copy
is freed as soon as the gradient of its layer's input is made. So the copies are gone when the gradients, which are
twice as large, are all there, and the peak memory is that of fp32.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy(NamedTuple):
    rounded: Tensor
    version: tuple[int, int]  # of the weight that was rounded
    keep: bool


_copies: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()


def is_on(device: torch.device) -> bool:
    """Whether products on this device are to be made in bf16 by `instruct_lm.fast`: under autocast, on a CPU."""
    return (
        device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def hold(weights: Iterable[Tensor], keep: bool = False) -> None:
    """Round weights that are new or have changed, and hold the copies.

    Args:
        weights: Of fp32. Parts of a matrix that processes share (`DTensor`) are left out, and so is what is bf16
            already.
        keep: Until the weights change. False: those that are trained until `release`.
    """
    for weight in weights:
        if weight.dtype == torch.float32 and not hasattr(weight, "placements") and _held(weight) is None:
            with torch.inference_mode(False), torch.no_grad():  # generation may be the first to ask, training goes on
                copy = weight.bfloat16()
            _copies[weight] = _Copy(copy, _version(weight), keep or not weight.requires_grad)


def release(weight: Tensor) -> None:
    """Free the copy of a weight unless it is to be kept."""
    if (copy := _copies.get(weight)) is not None and not copy.keep:
        del _copies[weight]


def rounded(weight: Tensor) -> Tensor:
    """The weight in bf16: the copy that is held, or else one for this product alone."""
    held = _held(weight)
    return weight.bfloat16() if held is None else held


def _held(weight: Tensor) -> Tensor | None:
    copy = _copies.get(weight)
    return copy.rounded if copy is not None and copy.version == _version(weight) else None


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _count_update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After each optimizer step: torch's fused optimizers do not count their changes as versions."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_update)
