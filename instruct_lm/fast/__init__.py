"""The same numbers, faster: applied to a built model from outside, and never needed by it.

`accelerate` exchanges the classes of a model's layers; parameters, names and checkpoints stay as they are. Losses,
gradients and greedy answers equal the plain model's to rounding (`tests/fast/test_equals_plain.py`).
"""

from torch import nn

from instruct_lm.fast.linear import FastFrozenLinear, FastLinear, FastLoRALinear
from instruct_lm.fast.loss import InPlaceEmbedding, chunked_loss, packed_loss
from instruct_lm.fast.packing import PackedAttention, PackedGPT, round_frozen
from instruct_lm.model.gpt import GPT, CausalSelfAttention
from instruct_lm.model.lora import FrozenLinear, LoRALinear

FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    nn.Embedding: InPlaceEmbedding,
    FrozenLinear: FastFrozenLinear,
    LoRALinear: FastLoRALinear,
    CausalSelfAttention: PackedAttention,
    GPT: PackedGPT,
}


def accelerate(
    module: nn.Module, *, packed: bool = True, keeps_rounded: bool = False, rounds_frozen: bool = False
) -> None:
    """Make a built model, or an `InstructionTuner` with its model, faster in place.

    Args:
        module: A `GPT` (with adapters, if it has any, added before), or a tuner.
        packed: Let a tuner train on packed batches with the shared prefix once; False: on padded rows, which dropout
            needs.
        keeps_rounded: As for `PackedGPT`: True for a tuner that accumulates gradients.
        rounds_frozen: Store the blocks' matrices that are not trained in bf16 in place of fp32, for a model that always
            computes under such an autocast: its products round them anyway.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=8))
        >>> accelerate(model)
        >>> type(model.h[0].mlp.fc).__name__
        'FastLinear'
    """
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
    for part in module.modules():
        if isinstance(part, PackedGPT):
            part.keeps_rounded = keeps_rounded
            if rounds_frozen:
                round_frozen(part)
    if hasattr(module, "loss"):
        module.loss = packed_loss if packed else chunked_loss  # type: ignore[assignment]
