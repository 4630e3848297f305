"""Batched generation: one packed prefill with the shared prefix once, then a token a row at a time from the cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instruct_lm.fast.packing import common_prefix_length, pack
from instruct_lm.model.gpt import GPT, KVCache

KEEP_SHARE = 0.9
"""Finished rows leave the cache, which costs a copy of it, once fewer than this share of its rows are still going."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens only; None: all.
        top_p: sample among the fewest tokens whose probabilities reach p (https://arxiv.org/abs/1904.09751); None: all.
        seed: each prompt draws from a generator of its own, seeded by this and its number, so that an answer does not
            depend on the batch it was made in.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 123

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be 1 or more, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be null")

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Next tokens int64 (B,) of logits (B, V), with one generator a row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits, ids = (logits.float() / self.temperature).sort(dim=-1, descending=True)
        probabilities = logits.softmax(-1)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= self.top_p * probabilities.sum(-1, keepdim=True)] = 0
        cumulative = probabilities.double().cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.double) for generator in generators])
        threshold = draws.to(logits.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
        return ids.gather(1, chosen)[:, 0]


GREEDY = Sampling()


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    numbers: Sequence[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Generate for a batch of prompts, a token at a time.

    A row ends after its end token, after ``max_new_tokens``, or when it fills the model's ``block_size``.

    Args:
        model: in eval mode, else dropout applies.
        prompts: B lists of token ids, of any lengths from 1 to ``block_size``.
        max_new_tokens: most tokens to make for a prompt.
        end_tokens: ids that end a row; they are yielded too. None of them: rows end by length alone.
        sampling: how tokens are chosen.
        numbers: the prompts' numbers for the sampling seeds; None: 0 to B - 1.

    Yields:
        The tokens of one step: prompt index → token id, for the prompts still going.

    Raises:
        ValueError: a prompt without tokens or longer than ``block_size``.
    """
    block_size = model.config.block_size
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= block_size:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model takes 1 to {block_size}")
    device = model.wte.weight.device
    room = torch.tensor([min(max_new_tokens, block_size - len(prompt)) for prompt in prompts])
    active = room.nonzero()[:, 0]  # prompt index of each row of the cache
    if not len(active):
        return
    generators = {i: torch.Generator().manual_seed(_row_seed(sampling.seed, i if numbers is None else numbers[i]))
                  for i in active.tolist()}  # fmt: skip
    hidden, cache = _prefill(model, [prompts[i] for i in active.tolist()], room[active])
    alive = torch.ones(len(active), dtype=torch.bool)
    step = 0
    while True:
        logits = model.logits(hidden)  # (rows, V)
        tokens = sampling.choose(logits, [generators[i] for i in active.tolist()])
        step += 1
        listed = tokens.tolist()
        yield {i: listed[row] for row, i in enumerate(active.tolist()) if alive[row]}
        ended = room[active] <= step
        ended |= torch.isin(tokens.cpu(), torch.tensor(list(end_tokens), dtype=torch.long))
        alive &= ~ended
        if not alive.any():
            return
        if alive.sum() < KEEP_SHARE * len(alive):
            rows = alive.nonzero()[:, 0]
            cache.keep(rows.to(device))
            tokens, active, alive = tokens[rows.to(device)], active[rows], alive[rows]
        hidden = model.decode(tokens, cache)
        cache.lengths -= (~alive).to(device).long()  # an ended row stays where it is until it leaves


def _row_seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


def _prefill(model: GPT, prompts: Sequence[Sequence[int]], room: Tensor) -> tuple[Tensor, KVCache]:
    """Hidden states (B, C) of the prompts' last tokens, and their cache with ``room`` (B,) for more."""
    device = model.wte.weight.device
    rows = [torch.tensor(prompt) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    packing = pack(lengths, common_prefix_length(rows))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L)
    positions = torch.arange(padded.shape[1]).expand(padded.shape)
    cache = KVCache(model.config, len(rows), int((lengths + room).max()), model.dtype, device)
    hidden = model.hidden_states(
        padded.flatten()[packing.columns].to(device),
        positions.flatten()[packing.columns].to(device),
        packing=packing.to(device),
        cache=cache,
    )
    cache.lengths += lengths.to(device)
    last = packing.rows[torch.arange(len(rows)), lengths - 1]
    return hidden[last.to(device)], cache


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate for any number of prompts, in batches of similar length; arguments as for `stream`.

    Args:
        batch_size: most prompts at once.
        on_done: called with the number of prompts finished at once, for a progress bar.

    Returns:
        The new token ids of each prompt, in the order of the prompts; an end token is the last of its list.
    """
    made: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            steps = stream(
                model,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                end_tokens=end_tokens,
                sampling=sampling,
                numbers=batch,
            )
            for tokens in steps:
                for row, token in tokens.items():
                    made[batch[row]].append(token)
            if on_done is not None:
                on_done(len(batch))
    finally:
        model.train(was_training)
    return made
