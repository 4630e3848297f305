"""From entries to token ids and loss weights: encode, shorten, cache, weight."""

import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instruct_lm.data.prompts import Example, PromptStyle
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError

log = logging.getLogger(__name__)

OVERLONG = ("drop", "truncate_prompt", "truncate", "error")
_LISTED = 10  # overlong entries that a message names; the rest are counted
_CACHE_VERSION = 1  # raise it when the encoding changes


class EncodedExample(NamedTuple):
    """Token ids of one entry: prompt, header, response, end token.

    Attributes:
        input_ids: (length,) int32; a view into the dataset.
        prompt_length: Number of leading tokens that are the prompt.
        header_length: Number of tokens after those that are the response header.
    """

    input_ids: np.ndarray
    prompt_length: int
    header_length: int


@dataclass(frozen=True)
class EncodedDataset:
    """All encoded entries in one flat array: 52,000 of them take some 30 MB.

    Attributes:
        input_ids: (Σ lengths,) int32.
        offsets: (n + 1,) int64; row i is `input_ids[offsets[i]:offsets[i + 1]]`.
        prompt_lengths: (n,) int32.
        entries: (n,) int32, the position of each row's entry in the list that was encoded; rows are in file order.
        header_length: Tokens of the response header, the same in every row.
        dropped: Number of entries left out: too long, or nothing of the response would be trained on.
        truncated: Number of rows that were cut.
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

    def __getitem__(self, index: int) -> EncodedExample:
        row = range(len(self))[index]  # IndexError past the end; accepts negative indices
        ids = self.input_ids[self.offsets[row] : self.offsets[row + 1]]
        return EncodedExample(ids, int(self.prompt_lengths[row]), self.header_length)

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each row, end token included."""
        return np.diff(self.offsets)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
) -> EncodedDataset:
    """Encodes each entry as prompt ids + header ids + response ids + one end token.

    Args:
        examples: The entries.
        tokenizer: Its `end_of_text` ends each row.
        style: The prompt style.
        max_length: Most tokens of a row, end token included; None for no limit.
        overlong: What becomes of a longer row. `drop`: it is left out. `truncate_prompt`: the end of the user's text
            (the end of the input, if there is one) is cut, so that the template, the header and the whole response
            stay; dropped where none of the user's text would be left. `truncate`: the row is cut at its end and has no
            end token; dropped where none of the response would be left. `error`: an error names the entries.

    Raises:
        InputError: If `overlong` is none of these, or is `error` and rows are too long, or no row is left.
    """
    if overlong not in OVERLONG:
        raise InputError(f"overlong={overlong!r}: choose one of {', '.join(OVERLONG)}.")
    opening, closing, header = map(tokenizer.encode_special, (style.opening, style.closing, style.header))
    template = len(opening) + len(closing) + len(header)
    flat, offsets, prompt_lengths, entries, too_long, truncated = array("i"), [0], array("i"), array("i"), [], 0
    for i, example in enumerate(examples):  # one thread: two are slower on texts this short
        body, response = tokenizer.encode(style.body(example)), tokenizer.encode(style.response(example))
        length = template + len(body) + len(response) + 1
        tail = [*response, tokenizer.end_of_text] if response else []  # every byte of it without a token: dropped
        if max_length is not None and (excess := length - max_length) > 0:
            too_long.append(f"{i + 1} ({length} tokens)")
            body, tail = _shorten(body, tail, excess, overlong)
            truncated += bool(tail)
        if tail:
            for ids in (opening, body, closing, header, tail):
                flat.extend(ids)
            offsets.append(len(flat))
            prompt_lengths.append(len(opening) + len(body) + len(closing))
            entries.append(i)
    if not entries and not too_long:
        raise InputError(f"none of the {len(examples)} entries has a response that {tokenizer.name} has tokens for.")
    if (overlong == "error" and too_long) or not entries:
        listed = ", ".join(too_long[:_LISTED]) + (", …" if len(too_long) > _LISTED else "")
        raise InputError(
            f"{len(too_long)} of {len(examples)} entries are longer than max_length={max_length}: entry {listed}.\n"
            "Raise max_length or choose another overlong: " + ", ".join(OVERLONG[:-1]) + "."
        )
    return EncodedDataset(
        np.array(flat, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(prompt_lengths, dtype=np.int32),
        np.array(entries, dtype=np.int32),
        header_length=len(header),
        dropped=len(examples) - len(entries),
        truncated=truncated,
    )


def _shorten(body: list[int], tail: list[int], excess: int, overlong: str) -> tuple[list[int], list[int]]:
    """A row's user text and its response with end token, shorter by `excess`; an empty response if that cannot be."""
    if overlong == "truncate_prompt" and excess < len(body):
        return body[:-excess], tail
    if overlong == "truncate" and excess < len(tail):
        return body, tail[:-excess]
    return body, []


def encode_cached(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
    cache_dir: Path | None = None,
) -> EncodedDataset:
    """`encode_examples`, kept in `cache_dir` under a hash of everything that decides the result.

    A cache file that is cut off or damaged is made anew. One that cannot be written costs a warning, not the run.
    """
    if cache_dir is None:
        return encode_examples(examples, tokenizer, style, max_length, overlong)
    path = cache_dir / f"{_cache_key(examples, tokenizer, style, max_length, overlong)}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays: dict[str, Any] = {key: array if array.ndim else array.item() for key, array in stored.items()}
            return EncodedDataset(**arrays)
        except Exception as error:  # a damaged zip file raises a dozen kinds
            log.warning("token cache %s is damaged (%s): encoding again", path, error)
    encoded = encode_examples(examples, tokenizer, style, max_length, overlong)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **vars(encoded))
        part.replace(path)  # a reader sees the whole file or none
    except OSError as error:
        log.warning("cannot write the token cache %s: %s", path, error)
    return encoded


def _cache_key(examples: Sequence[Example], tokenizer: Tokenizer, style: PromptStyle, *settings: object) -> str:
    texts = [text for example in examples for text in (example.instruction, example.input, example.output)]
    header = (_CACHE_VERSION, tokenizer.fingerprint, style, settings)
    digest = hashlib.sha256(repr(header).encode())
    digest.update(np.fromiter(map(len, texts), np.int64).tobytes())  # where one text ends and the next begins
    digest.update("".join(texts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def resolve_prompt_loss_weight(mask_instructions: bool, prompt_loss_weight: float | None) -> float:
    """The weight of prompt tokens in the loss: as given, else 0 with masked instructions and 1 without.

    Raises:
        InputError: If it is outside [0, 1].
    """
    if prompt_loss_weight is None:
        return 0.0 if mask_instructions else 1.0
    if not 0 <= prompt_loss_weight <= 1:
        raise InputError(f"prompt_loss_weight={prompt_loss_weight}: must be from 0 (masked) to 1, or null.")
    return float(prompt_loss_weight)


def loss_weights(example: EncodedExample, prompt_loss_weight: float = 1.0, mask_header: bool = False) -> np.ndarray:
    """The weight of each token as a target of the loss.

    Args:
        example: An encoded entry of length n.
        prompt_loss_weight: Weight of the prompt's tokens.
        mask_header: Whether the response header is weighted like the prompt; else 1, as in the book's exercise 7.2.

    Returns:
        (n,) float32, aligned with `input_ids`: shift it together with the labels. The first token is nobody's target,
        so its weight is 0. Response and end token have weight 1.
    """
    weights = np.ones(len(example.input_ids), dtype=np.float32)
    weights[: example.prompt_length + example.header_length * mask_header] = prompt_loss_weight
    weights[0] = 0
    return weights
