"""One decoder-only transformer: GPT-2, Llama, Qwen2 or Qwen3, by configuration.

Shapes in comments: B rows, L tokens per row, C = n_embd, H = n_head, K = n_kv_head, D = head_dim, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from instruct_lm.model.cache import KVCache
from instruct_lm.model.rope import Rope, make_rope, rotate

NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
# A damaged file may say anything, and building 10^9 blocks takes for ever.
Size = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=2**12)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config={"extra": "forbid", "strict": True})
class GPTConfig:
    """Sizes and choices of a transformer; the defaults are GPT-2 124M.

    Args:
        vocab_size: Number of token ids.
        block_size: Longest sequence, in tokens.
        n_layer, n_head, n_embd: Blocks, attention heads and hidden width.
        n_kv_head: Heads of keys and values, each shared by ``n_head / n_kv_head`` query heads; None: ``n_head``.
        head_dim: Width of a head; None: ``n_embd / n_head``.
        n_inner: Width of the MLP; None: ``4 * n_embd``.
        norm: ``layernorm`` or ``rmsnorm``.
        norm_eps: Added to the variance.
        position: ``learned`` (GPT-2) or ``rotary`` (Llama).
        rope_base: Base of the rotary frequencies.
        rope_factors: Divisors of the ``head_dim / 2`` rotary frequencies (Llama 3); None: all 1.
        activation: ``gelu`` (tanh form, as GPT-2's) or ``swiglu``.
        bias: Whether all linear layers of a block have a bias.
        qkv_bias: Whether the projections to queries, keys and values have one without the others (Qwen2).
        qk_norm: Whether queries and keys are normalised, each head by itself, before the rotation (Qwen3).
        tied: Whether the output head is the token embedding.
        dropout: Probability, on embeddings, attention and residual branches.

    Raises:
        ValueError: A size out of range or of another type, sizes that do not divide, or an unknown choice.
    """

    vocab_size: Size = 50257
    block_size: Size = 1024
    n_layer: Few = 12
    n_head: Few = 12
    n_embd: Size = 768
    n_kv_head: Few | None = None
    head_dim: Few | None = None
    n_inner: Size | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Positive = 1e-5
    position: Literal["learned", "rotary"] = "learned"
    rope_base: Positive = 10000.0
    rope_factors: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if (self.head_dim is None and self.n_embd % self.n_head) or self.n_head % self.kv_heads:
            sizes = f"n_embd={self.n_embd}, n_head={self.n_head}, n_kv_head={self.kv_heads}"
            raise ValueError(f"{sizes}: each must be a multiple of the next")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width}: rotary positions need an even width")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_width // 2:
            raise ValueError(f"{len(self.rope_factors)} rope_factors for heads of width {self.head_width}: give half")

    @classmethod
    def of(cls, settings: object) -> GPTConfig:
        """The sizes and choices among an object's attributes."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.n_inner or 4 * self.n_embd


class CausalSelfAttention(nn.Module):
    """Multi-head attention with grouped queries; a token sees itself and the tokens before it in its row."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # its place in the cache
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_width
        heads = config.n_head + 2 * config.kv_heads
        self.qkv = nn.Linear(config.n_embd, heads * self.head_dim, bias=config.bias or config.qkv_bias)
        self.proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Rope | None = None, **options: Any) -> Tensor:
        """(B, L, C) → (B, L, C). The options are those of `attend`."""
        return self.proj(self.attend(self.project(x, rope), **options))

    def project(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Queries, keys and values side by side: (..., C) → (..., H + 2K, D)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.to(self.q_norm.weight.dtype).split((self.n_head, self.n_kv_head, self.n_kv_head), dim=-2)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-2)
        if rope is None:
            return heads
        rotated = self.n_head + self.n_kv_head  # values are not rotated
        return torch.cat((rotate(heads[..., :rotated, :], *rope), heads[..., rotated:, :]), dim=-2)

    def attend(self, heads: Tensor, *, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Weighted means of the values: (B, L, H + 2K, D) → (B, L, H · D).

        A cache takes in the keys and values. With a ``mask``, the queries see all that it then holds; see `GPT.decode`.
        """
        heads = heads.transpose(1, 2)  # (B, H + 2K, L, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if cache is not None:
            cache.append(self.layer, heads[:, self.n_head :])
            if mask is not None:
                k, v = cache.kv[self.layer, :, :, : mask.shape[-1]].chunk(2, dim=1)
        dropout, grouped = self.dropout if self.training else 0.0, self.n_kv_head != self.n_head
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(2)  # (B, L, H · D)


class MLP(nn.Module):
    """Two linear layers with GELU between them, or SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.fc = nn.Linear(config.n_embd, config.inner * (2 if self.gated else 1), bias=config.bias)
        self.proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        x = self.fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.proj(F.silu(gate) * up)
        return self.proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """(..., C) → (..., C)."""
        x = x + self.dropout(self.attn(self.ln_1(x), **attention))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Token ids to logits.

    It starts with GPT-2's random weights, unless it is made on the meta device.

    Attributes:
        activation_checkpointing: Compute each block again in the backward pass instead of keeping its activations.

    Example:
        >>> GPT(GPTConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=32))(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 257])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.wte.weight.is_meta:
            self.init_weights()

    def init_weights(self, seed: int | None = None) -> GPT:
        """Fill the weights as GPT-2 did: N(0, 0.02²), residual projections smaller by 1 / sqrt(2 n_layer).

        With a ``seed``, torch's global random state is neither used nor changed.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)  # of a norm, or a bias
        return self

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the matrix that turns hidden states into logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype; frozen matrices may be stored in a smaller one."""
        return self.ln_f.weight.dtype  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V) of right-padded token ids, int64 (B, L)."""
        return self.logits(self.hidden_states(input_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) → (..., V)."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None, **attention: Any) -> Tensor:
        """Hidden states after the last norm.

        Args:
            input_ids: int64 (B, L), right-padded. Padding needs no mask: it stands behind all tokens that count.
            position_ids: int64, shaped like ``input_ids``; None: 0, 1, 2, … in each row.
            **attention: Passed to each attention layer, such as an empty ``cache`` to fill.

        Returns:
            (B, L, C) in `dtype`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device).expand(input_ids.shape)
        x = self.wte(input_ids).to(self.dtype)
        rope = None
        if self.wpe is None:
            c = self.config
            rope = make_rope(position_ids, c.head_width, c.rope_base, c.rope_factors, x.dtype)
        else:
            x = x + self.wpe(position_ids).to(self.dtype)
        x = self.dropout(x)
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, rope=rope, **attention)
            else:
                x = block(x, rope=rope, **attention)
        return self.ln_f(x)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for so many rows of at most ``capacity`` tokens."""
        shape = (self.config.n_layer, batch_size, 2 * self.config.kv_heads, capacity, self.config.head_width)
        device = self.wte.weight.device
        mixed = torch.is_autocast_enabled(device.type)  # then attention is in the smaller dtype
        return KVCache(shape, torch.get_autocast_dtype(device.type) if mixed else self.dtype, device)

    def prefill(self, prompts: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Fill an empty cache with prompts, int64 (L_i,) on the CPU; hidden states (B, C) of their last tokens."""
        input_ids = pad_sequence(list(prompts), batch_first=True).to(self.wte.weight.device)
        cache.extend(input_ids.shape[1])
        hidden = self.hidden_states(input_ids, cache=cache)  # (B, L, C)
        cache.lengths = [len(prompt) for prompt in prompts]  # padding does not count
        last = torch.tensor(cache.lengths, device=hidden.device) - 1
        return hidden[torch.arange(len(prompts), device=hidden.device), last]

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, C) of one more token per row, int64 (B,), which the cache takes in."""
        position_ids = cache.extend(1)  # (B, 1)
        columns = torch.arange(max(cache.lengths), device=input_ids.device)
        mask = (columns <= position_ids)[:, None, None]  # (B, 1, 1, longest)
        return self.hidden_states(input_ids[:, None], position_ids, cache=cache, mask=mask)[:, 0]
