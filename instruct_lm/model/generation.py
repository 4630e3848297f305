"""Batched generation: all prompts at once into a cache, then one token per row and step."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from instruct_lm.model.gpt import GPT

KEEP_SHARE = 0.9
"""Ended rows leave the cache once fewer than this share of its rows go on."""


@dataclass(frozen=True, config={"extra": "forbid"})
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: Sample among the k most likely tokens only; None: all.
        top_p: Sample among the fewest tokens whose probabilities reach p (https://arxiv.org/abs/1904.09751); None: all.
        seed: Each prompt draws from a generator of its own, seeded by this and its number, so that an answer does not
            depend on the batch it was made in.

    Raises:
        pydantic.ValidationError: A value out of range; it is a ValueError.
    """

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int = 123

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of one prompt."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each row, int64 (B,), of logits (B, V), with one generator per row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits, ids = (logits.float() / self.temperature).sort(dim=-1, descending=True)
        probabilities = logits.softmax(-1)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities.masked_fill_(before >= self.top_p * probabilities.sum(-1, keepdim=True), 0)
        precise = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS lacks
        cumulative = probabilities.to(precise).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.double) for generator in generators])
        threshold = draws.to(precise).to(logits.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
        return ids.gather(1, chosen)[:, 0]


GREEDY = Sampling()
Prompts = Sequence[Sequence[int]]  # the token ids of each


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    numbers: Sequence[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Generate for a batch of prompts, a token at a time.

    A row ends after its end token, after ``max_new_tokens``, or when it fills the model's ``block_size``.

    Args:
        model: In eval mode, else dropout applies.
        prompts: B lists of token ids, of any lengths from 1 to ``block_size``.
        max_new_tokens: Most tokens to make for a prompt.
        end_tokens: Ids that end a row; they are yielded too. None of them: rows end by length alone.
        sampling: How tokens are chosen.
        numbers: The prompts' numbers for the sampling seeds; None: 0 to B - 1.

    Yields:
        The tokens of one step: prompt index → token id, for the prompts still going.

    Raises:
        ValueError: A prompt without tokens or longer than ``block_size``.
    """
    block_size = model.config.block_size
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= block_size:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model takes 1 to {block_size}")
    device = model.wte.weight.device
    room = [min(max_new_tokens, block_size - len(prompt)) for prompt in prompts]
    active = [i for i, n in enumerate(room) if n > 0]  # the prompt that each row of the cache belongs to
    if not active:
        return
    generators = {i: sampling.generator(i if numbers is None else numbers[i]) for i in active}
    cache = model.new_cache(len(active), capacity=max(len(prompts[i]) + room[i] for i in active))
    hidden = model.prefill([torch.tensor(prompts[i]) for i in active], cache)  # (rows, C)
    going, step = set(active), 0
    while True:
        # Every row of the cache chooses a token; those of ended rows are not handed out.
        tokens = sampling.choose(model.logits(hidden), [generators[i] for i in active])  # (rows,)
        chosen = dict(zip(active, tokens.tolist(), strict=True))
        step += 1
        yield {i: token for i, token in chosen.items() if i in going}
        going = {i for i in going if step < room[i] and chosen[i] not in end_tokens}
        if not going:
            return
        # Ended rows leave the cache a few at a time, since each time copies what stays.
        if len(going) < KEEP_SHARE * len(active):
            kept = [row for row, i in enumerate(active) if i in going]
            cache.keep(kept)
            tokens, active = tokens[torch.tensor(kept, device=device)], [active[row] for row in kept]
        hidden = model.decode(tokens, cache)
        # A row that has ended but not left stays at its length: its last slot is written again and again.
        cache.lengths = [n - (i not in going) for n, i in zip(cache.lengths, active, strict=True)]


def batches(prompts: Prompts, batch_size: int) -> list[list[int]]:
    """The numbers of the prompts that are answered together: the longest first, so that a batch has similar lengths."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    model: GPT,
    prompts: Prompts,
    *,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
    on_done: Callable[[int], None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Generate for any number of prompts, in batches of similar length.

    Args:
        model, prompts, numbers, options: As for `stream`; the model is in eval mode meanwhile.
        batch_size: Most prompts at once.
        on_done: Called with the number of prompts finished at once, for a progress bar.

    Returns:
        The new token ids of each prompt, in the order of the prompts; an end token is the last of its list.
    """
    made: list[list[int]] = [[] for _ in prompts]
    numbers = range(len(prompts)) if numbers is None else numbers
    was_training = model.training
    model.eval()
    try:
        for batch in batches(prompts, batch_size):
            seeds = [numbers[i] for i in batch]
            for tokens in stream(model, [prompts[i] for i in batch], numbers=seeds, **options):
                for row, token in tokens.items():
                    made[batch[row]].append(token)
            if on_done is not None:
                on_done(len(batch))
    finally:
        model.train(was_training)
    return made
