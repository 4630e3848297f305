"""Byte-pair encodings as `tiktoken` encodings, from GPT-2's merges file or from the metadata of a GGUF file.

A file's content decides its kind, not its name. `bytes` is a tokenizer without a file: one token per byte.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from instruct_lm.errors import InputError
from instruct_lm.io.gguf import read_gguf

END_OF_TEXT = "<|endoftext|>"
_CONTRACTIONS = "'(?:[sdmt]|ll|ve|re)"
GPT2_PATTERN = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# SmolLM2 first splits off each digit, then applies GPT-2's pattern to the rest. So whitespace never joins a digit.
SMOLLM_PATTERN = rf"{_CONTRACTIONS}|\p{{N}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
_GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN}  # llama.cpp's names, in `tokenizer.ggml.pre`


class Tokenizer:
    """Text to token ids and back, over a `tiktoken.Encoding`.

    Args:
        name: The vocabulary: `gpt2`, `gguf-smollm`, `bytes`.
        pattern: The regular expression that splits a text before merging.
        ranks: The bytes of each ordinary token → its id.
        special: The text of each special token → its id.
        end: The end token, which is a chat model's end of turn.

    Attributes:
        end_of_text: The id that ends a response in training: that of `<|endoftext|>` if there is one, else `end`.
        stop_tokens: The ids that end a response in generation: `end_of_text` and `end`.
        vocab_size: Number of ids, special tokens included.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int], end: int) -> None:
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.name, self.vocab_size = name, self.encoding.n_vocab
        self.end_of_text = special.get(END_OF_TEXT, end)
        self.stop_tokens = frozenset({self.end_of_text, end})
        self.bos: int | None = None
        self.control_tokens = special
        self.chat_template: str | None = None
        self.template_variables: dict[str, str] = {}
        self._bytes_without_token = bytes(b for b in range(256) if bytes([b]) not in ranks)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids. Files with the same vocabulary have the same hash."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        parts = (self.encoding._pat_str, sorted(self.encoding._special_tokens.items()), self.end_of_text, ranks)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text, in which `<|endoftext|>` is thirteen characters and not the end token.

        A byte without a token is dropped, as in transformers; SmolLM2 lacks tokens for a few control characters. A lone
        surrogate, which JSON allows and UTF-8 does not, becomes U+FFFD.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            text = data.decode()
        if len(data.translate(None, self._bytes_without_token)) == len(data):
            return self.encoding.encode_ordinary(text)
        # tiktoken panics on a byte without a token, so split the text here and drop the byte from its piece.
        pieces = (piece.encode() for piece in regex.findall(self.encoding._pat_str, text))
        kept = (piece.translate(None, self._bytes_without_token) for piece in pieces)
        return [token for piece in kept if piece for token in self.encoding._encode_single_piece(piece)]

    def encode_special(self, text: str) -> list[int]:
        """Token ids of a prompt style's own text, in which control tokens such as `<|im_start|>` are recognised."""
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        try:
            return self.encoding.decode([int(i) for i in ids])
        except (KeyError, OverflowError) as error:
            raise InputError(f"id outside the vocabulary of {self.name} ({self.vocab_size} ids): {error}") from error


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: A GPT-2 merges file (`merges.txt` on the hub, `vocab.bpe` at OpenAI), a GGUF file, or `bytes`.

    Raises:
        InputError: The file is missing or broken, or it holds no tokenizer that is supported.

    Example:
        >>> load_tokenizer("bytes").encode("Hé")  # é is two bytes in UTF-8
        [72, 195, 169]
    """
    if str(source) == "bytes":
        return Tokenizer("bytes", "(?s:.)", {bytes([b]): b for b in range(256)}, {END_OF_TEXT: 256}, 256)
    path = Path(source)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        return _gguf_tokenizer(path) if magic == b"GGUF" else _gpt2_tokenizer(path)
    except OSError as error:
        remedy = "Give GPT-2's merges.txt, a .gguf file, or `bytes`"
        raise InputError(f"tokenizer file {path}: {error.strerror or error}. {remedy}.") from error


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable character for each byte, in the order of its ids 0-255 (`bytes_to_unicode` in encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _as_bytes(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """A vocabulary whose tokens are written in GPT-2's printable characters, with the bytes that they stand for."""
    symbols = _byte_symbols()
    return {bytes(symbols[c] for c in token): i for token, i in vocabulary.items()}


def _gpt2_tokenizer(path: Path) -> Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file (byte {error.start}); expected GPT-2's merges.txt.") from error
    # The ids 0-255 are the bytes. Then each line joins two earlier tokens into the token with the next id.
    vocabulary = {symbol: i for i, symbol in enumerate(_byte_symbols())}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right in vocabulary:
            fault = f"{path}, line {number}: {line[:40]!r} is not a merge of two earlier tokens."
            raise InputError(f"{fault}\nExpected GPT-2's merges.txt (or vocab.bpe), not vocab.json or tokenizer.json.")
        vocabulary[left + right] = len(vocabulary)
    end = len(vocabulary)
    if end == 256:
        raise InputError(f"{path} holds no merges; expected GPT-2's merges.txt.")
    return Tokenizer("gpt2", GPT2_PATTERN, _as_bytes(vocabulary), {END_OF_TEXT: end}, end)


def _gguf_tokenizer(path: Path) -> Tokenizer:
    metadata = read_gguf(path).metadata
    keys = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
    try:
        model, pre, tokens, kinds, merges, end = (metadata[f"tokenizer.ggml.{key}"] for key in keys)
    except KeyError as error:
        raise InputError(f"{path} has no {error} in its metadata, so it holds no BPE tokenizer.") from error
    if model != "gpt2" or pre not in _GGUF_PATTERNS:
        supported = f"supported are gpt2 with {', '.join(_GGUF_PATTERNS)}"
        raise InputError(f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; {supported}.")
    if not 0 <= end < len(tokens):
        raise InputError(f"{path}: the end token {end} is not in its vocabulary of {len(tokens)}.")
    try:
        # Token types (llama.cpp's `llama_token_type`): 1 is text; 3 and 4, control and user defined, are special.
        vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
        special = {token: i for i, token in enumerate(tokens) if kinds[i] != 1}
        ranks = _as_bytes(vocabulary)
        # The file ranks a merge by its place in the list; tiktoken ranks it by the id of the token that it makes. Both
        # choose the same merges if those ids increase along the list, and every token of two bytes or more is in it.
        made = [vocabulary[merge.replace(" ", "")] for merge in merges]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: its tokens, token types and merges do not fit together ({error!r}).") from error
    if any(a >= b for a, b in pairwise(made)) or len(made) != sum(len(token) > 1 for token in ranks):
        raise InputError(f"{path}: token ids do not increase with the merges; this tokenizer is not supported.")
    return Tokenizer(f"gguf-{pre}", _GGUF_PATTERNS[pre], ranks, special, end)
