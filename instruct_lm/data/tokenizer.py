"""Byte-pair encodings: GPT-2's merges file and a GGUF file's own BPE, both as `tiktoken` encodings.

The file's content decides what it is, not its name. `bytes` is a tokenizer without a file: one token a byte.
"""

import hashlib
import re
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
# Digits are split off one by one before GPT-2's pattern sees the rest, so whitespace before a digit ends its part.
SMOLLM_PATTERN = rf"{_CONTRACTIONS}|\p{{N}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
_GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN}  # by llama.cpp's names in `tokenizer.ggml.pre`


class Tokenizer:
    """Text to token ids and back, over a `tiktoken.Encoding`.

    Attributes:
        end_of_text: The id that ends a response in training.
        stop_tokens: The ids that end one in generation: `end_of_text`, and the one a chat model ends its turn with.
        vocab_size: Number of ids, special tokens included.
    """

    def __init__(self, encoding: tiktoken.Encoding, end_of_text: int, end_of_turn: int | None = None) -> None:
        self.encoding = encoding
        self.end_of_text = end_of_text
        self.stop_tokens = frozenset({end_of_text, end_of_text if end_of_turn is None else end_of_turn})
        self.vocab_size = encoding.n_vocab
        ranks = encoding._mergeable_ranks
        self._bytes_without_token = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._special_ids = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        self._special_split = re.compile(f"({'|'.join(map(re.escape, sorted(self._special_ids)))})")

    @property
    def name(self) -> str:
        """What the vocabulary is: `gpt2`, `gguf-smollm`, `bytes`."""
        return self.encoding.name

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids; equal for equal vocabularies, whatever file they came from."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        parts = (self.encoding._pat_str, sorted(self._special_ids.items()), self.end_of_text, ranks)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: `<|endoftext|>` in it is thirteen characters, not the end token.

        A byte without a token (SmolLM2 has none for a few control characters) is dropped, as transformers does. A
        lone surrogate, which JSON can hold and UTF-8 cannot, becomes U+FFFD.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            text = data.decode()
        if len(data.translate(None, self._bytes_without_token)) == len(data):
            return self.encoding.encode_ordinary(text)
        pieces = (piece.encode() for piece in regex.findall(self.encoding._pat_str, text))
        kept = (piece.translate(None, self._bytes_without_token) for piece in pieces)  # tiktoken panics on such a byte
        return [token for piece in kept if piece for token in self.encoding._encode_single_piece(piece)]

    def encode_special(self, text: str) -> list[int]:
        """Token ids of a prompt style's own text, in which the vocabulary's control tokens are recognised."""
        ids: list[int] = []
        for part in self._special_split.split(text):
            ids += [self._special_ids[part]] if part in self._special_ids else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: If an id is not in the vocabulary.
        """
        try:
            return self.encoding.decode([int(i) for i in ids])
        except (KeyError, OverflowError) as error:
            raise InputError(
                f"a token id is outside the vocabulary of {self.name} (0-{self.vocab_size - 1}): {error}."
            ) from error


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        source: A GPT-2 merges file (`merges.txt` on the hub, `vocab.bpe` at OpenAI), a GGUF file, or `bytes`.

    Raises:
        InputError: If the file is missing, is neither of the two, is broken, or holds a tokenizer of another kind.
    """
    if str(source) == "bytes":
        return _bytes_tokenizer()
    path = Path(source)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        return _gguf_tokenizer(path) if magic == b"GGUF" else _gpt2_tokenizer(path)
    except OSError as error:
        raise InputError(
            f"tokenizer file {path}: {error.strerror or error}. Give GPT-2's merges.txt, a .gguf file, or `bytes`."
        ) from error


def _bytes_tokenizer() -> Tokenizer:
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    return Tokenizer(encoding, end_of_text=256)


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable character for each byte, in the order of its ids 0-255 (`bytes_to_unicode` in encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _gpt2_tokenizer(path: Path) -> Tokenizer:
    symbols = _byte_symbols()
    ranks = {bytes([b]): i for i, b in enumerate(symbols.values())}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file (byte {error.start}); expected GPT-2's merges.txt.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        try:
            left, right = (bytes(symbols[c] for c in part) for part in line.rstrip("\r").split(" "))
        except (KeyError, ValueError):
            left = right = b""
        if left not in ranks or right not in ranks or left + right in ranks:
            raise InputError(
                f"{path}, line {number}: {line[:40]!r} is not a merge of two earlier tokens.\n"
                "Expected GPT-2's merges.txt (also named vocab.bpe), not vocab.json or tokenizer.json."
            )
        ranks[left + right] = len(ranks)
    if len(ranks) == 256:
        raise InputError(f"{path} holds no merges; expected GPT-2's merges.txt.")
    end = len(ranks)
    return Tokenizer(
        tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end}), end
    )


def _gguf_tokenizer(path: Path) -> Tokenizer:
    metadata = read_gguf(path).metadata
    try:
        model, pre = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        merges, end = metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.eos_token_id"]
    except KeyError as error:
        raise InputError(f"{path} has no {error} in its metadata, so it holds no BPE tokenizer.") from error
    if model != "gpt2" or pre not in _GGUF_PATTERNS:
        known = ", ".join(_GGUF_PATTERNS)
        raise InputError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; only gpt2 with {known}."
        )
    ordinary = [kind == 1 for kind in kinds]  # 1: normal token, 3: control, 4: user defined
    symbols = _byte_symbols()
    try:
        ranks = {bytes(symbols[c] for c in t): i for i, t in enumerate(tokens) if ordinary[i]}
        special = {t: i for i, t in enumerate(tokens) if not ordinary[i]}
        ids = [ranks[bytes(symbols[c] for c in merge if c != " ")] for merge in merges]
        # tiktoken ranks a merge by the id of its result; the file ranks it by its place in the list.
        if any(a >= b for a, b in pairwise(ids)) or len(ids) != sum(len(t) > 1 for t in ranks):
            raise InputError(f"{path}: token ids do not rise with the merges; this tokenizer is not supported.")
        encoding = tiktoken.Encoding(
            f"gguf-{pre}", pat_str=_GGUF_PATTERNS[pre], mergeable_ranks=ranks, special_tokens=special
        )
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: its tokens, token types and merges do not fit together ({error!r}).") from error
    if not 0 <= end < len(tokens):
        raise InputError(f"{path}: the end token {end} is not in its vocabulary of {len(tokens)}.")
    return Tokenizer(encoding, special.get(END_OF_TEXT, end), end)
