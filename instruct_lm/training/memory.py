"""Memory: how much a process holds, and an estimate of what a training run will need before it begins."""

import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.model.shapes import shapes_only

PROCESS = 0.45e9  # bytes: Python, torch, Lightning and TensorBoard, measured
FLOAT = 4  # bytes of a float32
HALF = 2  # of a bfloat16 or float16
_begun = False  # whether a run of this process has begun its peak


_CHECKPOINTING, _IN_BACKWARD = {"activation_checkpointing": True}, {"in_backward": True}
_LORA, _HALF_BASE = {"lora_rank": 16, "in_backward": False}, {"base_bytes": 2}
_LEANER: dict[str, dict[str, Any]] = {
    "trainer.activation_checkpointing=true (slower)": _CHECKPOINTING,
    "optimizer.in_backward=true (no clipping, no accumulation)": _IN_BACKWARD,
    "trainer.activation_checkpointing=true optimizer.in_backward=true": _CHECKPOINTING | _IN_BACKWARD,
    "lora=r16 (trains adapters alone)": _LORA,
    "lora=r16 lora.base_dtype=bfloat16 trainer.activation_checkpointing=true": _LORA | _HALF_BASE | _CHECKPOINTING,
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
        half: Products are in a 16-bit dtype, of rounded copies of the weights.
        accumulates: Gradients and copies stay for several backward passes.
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
    half: bool = False
    accumulates: bool = False

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the model, without adapters."""
        with shapes_only():
            return sum(p.numel() for p in GPT(self.model).parameters())

    @cached_property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        if not self.lora_rank:
            return self.parameters
        with shapes_only():
            adapted = add_lora(GPT(self.model), self.lora_rank, alpha=1.0)
        return sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    @property
    def bytes(self) -> float:
        """The estimate for the whole process, in bytes."""
        c = self.model
        weights = self.parameters * (self.base_bytes if self.lora_rank else FLOAT)
        # In the backward pass, those of embedding and head and two of the largest matrices' are held at once.
        vocabulary = c.n_embd * c.vocab_size * (1 if c.tied else 2)
        gradients = FLOAT * (vocabulary + 2 * c.n_embd * c.inner if self.in_backward else self.trained)
        if self.half and not self.lora_rank:  # rounded copies lie where gradients will be, if there will be all
            copies = HALF * (self.parameters - vocabulary)
            gradients = gradients + copies if self.accumulates else max(gradients, FLOAT * vocabulary + copies)
        states = 2 * FLOAT * self.trained if self.optimizer == "adamw" else 0
        # Autograd saves the inputs of norms, products and activation functions (packed) and of attention (padded).
        attended = c.n_head * c.head_width
        qkv = attended + 2 * c.kv_heads * c.head_width
        rotated = qkv * (2 * (c.position == "rotary") + c.qk_norm)
        inner = c.inner * (5 if c.activation == "swiglu" else 2)
        multiplied = 2 * c.n_embd + attended + inner + 4 * self.lora_rank  # numbers per token, and so is the next
        packed = FLOAT * (2 * c.n_embd + rotated) + (HALF if self.half else FLOAT) * multiplied
        block = self.packed_tokens * packed + FLOAT * self.padded_tokens * (qkv + attended)
        checkpoints = c.n_layer * self.packed_tokens * c.n_embd * FLOAT
        activations = block + checkpoints if self.activation_checkpointing else c.n_layer * block
        # Logits and their gradient, and a frozen head in a small dtype widened in part (all of it at most).
        head = 2 * FLOAT * c.vocab_size * (self.head_targets or self.packed_tokens)
        head += FLOAT * c.n_embd * min(c.vocab_size, 8192) if self.base_bytes < FLOAT else 0
        return PROCESS + weights + gradients + states + activations + head


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
    sizes = f"about {memory.bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB free"
    line = f"memory: {memory.parameters / 1e6:.3g}M parameters, {what}: {sizes}"
    if memory.bytes <= free:
        return True, line
    leaner = {name: replace(memory, **change).bytes for name, change in _LEANER.items()}
    fitting = [f"  {name}: about {needed / 1e9:.1f} GB" for name, needed in leaner.items() if needed <= free]
    remedy = "these would fit:" if fitting else "none of the leaner settings would fit either: choose a smaller model."
    return False, "\n".join([f"{line}. This may not fit; {remedy}", *fitting])


def begin_peak(device: torch.device) -> bool:
    """Let `peak_memory` count from now, for one run of several in this process.

    Returns:
        Whether it does: Linux lets a process begin its peak anew; on other systems the first run alone has its own.
    """
    global _begun
    first, _begun = not _begun, True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now
    except OSError:  # another system, or a container that forbids it
        return first
    return True


def peak_memory(device: torch.device) -> int:
    """Most bytes held since `begin_peak`: by torch on a CUDA device, else by the process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # "VmHWM:   123456 kB"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int:
    """Bytes that a run could still take: of a CUDA device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
