"""The arithmetic that a task needs, and how fast this machine multiplies matrices of its shapes and updates weights.

Counted are the products with weight matrices: 2 FLOPs a weight and token forward, 4 more backward (2 where the weight
is frozen). Tokens stand once: no padding, the prefix that the rows of a batch share a single time, and the head only
where a target counts. Attention's own products are left out.
"""

from __future__ import annotations

import torch

from benchmarks.tasks import Row, model_conf
from instruct_lm.fast.linear import product, product_dtype, weight_gradient
from instruct_lm.fast.processor import median_rate


def shapes(size: str) -> list[tuple[int, int, int]]:
    """(how many, in, out) of the weight matrices of all blocks."""
    c = {key: value for key, value in model_conf(size).items() if isinstance(value, int)}
    width, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    heads = c["n_head"] + 2 * (c.get("n_kv_head") or c["n_head"])
    gate = 2 if model_conf(size)["activation"] == "swiglu" else 1
    qkv = heads * (width // c["n_head"])
    layers = c["n_layer"]
    return [(layers, width, qkv), (layers, width, width), (layers, width, gate * inner), (layers, inner, width)]


def head(size: str) -> int:
    """Weights of the output head."""
    c = model_conf(size)
    return int(c["vocab_size"]) * int(c["n_embd"])


def packed_tokens(batch: list[Row]) -> int:
    """Input tokens of a batch with its common prefix once."""
    shared = 0
    for column in zip(*(row.ids[:-1] for row in batch), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return sum(len(row.ids) - 1 - shared for row in batch) + shared


def train_flops(size: str, batch: list[Row], masked: bool, lora: int) -> float:
    """FLOPs of a training step."""
    tokens = packed_tokens(batch)
    blocks = sum(n * a * b for n, a, b in shapes(size))
    adapters = sum(n * lora * (a + b) for n, a, b in shapes(size))
    targets = sum(len(row.ids) - max(row.prompt_length, 1) for row in batch) if masked else tokens
    factor = 4 if lora else 6
    return tokens * (factor * blocks + 6 * adapters) + targets * factor * head(size)


def generate_flops(size: str, prompts: list[list[int]], new_tokens: int) -> float:
    """FLOPs of answering prompts: the prefix once, each prompt's rest, each new token, the head for new tokens only."""
    rows = [Row([*prompt, 0], 0, 0) for prompt in prompts]
    blocks = sum(n * a * b for n, a, b in shapes(size))
    decoded = len(prompts) * (new_tokens - 1)
    return 2 * blocks * (packed_tokens(rows) + decoded) + 2 * head(size) * len(prompts) * new_tokens


def trained(size: str, lora: int) -> int:
    """Number of weights that a training step updates, those of norms and biases left out."""
    blocks = sum(n * (lora * (a + b) if lora else a * b) for n, a, b in shapes(size))
    return blocks if lora else blocks + head(size)


@torch.no_grad()
def adamw_rate(seconds: float = 1.0) -> float:
    """fp32 weights a second that torch's fused AdamW updates, the median of many rounds."""
    weight = torch.nn.Parameter(torch.randn(16_000_000))  # with gradient and states 256 MB: more than a cache
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    return median_rate(weight.numel(), optimizer.step, seconds)


@torch.no_grad()
def gemm_rate(size: str, tokens: int, dtype: torch.dtype = torch.float32, seconds: float = 2.0) -> float:
    """FLOPs a second of one block's forward and backward products at that many tokens, the median of many rounds.

    By the library that this project uses, in fp32 the faster of torch's two: the strictest floor.
    """
    work = [
        (torch.randn(tokens, a).to(dtype), torch.randn(b, a).to(dtype), torch.randn(tokens, b).to(dtype))
        for _, a, b in shapes(size)
    ]
    grads = [torch.zeros_like(weight) for _, weight, _ in work]
    flops = sum(6 * x.shape[0] * weight.numel() for x, weight, _ in work)

    def multiply() -> None:
        for (x, weight, g), grad in zip(work, grads, strict=True):
            product(x, weight)
            product(g, weight.T)
            if product_dtype(x) == dtype:
                torch.mm(g.T, x, out=grad)
            else:
                weight_gradient(g, x)

    return median_rate(flops, multiply, seconds)
