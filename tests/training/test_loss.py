"""The plain loss against hand computations."""

import math

import numpy as np
import pytest
import torch

from instruct_lm.data.batching import collate
from instruct_lm.fast import accelerate
from instruct_lm.fast import loss as fast_loss
from instruct_lm.fast.loss import chunked_loss, packed_loss
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.training.loss import batch_loss
from tests.data import responses


class Table(GPT):
    """A model whose logits for the next token depend on the token alone: a table that the test chooses."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__(GPTConfig(vocab_size=len(logits), block_size=8, n_layer=1, n_head=1, n_embd=2))
        self.table = torch.tensor(logits)

    def hidden_states(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return self.table[input_ids]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_a_hand_computation() -> None:
    # After 0 both tokens are equally likely; after 1, token 1 is three times as likely as token 0.
    model = Table([[0.0, 0.0], [0.0, math.log(3)]])
    batch = collate(
        [np.array([0, 0, 1, 1]), np.array([0, 1])],
        [np.array([0, 0.5, 0.5, 1]), np.array([0, 1])],
        [np.arange(4) >= 3, np.arange(2) >= 1],
    )
    weighted, response = batch_loss(model, batch)
    # labels 0, 1 (prompt, weight 0.5 each), 1 (response); and 1 (response) of the second row
    log2, nll = math.log(2), math.log(4 / 3)
    assert weighted.item() == pytest.approx(0.5 * log2 + 0.5 * log2 + nll + log2)
    assert response.item() == pytest.approx(nll + log2)


@pytest.mark.parametrize("loss", [batch_loss, chunked_loss, packed_loss])
def test_padding_and_masked_labels_change_nothing(loss: object) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=4))
    if loss is packed_loss:
        accelerate(model)
    short, long = np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6, 7, 8, 9])
    weights = [np.array([0, 0, 1, 1.0]), np.array([0, 0, 0, 1, 1, 1, 1.0])]
    alone = [
        loss(model, collate([row], [w], responses([row], [3]))) for row, w in zip((short, long), weights, strict=True)
    ]
    for pad_id in (0, 9):
        together = loss(model, collate([short, long], weights, responses([short, long], [3, 3]), pad_id=pad_id))
        assert together[0].item() == pytest.approx(alone[0][0].item() + alone[1][0].item(), rel=1e-5)
        assert together[1].item() == pytest.approx(alone[0][1].item() + alone[1][1].item(), rel=1e-5)


@pytest.mark.parametrize("loss", [batch_loss, chunked_loss, packed_loss])
def test_the_head_computes_what_counts_alone(loss: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6, 7])]
    batch = collate(rows, [np.array([0, 0, 1, 1.0]), np.array([0, 0, 0, 1, 1.0])], responses(rows, [2, 3]))
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=4))
    accelerate(model)
    seen: list[int] = []
    head, fast_head = GPT.logits, fast_loss.linear_cross_entropy
    monkeypatch.setattr(GPT, "logits", lambda self, x: seen.append(len(x)) or head(self, x))
    monkeypatch.setattr(fast_loss, "linear_cross_entropy", lambda x, *args: seen.append(len(x)) or fast_head(x, *args))
    loss(model, batch)
    assert seen == [4]
