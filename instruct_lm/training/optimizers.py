"""AdamW and Adafactor with decay on matrices only, after the backward pass or inside it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and its learning rate.

    Args:
        name: ``adamw``, or ``adafactor``: second moments as a row and a column (https://arxiv.org/abs/1804.04235), no
            first moments.
        lr: Peak learning rate.
        weight_decay: On matrices only; biases and norms do not decay.
        beta1, beta2, eps: Adam's.
        warmup_steps: Optimizer steps over which the rate rises linearly from 0.
        schedule: ``constant`` after the warmup, or ``cosine`` down to 0 at the last step.
        in_backward: Update each matrix as soon as its gradient is made, and free the gradient: AdamW only.
    """

    name: str = "adamw"
    lr: float = 5e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: str = "constant"
    in_backward: bool = False

    def factor(self, step: int, total_steps: float) -> float:
        """Share of the peak rate at optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def build(self, module: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """The optimizer of what a module trains.

        Args:
            module: The owner of the parameters; those that require gradients are trained.
            fused: One kernel for all of AdamW's arithmetic; False: torch's choice for the device among the others.
        """
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.name == "adafactor":
            return torch.optim.Adafactor(groups, lr=self.lr, foreach=False)
        settings: dict[str, Any] = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}
        settings["fused"] = fused or None  # False would rule out the kernels for many parameters at once
        return AdamWInBackward(groups, **settings) if self.in_backward else torch.optim.AdamW(groups, **settings)


ADAMW = OptimizerSettings()


class AdamWInBackward(torch.optim.AdamW):
    """AdamW that updates a parameter when autograd has made its gradient, and frees the gradient at once.

    The arithmetic is AdamW's. There is never a full set of gradients, so neither their global norm nor accumulation
    over batches is possible. `step` updates the parameters that still have a gradient.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        groups = self.param_groups
        group = next(group for group in groups if any(p is parameter for p in group["params"]))
        self.param_groups = [{**group, "params": [parameter]}]
        try:
            super().step()
        finally:
            self.param_groups = groups
        parameter.grad = None
