"""Memory: how much a process holds, and an estimate of what a training run will need before it begins."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from instruct_lm.model.gpt import GPTConfig

PROCESS = 0.45e9  # bytes: Python, torch, Lightning and TensorBoard, measured
FLOAT = 4


_LEANER: dict[str, dict[str, Any]] = {
    "trainer.activation_checkpointing=true (slower)": {"activation_checkpointing": True},
    "optimizer.in_backward=true (no clipping, no accumulation)": {"in_backward": True},
    "trainer.activation_checkpointing=true optimizer.in_backward=true": {
        "activation_checkpointing": True,
        "in_backward": True,
    },
    "lora=r16 (trains adapters alone)": {"lora_rank": 16, "in_backward": False},
    "lora=r16 lora.base_dtype=bfloat16 trainer.activation_checkpointing=true": {
        **{"lora_rank": 16, "base_bytes": 2, "in_backward": False, "activation_checkpointing": True}
    },
}
"""Settings that take less memory, for the message of a run that may not fit."""


@dataclass(frozen=True)
class TrainingMemory:
    """The settings that decide how much memory training takes.

    Args:
        model: Sizes.
        packed_tokens: Most tokens of a batch that go through the linear layers.
        padded_tokens: The same batch as a padded grid, which attention sees.
        lora_rank: 0 for full fine-tuning.
        base_bytes: Of a frozen weight; 4 or 2.
        optimizer: ``adamw`` or ``adafactor``.
        in_backward: Gradients are freed as they are used.
        activation_checkpointing: One block's activations at a time.
        head_targets: Labels whose logits are held at once; None: one for each packed token.
    """

    model: GPTConfig
    packed_tokens: int
    padded_tokens: int
    lora_rank: int = 0
    base_bytes: int = FLOAT
    optimizer: str = "adamw"
    in_backward: bool = False
    activation_checkpointing: bool = False
    head_targets: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        c = self.model
        positions = c.block_size if c.position == "learned" else 0
        return (c.vocab_size + positions) * c.n_embd + c.n_layer * sum(a * b for a, b in self._matrices)

    @property
    def trained(self) -> int:
        """Number of those that are trained."""
        if self.lora_rank:
            return self.model.n_layer * sum(self.lora_rank * (a + b) for a, b in self._matrices)
        return self.parameters

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        c = self.model
        qkv = (c.n_head + 2 * c.kv_heads) * c.head_dim
        fc = c.inner * (2 if c.activation == "swiglu" else 1)
        return [(c.n_embd, qkv), (c.n_embd, c.n_embd), (c.n_embd, fc), (c.inner, c.n_embd)]

    @property
    def bytes(self) -> float:
        """The estimate for the whole process, in bytes."""
        c = self.model
        embedding = c.vocab_size * c.n_embd
        weights = self.parameters * (self.base_bytes if self.lora_rank else FLOAT)
        gradients = FLOAT * (embedding + c.n_embd * c.inner * 2 if self.in_backward else self.trained)
        states = 2 * FLOAT * self.trained if self.optimizer == "adamw" else 0
        # Logits and their gradient, and a frozen head in a small dtype widened in part (all of it at most).
        head = 2 * FLOAT * c.vocab_size * (self.head_targets or self.packed_tokens)
        head += FLOAT * c.n_embd * min(c.vocab_size, 8192) if self.base_bytes < FLOAT else 0
        return PROCESS + weights + gradients + states + self._activations + head

    @property
    def _activations(self) -> float:
        """What autograd saves: the inputs of norms, products, attention and activation functions."""
        c = self.model
        qkv = (c.n_head + 2 * c.kv_heads) * c.head_dim
        gated = c.activation == "swiglu"
        rotated = 2 * qkv if c.position == "rotary" else 0
        packed = 5 * c.n_embd + rotated + (5 if gated else 2) * c.inner
        block = FLOAT * (self.packed_tokens * packed + self.padded_tokens * (qkv + c.n_embd))
        if self.lora_rank:
            block += FLOAT * self.packed_tokens * 4 * self.lora_rank
        if self.activation_checkpointing:
            return block + c.n_layer * self.packed_tokens * c.n_embd * FLOAT
        return c.n_layer * block


def largest_batch(lengths: np.ndarray, batch_size: int, shared_prefix: int = 0) -> tuple[int, int]:
    """Tokens of a batch of the longest rows: packed, with the shared prefix once, and as a padded grid.

    Args:
        lengths: int (n,); tokens of each training row.
        batch_size: Rows of a batch.
        shared_prefix: Tokens that all rows begin with; 0 for padded batches.
    """
    rows = np.sort(lengths)[-batch_size:]
    padded = int(len(rows) * rows.max())
    return int((rows - shared_prefix).sum() + shared_prefix) if shared_prefix else padded, padded


def describe(memory: TrainingMemory, free: float) -> tuple[bool, str]:
    """Whether a run should fit into ``free`` bytes, and a message; if not, it names the options that would."""
    what = f"LoRA rank {memory.lora_rank}" if memory.lora_rank else "full fine-tuning"
    line = f"memory: {memory.parameters / 1e6:.3g}M parameters, {what}: about {_gb(memory.bytes)}; {_gb(free)} free"
    if memory.bytes <= free:
        return True, line
    leaner = {name: replace(memory, **change).bytes for name, change in _LEANER.items()}
    fitting = [f"  {name}: about {_gb(needed)}" for name, needed in leaner.items() if needed <= free]
    remedy = "these would fit:" if fitting else "none of the leaner settings would fit either: choose a smaller model."
    return False, "\n".join([f"{line}. This may not fit; {remedy}", *fitting])


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the process (resident set) on a CPU, by torch on an accelerator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(accelerator: str) -> int:
    """Bytes that a run could still take: of the first GPU, or of the machine."""
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def memory_now(device: torch.device) -> int:
    """Bytes held now, measured like `peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
