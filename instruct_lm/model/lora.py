"""Low-rank adapters (https://arxiv.org/abs/2106.09685): the weights stay, a product of two thin matrices is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instruct_lm.model.gpt import GPT, store_matrices

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``alpha / rank · B A``; B starts at 0, so training starts at the pretrained model.

    Args:
        linear: the layer to adapt; its parameters are frozen.
        rank: inner width of the product.
        alpha: scale.
        dropout: probability, on the input of the adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        flat = x.flatten(0, -2)
        low = F.linear(F.dropout(flat, self.dropout, self.training), self.lora_a)  # (tokens, rank)
        scaled = (self.lora_b * self.scale).to(low.dtype)
        out = self.linear(flat).addmm_(low, scaled.T)  # in place: two temporaries less among the activations
        return out.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The layer with the adapter added to its weights, in the adapter's dtype."""
        weight = self.linear.weight.to(self.lora_a.dtype) + self.scale * self.lora_b @ self.lora_a
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        return self.linear


def add_lora(
    model: GPT,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    base_dtype: torch.dtype | None = None,
) -> GPT:
    """Freeze the model and give its linear layers adapters, in place.

    Args:
        targets: which layers of each block, by name; see `TARGETS`.
        base_dtype: store the frozen matrices in this dtype; they are widened for each product. None: as they are.

    Raises:
        ValueError: a target that is none.
    """
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"lora.targets={unknown} are no layers of a block: choose among {', '.join(TARGETS)}")
    model.requires_grad_(False)
    if base_dtype is not None:
        store_matrices(model, base_dtype)
    for block in model.h:
        for target in targets:
            parent, name = target.split(".")
            module = getattr(block, parent)
            setattr(module, name, LoRALinear(getattr(module, name), rank, alpha, dropout))
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of a state dict: all that a fine-tuned model adds to its base."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def merge_lora(model: GPT) -> GPT:
    """Fold the adapters into the weights, in place: afterwards it is a plain model again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merge())
    return model
