"""From conversations to token ids: encode, shorten, cache."""

import hashlib
import logging
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.encoded import EncodedDataset
from instruct_lm.data.pieces import Kind, Piece, PromptStyle
from instruct_lm.data.tokenizer import Tokenizer, without_surrogates
from instruct_lm.errors import InputError, listing
from instruct_lm.io.files import replacing

log = logging.getLogger(__name__)

OVERLONG = ("drop", "truncate_prompt", "truncate", "error")
_CACHE_VERSION = 3  # raise it when the encoding changes


class EncodedPiece(NamedTuple):
    """A piece with its token ids."""

    piece: Piece
    ids: Sequence[int]


Encode = Callable[[Sequence[Turn], bool], list[EncodedPiece]]
"""Turns, and whether people's texts stand apart → the encoded pieces; see `encode_pieces`."""


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer, apart: bool = False) -> list[EncodedPiece]:
    r"""Encode the pieces together, so that a prompt has the ids that any program gives its whole text.

    Three things differ from encoding the whole text. Control tokens are recognised in the style's own text alone. A
    response begins with a new token, since the prompt before it has the same ids in training, where it follows, as in
    generation. And the first piece begins with the tokenizer's `bos`, if it has one.

    A token that reaches across pieces belongs to the piece in which it begins: Qwen2 and Llama 3 have one for the
    `.\n\n` of an instruction with the header `\n\n### Response:\n`.

    Args:
        pieces: The pieces of a prompt style.
        tokenizer: The tokenizer.
        apart: Let what people wrote begin and end with a token of its own, so that it can be cut.
    """
    ids: list[list[int]] = [[] for _ in pieces]
    run: list[tuple[int, str]] = []  # piece and text, as long as nothing separates the tokens

    def encode_run() -> None:
        if run:
            for (i, _), part in zip(run, tokenizer.encode_parts([text for _, text in run]), strict=True):
                ids[i] += part
            run.clear()

    for i, piece in enumerate(pieces):
        if piece.ends:
            encode_run()
            ids[i].append(tokenizer.end_token(piece.text))
        elif piece.own:
            for text, control in _split(tokenizer, piece.text):
                if text:
                    run.append((i, text))
                if control is not None:
                    encode_run()
                    ids[i].append(control)
        else:
            if apart or piece.kind == Kind.RESPONSE:
                encode_run()
            run.append((i, without_surrogates(piece.text)))
            if apart:
                encode_run()
    encode_run()
    if tokenizer.bos is not None and ids[0][:1] != [tokenizer.bos]:
        return [EncodedPiece(Piece("", Kind.PROMPT), (tokenizer.bos,)), *map(EncodedPiece, pieces, ids)]
    return list(map(EncodedPiece, pieces, ids))


@lru_cache(maxsize=4096)
def _split(tokenizer: Tokenizer, text: str) -> list[tuple[str, int | None]]:
    """A style's own text, which is the same in all entries, cut after each control token: text before it, its id."""
    text, parts, begin = without_surrogates(text), [], 0
    for start, end, control in tokenizer.control_spans(text):
        parts.append((text[begin:start], control))
        begin = end
    return [*parts, (text[begin:], None)]


def count(encoded: Sequence[EncodedPiece]) -> int:
    """Number of tokens."""
    return sum(len(ids) for _, ids in encoded)


def shorten(turns: Sequence[Turn], encode: Encode, limit: int) -> list[EncodedPiece] | None:
    """Shorten what people wrote in the prompt until all pieces have at most ``limit`` tokens.

    The earliest exchanges go first: all turns, but a system turn, up to a response that is not the last. Then the end
    of the last user turn is cut, then that of the turn before it; one token of each stays.

    Args:
        turns: The turns.
        encode: Encodes turns.
        limit: Most tokens.

    Returns:
        The pieces that are left, or None if that is not enough.

    Example:
        >>> from instruct_lm.data.prompts import PlainStyle
        >>> from instruct_lm.data.tokenizer import load_tokenizer
        >>> tokenizer, style = load_tokenizer("bytes"), PlainStyle("short", "Q:", "|", ";", "A:")
        >>> turns = [Turn("user", "ab"), Turn("assistant", "c"), Turn("user", "defg"), Turn("assistant", "hi")]
        >>> left = shorten(turns, lambda turns, apart: encode_pieces(style.pieces(turns), tokenizer, apart), 10)
        >>> tokenizer.decode(token for _, ids in left for token in ids)
        'Q:de;A:hi<|endoftext|>'
    """
    encoded = encode(turns, False)
    first = int(turns[0].role == "system")
    while count(encoded) > limit:
        ends = [i for i, turn in enumerate(turns[:-1], start=1) if turn.role == "assistant"]
        if not ends:
            break
        turns = [*turns[:first], *turns[ends[0] :]]
        encoded = encode(turns, False)
    if count(encoded) <= limit:
        return encoded
    encoded = encode(turns, True)
    excess = count(encoded) - limit
    for i, (piece, ids) in reversed(list(enumerate(encoded))):
        if excess > 0 and piece.kind == Kind.PROMPT and not piece.own:
            kept = ids[: max(1, len(ids) - excess)]
            excess -= len(ids) - len(kept)
            encoded[i] = EncodedPiece(piece, kept)
    return encoded if excess <= 0 else None


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
) -> EncodedDataset:
    """Encode each conversation as a row: the ids of its pieces, one after the other.

    Args:
        conversations: The entries.
        tokenizer: The tokenizer.
        style: The prompt style.
        max_length: Most tokens of a row, end token included; None: no limit.
        overlong: What to do with a longer row. `drop`: leave it out. `truncate_prompt`: shorten the prompt as `shorten`
            does, or drop the row if that is not enough. `truncate`: cut the end of the row, end token included, or drop
            the row if nothing of a response would be left. `error`: raise an error.

    Raises:
        InputError: `overlong` is none of these, or it is `error` and rows are too long, or no row is left, or a chat
            template refuses an entry.

    Example:
        With one token a character, this entry has 15 tokens, 3 more than the limit:

        >>> from instruct_lm.data.prompts import PlainStyle
        >>> from instruct_lm.data.tokenizer import load_tokenizer
        >>> tokenizer, style = load_tokenizer("bytes"), PlainStyle("short", "Q:", "|", ";", "A:")
        >>> for limit, overlong in ((15, "drop"), (12, "truncate_prompt"), (12, "truncate")):
        ...     rows = encode_conversations([Conversation.of("abcdef", "", "xyz")], tokenizer, style, limit, overlong)
        ...     print(tokenizer.decode(rows.input_ids), "".join(map(str, rows.kinds)))
        Q:abcdef;A:xyz<|endoftext|> 000000000112222
        Q:abc;A:xyz<|endoftext|> 000000112222
        Q:abcdef;A:x 000000000112
    """
    if overlong not in OVERLONG:
        raise InputError(f"overlong={overlong!r}: choose one of {', '.join(OVERLONG)}.")

    def encode(turns: Sequence[Turn], apart: bool = False) -> list[EncodedPiece]:
        return encode_pieces(style.pieces(turns), tokenizer, apart)

    flat, kinds, offsets, entries, too_long, truncated = array("i"), bytearray(), [0], [], [], 0
    bar = tqdm(conversations, desc="encoding", unit="entry", delay=3, leave=False)  # of what takes over 3 seconds
    for place, conversation in enumerate(bar, start=1):  # in one thread: two are slower on texts this short
        number = conversation.number or place
        try:
            encoded = encode(conversation.turns)
        except InputError as error:
            raise InputError(f"entry {number}: {error}") from error
        if any(not ids for piece, ids in encoded if piece.kind == Kind.RESPONSE and not piece.own):
            continue  # a response of which no character has a token
        length = count(encoded)
        if max_length is not None and length > max_length:
            too_long.append(f"{number} ({length} tokens)")
            fitting = None
            if overlong == "truncate_prompt":
                fitting = shorten(conversation.turns, encode, max_length)
            elif overlong == "truncate":
                fitting = _cut(encoded, max_length)
            if fitting is None:
                continue
            encoded, truncated = fitting, truncated + 1
        for piece, ids in encoded:
            flat.extend(ids)
            kinds.extend(bytes([piece.kind]) * len(ids))
        offsets.append(len(flat))
        entries.append(number)
    if not entries or (too_long and overlong == "error"):
        template = min((_template_length(encode(c.turns)) for c in conversations[:100]), default=0)
        raise InputError(_problem(len(conversations), too_long, max_length, tokenizer, template))
    return EncodedDataset(
        np.array(flat, dtype=np.int32),
        np.frombuffer(kinds, dtype=np.uint8),
        np.array(offsets, dtype=np.int64),
        np.array(entries, dtype=np.int32),
        dropped=len(conversations) - len(entries),
        truncated=truncated,
    )


def _cut(encoded: Sequence[EncodedPiece], limit: int) -> list[EncodedPiece] | None:
    """The first ``limit`` tokens; None if none of them belongs to the text of a response."""
    kept, room = [], limit
    for piece, ids in encoded:
        kept.append(EncodedPiece(piece, ids[:room]))
        room -= len(kept[-1].ids)
    return kept if any(ids for piece, ids in kept if piece.kind == Kind.RESPONSE and not piece.own) else None


def _template_length(encoded: Sequence[EncodedPiece]) -> int:
    """Number of tokens of the style's own text."""
    return count([item for item in encoded if item.piece.own])


def _problem(n: int, too_long: list[str], limit: int | None, tokenizer: Tokenizer, template: int) -> str:
    """The message for n entries of which some are too long or no row is left."""
    if not too_long:
        return f"none of the {n} entries has a response that {tokenizer.name} has tokens for."
    summary = (
        f"{len(too_long)} of {n} entries are longer than max_length={limit}: entry {', '.join(listing(too_long))}."
    )
    if limit is not None and template >= limit:
        return f"{summary}\nThe prompt style alone takes {template} tokens: raise max_length, or choose another style."
    return f"{summary}\nRaise max_length or choose another overlong: {', '.join(OVERLONG[:-1])}."


def encode_cached(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int | None = None,
    overlong: str = "drop",
    cache_dir: Path | None = None,
) -> EncodedDataset:
    """Encode as `encode_conversations` does, and keep the result in `cache_dir`; None: no cache.

    The file is named by a hash of all that decides the result. A damaged file is replaced. If the file cannot be
    written, a warning says so and the run goes on.
    """
    if cache_dir is None:
        return encode_conversations(conversations, tokenizer, style, max_length, overlong)
    key = repr((_CACHE_VERSION, tokenizer.fingerprint, style, max_length, overlong, list(conversations)))
    path = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return EncodedDataset(**{name: x if x.ndim else x.item() for name, x in stored.items()})
        except Exception as error:  # a damaged zip file raises a dozen kinds
            log.warning("token cache %s is damaged (%s): encoding again", path, error)
    encoded = encode_conversations(conversations, tokenizer, style, max_length, overlong)
    try:
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **vars(encoded))
    except OSError as error:
        log.warning("cannot write the token cache %s: %s", path, error)
    return encoded
