"""From entries to token ids and loss weights: encode, shorten, cache, weight."""

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from instruct_lm.data.prompts import Example, PromptStyle
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError, listing
from instruct_lm.io.files import replacing

log = logging.getLogger(__name__)

OVERLONG = ("drop", "truncate_prompt", "truncate", "error")
_CACHE_VERSION = 1  # raise it when the encoding changes


class EncodedExample(NamedTuple):
    """Token ids of one entry: prompt, header, response, end token.

    Attributes:
        input_ids: int32 (length,); a view into the dataset.
        prompt_length: Number of prompt tokens, which come first.
        header_length: Number of tokens of the response header, which follow the prompt.
    """

    input_ids: np.ndarray
    prompt_length: int
    header_length: int


@dataclass(frozen=True)
class EncodedDataset(Sequence[EncodedExample]):
    """All encoded entries in one flat array; 52,000 of them take about 30 MB.

    Rows follow each other without padding, and ``offsets`` says where each begins; see the example.

    Attributes:
        input_ids: int32 (Σ lengths,).
        offsets: int64 (n + 1,); row i is ``input_ids[offsets[i] : offsets[i + 1]]``.
        prompt_lengths: int32 (n,).
        entries: int32 (n,); position of each row's entry in the list that was encoded, increasing.
        header_length: Number of tokens of the response header, the same in every row.
        dropped: Number of entries left out, because they are too long or their response has no tokens.
        truncated: Number of rows that were cut.

    Example:
        Two rows, with the prompts 8 7 and 8 7 7, the header 9, a response and the end token 5:

        >>> ids, offsets = np.array([8, 7, 9, 1, 5, 8, 7, 7, 9, 2, 3, 5]), np.array([0, 5, 12])
        >>> data = EncodedDataset(ids, offsets, prompt_lengths=np.array([2, 3]), entries=np.arange(2), header_length=1)
        >>> [row.input_ids.tolist() for row in data], data.lengths.tolist()
        ([[8, 7, 9, 1, 5], [8, 7, 7, 9, 2, 3, 5]], [5, 7])
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    entries: np.ndarray
    header_length: int
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> EncodedExample:  # type: ignore[override]  # no slices
        row = range(len(self))[index]  # accepts negative indices; raises IndexError past the end
        ids = self.input_ids[self.offsets[row] : self.offsets[row + 1]]
        return EncodedExample(ids, int(self.prompt_lengths[row]), self.header_length)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,); number of tokens of each row, end token included."""
        return np.diff(self.offsets)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
) -> EncodedDataset:
    """Encode each entry as prompt ids + header ids + response ids + one end token, the tokenizer's `end_of_text`.

    Args:
        examples: The entries.
        tokenizer: The tokenizer.
        style: The prompt style.
        max_length: Most tokens of a row, end token included; None: no limit.
        overlong: What to do with a longer row. `drop`: leave it out. `truncate_prompt`: cut the end of the user's text,
            or drop the row if nothing of that text would be left. `truncate`: cut the end of the row, end token
            included, or drop the row if nothing of the response would be left. `error`: raise an error.

    Raises:
        InputError: `overlong` is none of these, or it is `error` and rows are too long, or no row is left.

    Example:
        With one token a character, this entry has 15 tokens, 3 more than the limit:

        >>> from instruct_lm.data.tokenizer import load_tokenizer
        >>> tokenizer, style = load_tokenizer("bytes"), PromptStyle("short", "Q:", "|", ";", "A:")
        >>> for limit, overlong in ((15, "drop"), (12, "truncate_prompt"), (12, "truncate")):
        ...     rows = encode_examples([Example("abcdef", "", "xyz")], tokenizer, style, limit, overlong)
        ...     print(tokenizer.decode(rows.input_ids))
        Q:abcdef;A:xyz<|endoftext|>
        Q:abc;A:xyz<|endoftext|>
        Q:abcdef;A:x
    """
    if overlong not in OVERLONG:
        raise InputError(f"overlong={overlong!r}: choose one of {', '.join(OVERLONG)}.")
    # The style's own text is encoded once, and apart: it may hold control tokens, the user's text may not.
    opening, closing, header = map(tokenizer.encode_special, (style.opening, style.closing, style.header))
    template_length = len(opening) + len(closing) + len(header)
    flat, offsets, places, too_long, truncated = array("i"), [0], [], [], 0  # places: entry and prompt length of a row
    for i, example in enumerate(examples):  # in one thread: two are slower on texts this short
        body, response = tokenizer.encode(style.body(example)), tokenizer.encode(example.output)
        length = template_length + len(body) + len(response) + 1
        # A response of which no byte has a token stays empty, and an empty response drops the row.
        response += [tokenizer.end_of_text] if response else []
        if max_length is not None and length > max_length:
            too_long.append(f"{i + 1} ({length} tokens)")
            body, response = _shorten(body, response, length - max_length, overlong)
            truncated += bool(response)
        if response:
            flat.fromlist([*opening, *body, *closing, *header, *response])
            offsets.append(len(flat))
            places.append((i, len(opening) + len(body) + len(closing)))
    if not places or (too_long and overlong == "error"):
        raise InputError(_problem(len(examples), too_long, max_length, tokenizer))
    ids, starts = np.array(flat, dtype=np.int32), np.array(offsets, dtype=np.int64)
    entries, prompt_lengths = np.array(places, dtype=np.int32).T
    dropped = len(examples) - len(places)
    return EncodedDataset(ids, starts, prompt_lengths, entries, len(header), dropped, truncated)


def _shorten(body: list[int], response: list[int], excess: int, overlong: str) -> tuple[list[int], list[int]]:
    """User text and response (with end token) without ``excess`` tokens; an empty response if that is not possible."""
    if overlong == "truncate_prompt" and excess < len(body):
        return body[:-excess], response
    if overlong == "truncate" and excess < len(response):
        return body, response[:-excess]
    return body, []


def _problem(n: int, too_long: list[str], max_length: int | None, tokenizer: Tokenizer) -> str:
    """The message for n entries of which some are too long or no row is left."""
    if not too_long:
        return f"none of the {n} entries has a response that {tokenizer.name} has tokens for."
    return (
        f"{len(too_long)} of {n} entries are longer than max_length={max_length}: entry "
        f"{', '.join(listing(too_long))}.\nRaise max_length or choose another overlong: {', '.join(OVERLONG[:-1])}."
    )


def encode_cached(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
    cache_dir: Path | None = None,
) -> EncodedDataset:
    """Encode as `encode_examples` does, and keep the result in `cache_dir`; None: no cache.

    The file is named by a hash of all that decides the result. A damaged file is replaced. If the file cannot be
    written, a warning says so and the run goes on.
    """
    if cache_dir is None:
        return encode_examples(examples, tokenizer, style, max_length, overlong)
    key = repr((_CACHE_VERSION, tokenizer.fingerprint, style, max_length, overlong, list(examples)))
    path = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return EncodedDataset(**{name: x if x.ndim else x.item() for name, x in stored.items()})
        except Exception as error:  # a damaged zip file raises a dozen kinds
            log.warning("token cache %s is damaged (%s): encoding again", path, error)
    encoded = encode_examples(examples, tokenizer, style, max_length, overlong)
    try:
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **vars(encoded))
    except OSError as error:
        log.warning("cannot write the token cache %s: %s", path, error)
    return encoded


def resolve_prompt_loss_weight(mask_instructions: bool, prompt_loss_weight: float | None) -> float:
    """The weight of prompt tokens in the loss: the given one, else 0 with masked instructions and 1 without.

    Raises:
        InputError: The weight is outside [0, 1].
    """
    if prompt_loss_weight is None:
        return 0.0 if mask_instructions else 1.0
    if not 0 <= prompt_loss_weight <= 1:
        raise InputError(f"prompt_loss_weight={prompt_loss_weight}: must be from 0 (masked) to 1, or null.")
    return float(prompt_loss_weight)


def loss_weights(example: EncodedExample, prompt_loss_weight: float = 1.0, mask_header: bool = False) -> np.ndarray:
    """The weight of each token of an entry as a target of the loss.

    Args:
        example: An encoded entry of n tokens.
        prompt_loss_weight: Weight of the prompt's tokens.
        mask_header: Whether the response header gets the prompt's weight; else its weight is 1, as in the book's
            exercise 7.2.

    Returns:
        float32 (n,), aligned with `input_ids`, so it must be shifted together with the labels. No position predicts the
        first token, so its weight is 0. Response and end token have weight 1.

    Example:
        Three prompt tokens 8, two header tokens 9, the response 1 and the end token 5:

        >>> row = EncodedExample(np.array([8, 8, 8, 9, 9, 1, 5]), prompt_length=3, header_length=2)
        >>> loss_weights(row, prompt_loss_weight=0.25).tolist()
        [0.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
        >>> loss_weights(row, prompt_loss_weight=0.25, mask_header=True).tolist()
        [0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0]
    """
    weights = np.ones(len(example.input_ids), dtype=np.float32)
    weights[: example.prompt_length + example.header_length * mask_header] = prompt_loss_weight
    weights[0] = 0
    return weights
