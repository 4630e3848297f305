"""The loss: cross entropy with a weight for each token, as sums that the training step divides."""

from torch import Tensor
from torch.nn import functional as F

from instruct_lm.data.batching import Batch
from instruct_lm.model.gpt import GPT


def batch_loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum the negative log likelihoods (nll, in nats) of a batch's labels.

    Returns:
        Σ w · nll, a float32 scalar with gradients; and Σ nll over the responses and their end tokens, without.

    Example:
        Two labels count, with nll 1.2 and 0.4 and weights 0.5 and 1: the sum is 0.5 · 1.2 + 0.4 = 1.0. The training
        step divides it by Σ w of its whole optimizer step. Alone that is 1.0 / 1.5 = 0.67; with a second micro-batch of
        sum 3.0 over Σ w = 2.5 the loss is 4.0 / 4.0 = 1.0, and not the mean of 0.67 and 1.2, in which a label of a
        short micro-batch would count more than one of a long one.
    """
    hidden = model.hidden_states(batch.input_ids)  # (B, L, C)
    counted = batch.weights > 0  # (B, L), true for M labels; padding has weight 0
    logits = model.logits(hidden[counted])  # (M, V)
    nll = F.cross_entropy(logits.float(), batch.labels[counted], reduction="none")  # (M,)
    return (batch.weights[counted] * nll).sum(), (batch.response_weights[counted] * nll.detach()).sum()
