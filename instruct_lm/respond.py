"""Answers to instructions: prompt → tokens → text. Training samples, evaluation and chat use this module."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from instruct_lm.data.prompts import Example, PromptStyle, extract_response
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.model.generation import GREEDY, Sampling, generate, stream
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


@dataclass(frozen=True)
class Responder:
    """Answers instructions with a model.

    Args:
        model: The model.
        tokenizer: The model's tokenizer; its ``stop_tokens`` end an answer.
        style: The prompt style that the model was trained with.
        max_new_tokens: Most tokens of an answer.
        sampling: The rule that chooses the next token.
        batch_size: Most answers that are generated together.
    """

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    batch_size: int = 32

    def answer(self, examples: Sequence[Example], on_done: Callable[[int], None] | None = None) -> list[Response]:
        """Answer instructions.

        Args:
            examples: The entries; their outputs are not used.
            on_done: Called with the number of answers that have just been finished.

        Returns:
            The answers, in the order of the examples.

        Raises:
            InputError: As for `prompt_ids`.
        """
        prompts = [self.prompt_ids(example) for example in examples]
        generated = generate(self.model, prompts, batch_size=self.batch_size, on_done=on_done, **self._settings)
        return [self._response(ids) for ids in generated]

    def stream(self, example: Example) -> Iterator[str]:
        """Yield the text of one answer after each token: all of the text so far, not only what is new."""
        ids: list[int] = []
        for step in stream(self.model, [self.prompt_ids(example)], **self._settings):
            ids.append(step[0])
            yield self._response(ids).text

    def prompt_ids(self, example: Example) -> list[int]:
        """The ids of prompt and response header, the same that precede the response in training.

        The answer needs room for ``max_new_tokens`` tokens or a quarter of the model's ``block_size``, whichever is
        less. If a prompt leaves less room, the end of the user's text is cut.

        Raises:
            InputError: The prompt style alone fills the model's ``block_size``.
        """
        opening, body, closing, room = self._parts(example)
        return [*opening, *body[:room], *closing]

    def cut_tokens(self, example: Example) -> int:
        """Number of tokens of the user's text that `prompt_ids` cuts."""
        _, body, _, room = self._parts(example)
        return max(0, len(body) - room)

    @property
    def _settings(self) -> dict[str, Any]:
        """What `generate` and `stream` are both told."""
        end_tokens = self.tokenizer.stop_tokens
        return {"max_new_tokens": self.max_new_tokens, "end_tokens": end_tokens, "sampling": self.sampling}

    def _parts(self, example: Example) -> tuple[list[int], list[int], list[int], int]:
        """Ids before the user's text, of it and after it, and the number of its tokens that there is room for."""
        style, encode_special, block_size = self.style, self.tokenizer.encode_special, self.model.config.block_size
        opening, body = encode_special(style.opening), self.tokenizer.encode(style.body(example))
        closing = encode_special(style.closing) + encode_special(style.header)
        fixed = len(opening) + len(closing)
        if fixed >= block_size:
            raise InputError(
                f"prompt={style.name} takes {fixed} tokens, which leaves no room for an answer within "
                f"model.block_size={block_size}: choose a larger one or another prompt style."
            )
        answer = max(1, min(self.max_new_tokens, block_size // 4))
        return opening, body, closing, max(0, block_size - fixed - answer)

    def _response(self, ids: list[int]) -> Response:
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_tokens
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return Response(extract_response(text, self.style), len(ids), ended)
