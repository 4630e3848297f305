"""The content of the hub's `tokenizer.json` for byte-level BPEs that come without one."""

from collections.abc import Mapping, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_GPT2_WORDS = _BYTES | {"use_regex": True}


def _words(digits: str) -> dict[str, Any]:
    """The words of Llama 3 and Qwen2, which differ in the digits that a word may have."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_NFC = {"type": "NFC"}
# What splits a text into words, in the tokenizer.json of the models on the hub.
_WORDS: dict[str, list[dict[str, Any]]] = {
    "bytes": [_BYTES],
    "gpt-2": [_GPT2_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_WORDS],
    "llama-bpe": [_words(r"\p{N}{1,3}"), _BYTES],
    "qwen2": [_words(r"\p{N}"), _BYTES],
}
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""llama.cpp's names, in `tokenizer.ggml.pre` of a GGUF file."""


def pre_tokenizer_of(definition: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of what splits a text into words in a `tokenizer.json`, found by its content.

    Without merges a token is a byte however the words are split, so the tokenizer `bytes` passes for GPT-2's. NFC,
    Qwen2's normalizer, is let pass, since llama.cpp leaves it out.

    Returns:
        One of `PRE_TOKENIZERS`, or None for another one.
    """
    model, splitter = definition["model"], definition.get("pre_tokenizer") or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    words = [_plain(part) for part in parts]
    unusual = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if (definition.get("normalizer") or _NFC) != _NFC or any(model.get(key) for key in unusual):
        return None
    for name, known in _WORDS.items():
        same_words = words == [_plain(part) for part in known]
        if same_words and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
            if name == "bytes":
                return None if model["merges"] else "gpt-2"
            return name
    return None


def _plain(part: Mapping[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer without what does not change the words, its defaults filled in."""
    part = {"add_prefix_space": True, "use_regex": True, **part} if part.get("type") == "ByteLevel" else part
    return {key: value for key, value in part.items() if key != "trim_offsets"}


def bpe_definition(
    vocabulary: dict[str, int], merges: Sequence[str], added: Mapping[int, str], pre: str
) -> dict[str, Any]:
    """The content of a `tokenizer.json`.

    Args:
        vocabulary: Token in GPT-2's printable characters → id.
        merges: Two tokens each, separated by a space.
        added: Id → text of the control tokens.
        pre: One of `PRE_TOKENIZERS`, or `bytes` for a text that is one word.
    """
    # Llama 3 takes a word that is in the vocabulary as it is; Qwen2 composes characters, which llama.cpp leaves out.
    model = {"type": "BPE", "ignore_merges": pre == "llama-bpe", "vocab": vocabulary, "merges": merges}
    normalizer = _NFC if pre == "qwen2" else None
    words = {"type": "Sequence", "pretokenizers": _WORDS[pre]}
    definition: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": words,
    }
    return with_added(definition | {"post_processor": _BYTES, "decoder": _BYTES, "model": model}, added)


def with_added(definition: dict[str, Any], tokens: Mapping[int, str]) -> dict[str, Any]:
    """A definition with more control tokens.

    They are in its vocabulary too, since `tokenizers` takes the id from there and else counts on from the last.
    """
    model, flags = definition["model"], dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, **flags, "special": True} for i, text in sorted(tokens.items())]
    vocabulary = model["vocab"] | {text: i for i, text in tokens.items()}
    added_tokens = [*(definition.get("added_tokens") or []), *added]
    return definition | {"added_tokens": added_tokens, "model": model | {"vocab": vocabulary}}


def without_added(definition: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """A definition without control tokens, so that no text becomes one, neither as an added token nor by merges.

    A control token of one character stays in the vocabulary, since ordinary text needs it. The post-processor goes too:
    it adds control tokens, and GPT-2's cuts blanks off the positions of tokens.
    """
    control = {text for text in control if len(text) > 1}
    model = definition["model"]
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in control}
    merges = model["merges"]
    # Looking at each pair takes a quarter of a second; hardly any vocabulary has merges that make a control token.
    joined = "\n".join(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges)
    if any(text in joined for text in control):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        merges = [pair for pair in pairs if control.isdisjoint((*pair, "".join(pair)))]
    own = model | {"vocab": vocabulary, "merges": merges}
    return definition | {"added_tokens": [], "post_processor": None, "model": own}


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable character of each byte → the byte, in the order of its ids 0-255 (encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
