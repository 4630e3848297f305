"""Mixed precision on a CPU: fp32 weights, and copies of them in bf16 that are rounded once per optimizer step.

`torch.autocast` switches it on, as it does for torch's own layers, which round each weight in each product and make a
full bf16 gradient beside the fp32 one. Here the copies of all blocks are made together, before the first product that
needs them, and used until their weight changes: forward, in the backward pass and in validation. In training a copy
lies where the gradient of its weight will be, which is twice as large: once the gradient of the layer's input is made,
the copy is of no more use, and the gradient takes its place. So the copies need no memory of their own.
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
    gradient: Tensor | None  # fp32, shaped like the weight; the copy is its first half


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
        if weight.dtype != torch.float32 or hasattr(weight, "placements"):
            continue
        keeps = keep or not weight.requires_grad
        # With the optimizer in the backward pass there are never many gradients, and copies are smaller.
        in_place = torch.is_grad_enabled() and not keeps and not getattr(weight, "_post_accumulate_grad_hooks", None)
        if _held(weight) is None or (in_place and _copies[weight].gradient is None):
            with torch.inference_mode(False), torch.no_grad():  # generation may be the first to ask, training goes on
                gradient = torch.empty(weight.shape, device=weight.device) if in_place else None
                place = torch.empty_like(weight, dtype=torch.bfloat16) if gradient is None else first_half(gradient)
                _copies[weight] = _Copy(place.copy_(weight), _version(weight), keeps, gradient)


def release(weight: Tensor) -> Tensor | None:
    """Forget the copy of a weight unless it is to be kept; the memory for the weight's gradient, if the copy lay there.

    The caller may write it only once the copy is of no more use.
    """
    copy = _copies.get(weight)
    if copy is None or copy.keep:
        return None
    del _copies[weight]
    return copy.gradient


def first_half(gradient: Tensor) -> Tensor:
    """As many bf16 numbers as the fp32 tensor has, in the first half of its memory and in its shape."""
    return gradient.view(-1).view(torch.bfloat16)[: gradient.numel()].view(gradient.shape)


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
