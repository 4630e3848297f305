"""Twenty steps of training against the book's own model, collate function and loss."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from instruct_lm.data.batching import collate
from instruct_lm.fast import accelerate
from instruct_lm.fast.loss import chunked_loss, packed_loss
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.training.loss import batch_loss
from instruct_lm.training.optimizers import OptimizerSettings
from tests.data import responses

CONFIG = GPTConfig(vocab_size=211, block_size=64, n_layer=2, n_head=4, n_embd=32)
END = 210


def book_model(ours: GPT) -> torch.nn.Module:
    """The book's model with our weights; its head is tied to its embedding, as ours always is."""
    chapter = pytest.importorskip("llms_from_scratch.ch04", reason="the book's package is not installed")
    model = chapter.GPTModel(
        {"vocab_size": 211, "context_length": 64, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True}
    )  # fmt: skip
    model.out_head.weight = model.tok_emb.weight
    with torch.no_grad():
        model.tok_emb.weight.copy_(ours.wte.weight)
        model.pos_emb.weight.copy_(ours.wpe.weight)
        norms = [(model.final_norm, ours.ln_f)]
        linears = []
        for theirs, block in zip(model.trf_blocks, ours.h, strict=True):
            norms += [(theirs.norm1, block.ln_1), (theirs.norm2, block.ln_2)]
            linears += [(theirs.att.out_proj, block.attn.proj), (theirs.ff.layers[0], block.mlp.fc)]
            linears += [(theirs.ff.layers[2], block.mlp.proj)]
            parts = (theirs.att.W_query, theirs.att.W_key, theirs.att.W_value)
            for i, part in enumerate(parts):
                part.weight.copy_(block.attn.qkv.weight[32 * i : 32 * (i + 1)])
                part.bias.copy_(block.attn.qkv.bias[32 * i : 32 * (i + 1)])
        for theirs, norm in norms:
            theirs.scale.copy_(norm.weight)
            theirs.shift.copy_(norm.bias)
        for theirs, linear in linears:
            theirs.load_state_dict(linear.state_dict())
    return model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_sums", [batch_loss, chunked_loss, packed_loss])
def test_twenty_steps_have_the_books_losses(
    masked: bool, loss_sums: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, END, 6).tolist()
    batches = [
        [(prefix + rng.integers(0, END, n).tolist(), 6 + n // 2) for n in rng.integers(4, 30, 4)] for _ in range(20)
    ]
    ours = GPT(CONFIG).init_weights(0)
    theirs = book_model(ours)
    if loss_sums is not batch_loss:
        accelerate(ours)
    settings = OptimizerSettings(lr=1e-3)
    optimizer = settings.build(ours)
    groups = [[p for p in theirs.parameters() if (p.dim() >= 2) == decayed] for decayed in (True, False)]
    reference = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )

    from llms_from_scratch.ch07 import custom_collate_fn

    for step, batch in enumerate(batches):
        inputs, targets = custom_collate_fn([row for row, _ in batch], pad_token_id=END)
        if masked:  # exercise 7.2
            for target, (_, prompt) in zip(targets, batch, strict=True):
                target[: prompt - 1] = -100
        reference.zero_grad()
        logits = theirs(inputs)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())  # chapter 5
        expected.backward()
        reference.step()

        weights = [np.where(np.arange(len(row) + 1) >= (prompt if masked else 1), 1.0, 0.0) for row, prompt in batch]
        rows = [np.array([*row, END]) for row, _ in batch]
        made = collate(rows, weights, responses(rows, [p for _, p in batch]))
        optimizer.zero_grad()
        loss = loss_sums(ours, made)[0] / made.weights.sum()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), f"step {step}"
    assert loss.item() < 5.2  # log 211 = 5.35: something was learned
