"""Answers to conversations: prompt → tokens → text. Training samples, evaluation and chat use this module."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.encoding import EncodedPiece, count, encode_pieces, shorten
from instruct_lm.data.pieces import PromptStyle, extract_response, prompt_pieces
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.model.generation import GREEDY, Sampling, batches, generate, stream
from instruct_lm.model.gpt import GPT


class Response(NamedTuple):
    """A model's answer; a tuple, since Lightning cannot gather frozen dataclasses in `Trainer.predict`.

    Attributes:
        text: The answer, without the response header and surrounding whitespace.
        tokens: Number of generated tokens, end token included.
        ended: Whether the model ended the answer with a stop token.
    """

    text: str
    tokens: int
    ended: bool


class Cut(NamedTuple):
    """What a prompt leaves out to make room for the answer.

    Attributes:
        exchanges: Number of the earliest exchanges that were left out.
        tokens: Number of tokens that were left out at the ends of the other turns.
    """

    exchanges: int
    tokens: int


@dataclass(frozen=True)
class Responder:
    """Answers conversations with a model.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        style: The prompt style that the model was trained with.
        max_new_tokens: Most tokens of an answer.
        sampling: The rule that chooses the next token.
        batch_size: Most answers that are generated together.
        dtype: Of the products of a forward pass; logits and sampling stay in fp32 on a CPU.
    """

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    batch_size: int = 32
    dtype: torch.dtype = torch.float32

    def batches(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The places of the conversations that `answer` answers together.

        Raises:
            InputError: As for `prompt_ids`.
        """
        return batches([self.prompt_ids(conversation) for conversation in conversations], self.batch_size)

    def answer(
        self,
        conversations: Sequence[Conversation],
        on_done: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Response]:
        """Answer the last turn but one of each conversation.

        Args:
            conversations: The entries; their last turns are not used.
            on_done: Called with the number of answers that have just been finished.
            numbers: The conversations' numbers for the sampling seeds; None: 0, 1, 2, …

        Returns:
            The answers, in the order of the conversations.

        Raises:
            InputError: As for `prompt_ids`.
        """
        prompts = [self.prompt_ids(conversation) for conversation in conversations]
        options = {"batch_size": self.batch_size, "numbers": numbers, "on_done": on_done, **self._settings}
        with self._autocast():
            generated = generate(self.model, prompts, **options)
        return [self._response(ids) for ids in generated]

    def stream(self, conversation: Conversation) -> Iterator[str]:
        """Yield the text of one answer after each token: all of the text so far, not only what is new."""
        ids: list[int] = []
        steps = stream(self.model, [self.prompt_ids(conversation)], **self._settings)
        while True:
            with self._autocast():  # not while the caller works
                step = next(steps, None)
            if step is None:
                return
            ids.append(step[0])
            yield self._response(ids).text

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids before the last response, the same as in training.

        The answer needs room for ``max_new_tokens`` tokens or a quarter of the model's ``block_size``, whichever is
        less. A prompt that leaves less room is shortened, see `instruct_lm.data.encoding.shorten`.

        Raises:
            InputError: The prompt style alone fills the model's ``block_size``, or a chat template refuses the
                conversation.
        """
        return [token for _, ids in self._shortened(conversation) for token in ids]

    def cut_tokens(self, conversation: Conversation) -> int:
        """Number of tokens of the conversation that `prompt_ids` leaves out."""
        return count(self._encode(conversation.turns)) - len(self.prompt_ids(conversation))

    def cut(self, conversation: Conversation) -> Cut:
        """What `prompt_ids` leaves out, told apart."""
        turns, left = conversation.turns, self._shortened(conversation)
        first, gone = int(turns[0].role == "system"), len(_said(self._encode(turns))) - len(_said(left))
        kept = [*turns[:first], *turns[first + gone :]]
        # Only what is cut is encoded apart; a prompt that is whole may have a token less, or more, than that.
        same = left == self._encode(kept)
        return Cut(gone // 2, 0 if same else sum(_said(self._encode(kept, apart=True))) - sum(_said(left)))

    def _shortened(self, conversation: Conversation) -> list[EncodedPiece]:
        block_size = self.model.config.block_size
        room = block_size - max(1, min(self.max_new_tokens, block_size // 4))
        encoded = shorten(conversation.turns, self._encode, room)
        if encoded is None:  # the answer has less room, if it has any
            encoded = shorten(conversation.turns, self._encode, block_size - 1)
        if encoded is None:
            fixed = count([item for item in self._encode(conversation.turns) if item.piece.own])
            raise InputError(
                f"prompt={self.style.name} takes {fixed} tokens, which leaves no room for an answer within "
                f"model.block_size={block_size}: choose a larger one or another prompt style."
            )
        return encoded

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and the one that ends a response in this prompt style."""
        return self.tokenizer.stop_tokens_with(self.style.end)

    def _autocast(self) -> torch.autocast:
        device = self.model.wte.weight.device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def _settings(self) -> dict[str, Any]:
        """What `generate` and `stream` are both told."""
        return {"max_new_tokens": self.max_new_tokens, "end_tokens": self.stop_tokens, "sampling": self.sampling}

    def _encode(self, turns: Sequence[Turn], apart: bool = False) -> list[EncodedPiece]:
        return encode_pieces(prompt_pieces(self.style.pieces(turns)), self.tokenizer, apart)

    def _response(self, ids: list[int]) -> Response:
        ended = bool(ids) and ids[-1] in self.stop_tokens
        # A model may have more rows in its embedding than the tokenizer has ids, as Qwen's: those have no text.
        text = self.tokenizer.decode(i for i in ids[: len(ids) - ended] if i < self.tokenizer.vocab_size)
        return Response(extract_response(text, self.style), len(ids), ended)


def _said(encoded: Sequence[EncodedPiece]) -> list[int]:
    """Number of tokens of each turn."""
    return [len(ids) for piece, ids in encoded if not piece.own]
