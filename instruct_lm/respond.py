"""Answers to instructions: prompt → tokens → text, the same for samples while training, evaluation and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from instruct_lm.data.prompts import Example, PromptStyle, extract_response
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.model.generation import GREEDY, Sampling, generate, stream
from instruct_lm.model.gpt import GPT


class Response(NamedTuple):
    """What a model answered; a tuple, since Lightning cannot gather frozen dataclasses in `Trainer.predict`.

    Attributes:
        text: The answer, without the header and surrounding whitespace.
        tokens: Number of tokens made, the end token included.
        ended: Whether the model ended the answer itself.
    """

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Responder:
    """A model with all that it takes to answer instructions.

    Args:
        model: The model.
        tokenizer: Its tokenizer; ``stop_tokens`` end an answer.
        style: The prompt style that the model was trained with.
        max_new_tokens: Most tokens of an answer.
        sampling: How tokens are chosen.
        batch_size: Most answers made at once.
    """

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    batch_size: int = 32

    def answer(self, examples: Sequence[Example], on_done: Callable[[int], None] | None = None) -> list[Response]:
        """Answer instructions, in their order; ``on_done`` is told how many are finished at once.

        Raises:
            InputError: as for `prompt_ids`.
        """
        made = generate(
            self.model,
            [self.prompt_ids(example) for example in examples],
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.tokenizer.stop_tokens,
            sampling=self.sampling,
            batch_size=self.batch_size,
            on_done=on_done,
        )
        return [self._response(ids) for ids in made]

    def stream(self, example: Example) -> Iterator[str]:
        """The growing text of one answer, whole at each step."""
        ids: list[int] = []
        for step in stream(
            self.model,
            [self.prompt_ids(example)],
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.tokenizer.stop_tokens,
            sampling=self.sampling,
        ):
            ids.append(step[0])
            yield self._response(ids).text

    def prompt_ids(self, example: Example) -> list[int]:
        """The ids that training puts before a response: the prompt's, then the header's.

        Of a prompt that would leave the answer less than a quarter of the model's ``block_size`` (or less than
        ``max_new_tokens``, if that is fewer), the last tokens before the header are left out.

        Raises:
            InputError: the prompt style alone fills the model.
        """
        opening, body, closing, room = self._parts(example)
        return [*opening, *body[:room], *closing]

    def cut_tokens(self, example: Example) -> int:
        """How many of an example's tokens `prompt_ids` leaves out."""
        _, body, _, room = self._parts(example)
        return max(0, len(body) - room)

    def _parts(self, example: Example) -> tuple[list[int], list[int], list[int], int]:
        """Ids before, of and behind what varies, and how many of the second there is room for."""
        style, encode_special, block_size = self.style, self.tokenizer.encode_special, self.model.config.block_size
        opening, body = encode_special(style.opening), self.tokenizer.encode(style.body(example))
        closing = encode_special(style.closing) + encode_special(style.header)
        fixed = len(opening) + len(closing)
        room = block_size - fixed - 1
        if room < 0:
            raise InputError(
                f"prompt={style.name} takes {fixed} tokens, and model.block_size={block_size} has no room for more: "
                "choose a larger one or another prompt style."
            )
        return opening, body, closing, max(0, block_size - fixed - max(1, min(self.max_new_tokens, block_size // 4)))

    def _response(self, ids: list[int]) -> Response:
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_tokens
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return Response(extract_response(text, self.style), len(ids), ended)
