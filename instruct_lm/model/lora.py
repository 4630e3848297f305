"""Low-rank adapters (https://arxiv.org/abs/2106.09685): the weights stay, a product of two thin matrices is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.model.gpt import GPT

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; a weight in a small dtype is widened to the input's for each product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        rounds = torch.is_autocast_enabled(x.device.type)  # by itself
        return F.linear(x, self.weight if rounds else self.weight.to(x.dtype), self.bias)


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``alpha / rank · B A``; B starts at 0, so training starts at the pretrained model.

    Args:
        linear: The layer to adapt.
        rank: Inner width of the product.
        alpha: Scale.
        dropout: Probability, on the input of the adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # (..., rank)
        return self.linear(x) + self.scale * F.linear(low, self.lora_b)


def store_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of linear layers and embeddings to ``dtype``; biases and norms stay as they are."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)


def add_lora(
    model: GPT,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    base_dtype: torch.dtype = torch.float32,
) -> GPT:
    """Freeze a model and give its linear layers adapters, in place.

    Args:
        model: A model without adapters.
        rank, alpha, dropout: As for `LoRALinear`.
        targets: Which layers of each block, by the names in `TARGETS`.
        base_dtype: Stores the frozen matrices in this dtype.

    Raises:
        ValueError: A target that is not in `TARGETS`.
    """
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"lora.targets={unknown} are no layers of a block: choose among {', '.join(TARGETS)}")
    model.requires_grad_(False)
    store_matrices(model, base_dtype)
    for block in model.h:
        for name in TARGETS:
            linear: Any = block.get_submodule(name)
            frozen = FrozenLinear(linear)
            block.set_submodule(name, LoRALinear(frozen, rank, alpha, dropout) if name in targets else frozen)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of a state dict: all that a fine-tuned model adds to its base."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """Add the adapters to the frozen weights, in the adapters' dtype and in place, and remove them from the model."""
    for block in model.h:
        for name in TARGETS:
            if isinstance(layer := block.get_submodule(name), LoRALinear):
                weight = layer.linear.weight.to(layer.lora_a.dtype) + layer.scale * layer.lora_b @ layer.lora_a
                layer.linear.weight = nn.Parameter(weight, requires_grad=False)
                block.set_submodule(name, layer.linear)
    return model
