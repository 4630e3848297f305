"""Text to token ids and back: `tokenizers` for a model's own vocabulary, `tiktoken` for GPT-2's merges."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers.processors import TemplateProcessing

from instruct_lm.data.tokenizer_definition import END_OF_TEXT, GPT2_PATTERN, pre_tokenizer_of, without_added
from instruct_lm.data.tokenizer_files import RESAVE, TokenizerFiles, read_tokenizer
from instruct_lm.errors import InputError

__all__ = ["END_OF_TEXT", "Tokenizer", "load_tokenizer"]

_BLANK = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")


class Tokenizer:
    """A byte-pair encoding with its control tokens and what else a model's files say of it.

    Its ids are upstream's. What people wrote is encoded by `encode`, in which no text becomes a control token.

    Args:
        files: What the files say.

    Attributes:
        name: The kind: `gpt2`, `gguf-smollm`, `bytes`, `tokenizer.json`.
        vocab_size: Highest id + 1, control tokens included.
        control_tokens: The text of each special or otherwise added token → its id.
        end_of_text: The id that ends a response where the prompt style names no token for it: that of `<|endoftext|>`
            if it is a control token, else of the `eos_token` of the model's files.
        stop_tokens: The ids that end a response in generation: `end_of_text` and all that the files name.
        bos: The id that upstream's tokenizer puts before every text; None if it puts none.
        chat_template: The model's Jinja template.
        template_variables: `bos_token`, `eos_token`, `pad_token`, `unk_token` → text, where known.

    Raises:
        InputError: The definition is damaged, or its end token is unknown.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self.name, self.chat_template, self.template_variables = files.name, files.chat_template, files.named
        self._full = _build(files.definition, files.origin)
        vocabulary = self._full.get_vocab()
        # As in transformers, tokens that the settings name are control tokens, whatever the definition says.
        self._full.add_special_tokens([text for text in files.named.values() if text in vocabulary])
        self.vocab_size = max(self._full.get_vocab().values(), default=-1) + 1
        self.control_tokens = {token.content: i for i, token in self._full.get_added_tokens_decoder().items()}
        bos = files.named.get("bos_token", "")
        if files.add_bos and bos in self.control_tokens:
            template = [(bos, self.control_tokens[bos])]
            self._full.post_processor = TemplateProcessing(f"{bos}:0 $A:0", special_tokens=template)
        probe = self._full.encode("a")
        self.bos = probe.ids[0] if probe.ids and probe.special_tokens_mask[0] else None
        # transformers writes GPT-2's 50256 into the config.json of a smaller model unless it is told better.
        known = [end for end in files.ends if Path(end[0]).name != "config.json" or self._id(end[1]) is not None]
        ends = [self._end(*end) for end in (known if known or END_OF_TEXT in self.control_tokens else files.ends)]
        if not ends and END_OF_TEXT not in self.control_tokens:
            remedy = "add eos_token to the tokenizer_config.json beside it, or eos_token_id to generation_config.json"
            raise InputError(f"{files.origin}: no file names the model's end token; {remedy}.")
        self.end_of_text = self.control_tokens[END_OF_TEXT] if END_OF_TEXT in self.control_tokens else ends[0]
        self.stop_tokens = frozenset({self.end_of_text, *ends})
        self._plain: tiktoken.Encoding | tokenizers.Tokenizer
        if files.ranks:
            tables: dict[str, Any] = {"mergeable_ranks": files.ranks, "special_tokens": self.control_tokens}
            self._plain = tiktoken.Encoding(files.name, pat_str=GPT2_PATTERN, **tables)
        else:
            self._plain = _build(without_added(files.definition, set(self.control_tokens)), files.origin)

    def _id(self, end: int | str) -> int | None:
        """The id of an end token; None if it is not in the vocabulary."""
        i = self._full.token_to_id(end) if isinstance(end, str) else end
        return i if isinstance(i, int) and 0 <= i < self.vocab_size else None

    def _end(self, origin: str, end: int | str) -> int:
        if (i := self._id(end)) is None:
            vocabulary = f"the {self.vocab_size} ids of {self._files.origin}"
            remedy = "Correct it, or give the model's own tokenizer"
            raise InputError(f"{origin} names the end token {end!r}, which is not among {vocabulary}. {remedy}.")
        return i

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._files,)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids, end tokens included; files with the same vocabulary share it."""
        parts = (self._full.to_str(), self.end_of_text, sorted(self.stop_tokens), self.bos)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def end_token(self, end: str) -> int:
        """The id that ends a response in training: the control token `end` of a prompt style, else `end_of_text`."""
        return self.control_tokens.get(end, self.end_of_text)

    def stop_tokens_with(self, end: str) -> frozenset[int]:
        """The ids that end a response in generation: `stop_tokens` and the `end_token` of the prompt style."""
        return self.stop_tokens | {self.end_token(end)}

    def definition(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`, control tokens that other files name included."""
        return json.loads(self._full.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text, in which `<|endoftext|>` is thirteen characters and not the end token.

        A byte or character without a token is dropped. A lone surrogate, which JSON allows and UTF-8 does not, becomes
        U+FFFD.
        """
        text = without_surrogates(text)
        if isinstance(self._plain, tiktoken.Encoding):
            return self._plain.encode_ordinary(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of ordinary texts without surrogates, encoded as one text and told apart again.

        A token that reaches across texts belongs to the one in which it begins.
        """
        if len(texts) == 1:
            return [self.encode(texts[0])]
        begun, rest = _beginning(self, texts[0])
        texts = [rest, *texts[1:]]
        whole = "".join(texts)
        if isinstance(self._plain, tiktoken.Encoding):
            ids = self._plain.encode_ordinary(whole)
            starts = [0, *accumulate(map(self._n_bytes.__getitem__, ids))]  # in bytes
            ends = accumulate(len(text.encode()) for text in texts[:-1])
            cuts = [bisect_left(starts, end, hi=len(ids)) for end in ends]
        else:
            encoded = self._plain.encode(whole, add_special_tokens=False)
            ids, spans = encoded.ids, encoded.offsets  # beginning and end in characters
            cuts = [bisect_left(spans, (end,)) for end in accumulate(map(len, texts[:-1]))]
        first, *others = (ids[i:j] for i, j in pairwise([0, *cuts, len(ids)]))
        return [begun + first, *others]

    @cached_property
    def _has_words(self) -> bool:
        """Whether it is known how a text is split into words, each of which is encoded alone."""
        return isinstance(self._plain, tiktoken.Encoding) or pre_tokenizer_of(self._files.definition) is not None

    @cached_property
    def _n_bytes(self) -> dict[int, int]:
        """The number of bytes of each of tiktoken's tokens."""
        return {i: len(token) for token, i in (self._files.ranks or {}).items()}

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Where control tokens stand in a prompt style's own text: beginning, end, id of each."""
        encoded, control = self._full.encode(text, add_special_tokens=False), set(self.control_tokens.values())
        return [(*span, i) for i, span in zip(encoded.ids, encoded.offsets, strict=True) if i in control]

    def encode_special(self, text: str) -> list[int]:
        """Token ids of a prompt style's own text, in which control tokens such as `<|im_start|>` are recognised."""
        text = without_surrogates(text)
        if isinstance(self._plain, tiktoken.Encoding):
            return self._plain.encode(text, allowed_special="all")
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, control tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(f"id outside the vocabulary of {self.name} ({self.vocab_size} ids): {outside[0]}")
        return self._full.decode(ids, skip_special_tokens=False)

    def hub_files(self, named: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of `tokenizer.json` and `tokenizer_config.json`, as transformers and `load_tokenizer` read them.

        Args:
            named: As `template_variables`, for those to be written with another token.
        """
        definition = self.definition()
        added = {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in definition["added_tokens"]
        }
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.template_variables,
            **named,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,  # true would drop blanks before punctuation in `decode`
        }
        return definition, settings


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer; a file's content decides what it is, not its name.

    Args:
        source: One of

            - a folder in the hub's layout: `tokenizer.json`, or `vocab.json` and `merges.txt`, or GPT-2's `merges.txt`;
              its end tokens, chat template and more are in `tokenizer_config.json`, `generation_config.json`,
              `config.json`, `special_tokens_map.json`, `chat_template.jinja`, `chat_template.json`;
            - a `tokenizer.json` or a file of weights: it stands for its folder;
            - GPT-2's merges (`merges.txt` on the hub, `vocab.bpe` at OpenAI);
            - a GGUF file with a BPE of GPT-2, SmolLM2, Llama 3 or Qwen2 in its metadata;
            - `bytes`: one token per byte, and an end token.

    Raises:
        InputError: The file is missing or broken, or it holds no tokenizer that is supported.

    Example:
        >>> load_tokenizer("bytes").encode("Hé")  # é is two bytes in UTF-8
        [72, 195, 169]
    """
    return Tokenizer(read_tokenizer(source))


@lru_cache(maxsize=64)
def _beginning(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """Token ids of the beginning of a text that hold whatever follows, and the rest; all prompts begin with one text.

    A blank between two letters begins a word in all of `PRE_TOKENIZERS`.
    """
    cut = max((match.start() for match in _BLANK.finditer(text)), default=0) if tokenizer._has_words else 0
    return (tokenizer.encode(text[:cut]) if cut else []), text[cut:]


def without_surrogates(text: str) -> str:
    """A text with U+FFFD in place of each lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _build(definition: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(definition))
        made.encode("a")  # a damaged post-processor shows at its first use
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain exceptions, and pyo3's PanicException, which is a BaseException
        raise InputError(f"{origin} defines no tokenizer that `tokenizers` can read ({error}): {RESAVE}.") from error
    return made
