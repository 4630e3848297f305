"""What a model's files say of its tokenizer, whatever their format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instruct_lm.data.tokenizer_definition import (
    END_OF_TEXT,
    PRE_TOKENIZERS,
    bpe_definition,
    byte_symbols,
    with_added,
)
from instruct_lm.errors import InputError
from instruct_lm.io.gguf import read_gguf

RESAVE = "fetch it anew, or write it with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
_KINDS = (
    "Give a folder with tokenizer.json, a tokenizer.json, GPT-2's merges.txt (or vocab.bpe), a .gguf file, or `bytes`"
)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# Tokenizer classes and model types whose vocab.json and merges.txt are read → their pre-tokenizer.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "gpt2": "gpt-2", "Qwen2Tokenizer": "qwen2", "qwen2": "qwen2", "qwen3": "qwen2"}


class TokenizerFiles(NamedTuple):
    """The content of a tokenizer's files.

    Attributes:
        name: The kind of tokenizer: `gpt2`, `gguf-smollm`, `bytes`, `tokenizer.json`.
        origin: The file, for messages.
        definition: The content of a `tokenizer.json` with a BPE model.
        ends: File and end token that it names, as an id or as its text; the first is the one to train with.
        named: `bos_token`, `eos_token`, `pad_token`, `unk_token` → text, where known.
        add_bos: Whether upstream puts the `bos_token` before every text, if the definition does not say so itself.
        chat_template: A Jinja template.
        ranks: Of GPT-2's merges alone, for tiktoken: the bytes of each token → its id.
    """

    name: str
    origin: str
    definition: dict[str, Any]
    ends: list[tuple[str, int | str]]
    named: dict[str, str]
    add_bos: bool = False
    chat_template: str | None = None
    ranks: dict[bytes, int] | None = None


def read_tokenizer(source: str | Path) -> TokenizerFiles:
    """Read a tokenizer; `load_tokenizer` says from what.

    Raises:
        InputError: The file is missing or broken, or it holds no tokenizer that is supported.
    """
    if str(source) == "bytes":
        definition = bpe_definition(byte_symbols(), [], {256: END_OF_TEXT}, "bytes")
        return TokenizerFiles("bytes", "bytes", definition, [("bytes", END_OF_TEXT)], {"eos_token": END_OF_TEXT})
    path = Path(source)
    try:
        if path.is_dir():
            return _read_folder(path)
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(b"GGUF"):
            return _read_gguf(path)
        # Weights: safetensors (u64 length of a JSON header), or pickles, in a zip file or bare.
        if (head[8:9] == b"{" and b"\0" in head[:8]) or head.startswith((b"PK\x03\x04", b"\x80")):
            return _read_folder(path.parent)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
            return _read_json(path)
        return _read_pair(path.parent) if (path.parent / "vocab.json").is_file() else _read_merges(path)
    except OSError as error:
        raise InputError(f"tokenizer {path}: {error.strerror or error}. {_KINDS}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer {path} is not a text file in UTF-8 (byte {error.start}). {_KINDS}.") from error


def _read_folder(folder: Path) -> TokenizerFiles:
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder / "tokenizer.json")
    if (folder / "merges.txt").is_file():
        if (folder / "vocab.json").is_file():
            return _read_pair(folder)
        return _with_settings(_read_merges(folder / "merges.txt"), folder)
    if (folder / "tokenizer.model").is_file():
        convert = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        fault = "has a sentencepiece tokenizer.model alone"
        raise InputError(f"{folder} {fault}. Write its tokenizer.json with transformers: {convert}")
    remedy = "Put the base model's tokenizer.json and tokenizer_config.json there, or set model.tokenizer"
    raise InputError(f"{folder} has no tokenizer: neither tokenizer.json nor merges.txt. {remedy}. {_KINDS}.")


def _read_json(path: Path) -> TokenizerFiles:
    """A tokenizer.json; an index of sharded weights stands for its folder."""
    content = _json(path)
    if isinstance(content, dict) and "weight_map" in content:
        return _read_folder(path.parent)
    if not isinstance(content, dict) or not isinstance(model := content.get("model"), dict):
        if content and isinstance(content, dict) and all(isinstance(value, int) for value in content.values()):
            remedy = "give its folder, with merges.txt beside it, or tokenizer.json"
            raise InputError(f"{path} is a vocab.json, which is half of a tokenizer: {remedy}.")
        raise InputError(f"{path} is no tokenizer.json: it has no `model`. {_KINDS}.")
    kind = model.get("type", "BPE")
    if kind != "BPE" or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        fault = f"a model of type {kind!r}" if kind != "BPE" else "a BPE model without vocab and merges"
        raise InputError(f"{path} holds {fault}; supported is BPE. Give the tokenizer.json of a supported base model.")
    # A character without a token is dropped, here as elsewhere, and no setting of an earlier call stays.
    content |= {"truncation": None, "padding": None, "model": model | {"unk_token": None, "dropout": None}}
    return _with_settings(TokenizerFiles("tokenizer.json", str(path), content, [], {}), path.parent)


def _json(path: Path) -> Any:
    """The content of a JSON file; an empty object if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): {RESAVE}.") from error


def _object(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__} where an object is expected: {RESAVE}.")
    return content


def _with_settings(files: TokenizerFiles, folder: Path) -> TokenizerFiles:
    """Add what the other files of the hub's layout say."""
    path = folder / "tokenizer_config.json"
    settings = _object(folder / "special_tokens_map.json") | _object(path)
    named = files.named | {key: text for key in _NAMED if (text := _text(settings.get(key)))}
    ends: list[tuple[str, int | str]] = [(str(path), named["eos_token"])] if "eos_token" in named else []
    for name in ("generation_config.json", "config.json"):
        ids = _object(folder / name).get("eos_token_id")
        ends += [(str(folder / name), i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    added = settings.get("added_tokens_decoder") or {}
    try:
        known = {_text(token) for token in files.definition.get("added_tokens") or []}
        missing = {int(i): text for i, token in added.items() if (text := _text(token)) and text not in known}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its added_tokens_decoder is damaged ({error}): {RESAVE}.") from error
    if missing:
        files = files._replace(definition=with_added(files.definition, missing), ranks=None)
    # As in transformers 5, a tokenizer.json says itself whether a text begins with bos.
    add_bos = files.name != "tokenizer.json" and bool(settings.get("add_bos_token"))
    template = _chat_template(folder, settings)
    return files._replace(ends=ends, named=named, add_bos=add_bos, chat_template=template)


def _text(token: Any) -> str | None:
    """The text of a token, which a file gives as a string or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The folder's template, from the first file in transformers' order; of several named ones, `default`."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        found = (item.get("template") for item in template if isinstance(item, dict) and item.get("name") == "default")
        template = next(found, None)
    return template if isinstance(template, str) else None


def _merges(path: Path) -> list[str]:
    """The merges of a file in order; each line is two tokens, the first may be a version."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return ["" if i == 0 and line.startswith("#version") else line.strip() for i, line in enumerate(lines)]


def _read_pair(folder: Path) -> TokenizerFiles:
    """vocab.json and merges.txt."""
    path = folder / "vocab.json"
    vocabulary = _object(path)
    if not all(isinstance(i, int) for i in vocabulary.values()):
        raise InputError(f"{path} is not a vocabulary, an object of tokens and ids: {RESAVE}.")
    kind = _object(folder / "tokenizer_config.json").get("tokenizer_class") or _object(folder / "config.json").get(
        "model_type"
    )
    pre = _CLASSES.get(str(kind or "gpt2").removesuffix("Fast"))
    if pre is None:
        raise InputError(f"{folder} has vocab.json and merges.txt of a {kind}: give its tokenizer.json; {RESAVE}.")
    end = vocabulary.get(END_OF_TEXT, max(vocabulary.values(), default=-1) + 1)
    merges = [line for line in _merges(folder / "merges.txt") if line]
    definition = bpe_definition(vocabulary, merges, {end: END_OF_TEXT}, pre)
    return _with_settings(TokenizerFiles(pre, str(path), definition, [], _defaults(pre)), folder)


def _defaults(pre: str) -> dict[str, str]:
    """The named tokens of transformers' GPT2Tokenizer and Qwen2Tokenizer."""
    names = ("pad_token", "eos_token", "unk_token") if pre == "qwen2" else ("bos_token", "eos_token", "unk_token")
    return dict.fromkeys(names, END_OF_TEXT)


def _read_merges(path: Path) -> TokenizerFiles:
    """GPT-2's merges alone."""
    # The ids 0-255 are the bytes. Then each line joins two earlier tokens into the token with the next id.
    symbols = byte_symbols()
    vocabulary, merges = {symbol: i for i, symbol in enumerate(symbols)}, []
    for number, line in enumerate(_merges(path), start=1):
        if not line:
            continue
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right in vocabulary:
            raise InputError(f"{path}, line {number}: {line[:40]!r} is not a merge of two earlier tokens. {_KINDS}.")
        vocabulary[left + right] = len(vocabulary)
        merges.append(line)
    if not merges:
        raise InputError(f"{path} holds no merges. {_KINDS}.")
    ranks = {bytes(symbols[c] for c in token): i for token, i in vocabulary.items()}
    definition = bpe_definition(vocabulary, merges, {len(vocabulary): END_OF_TEXT}, "gpt-2")
    return TokenizerFiles("gpt2", str(path), definition, [(str(path), END_OF_TEXT)], _defaults("gpt-2"), ranks=ranks)


def _read_gguf(path: Path) -> TokenizerFiles:
    metadata = read_gguf(path).metadata
    stored = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    try:
        model, pre, tokens, kinds, merges = (stored[key] for key in ("model", "pre", "tokens", "token_type", "merges"))
    except KeyError as error:
        raise InputError(f"{path} has no 'tokenizer.ggml.{error.args[0]}', so it holds no BPE tokenizer.") from error
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        supported = f"supported is gpt2 with {', '.join(PRE_TOKENIZERS)}"
        raise InputError(
            f"{path}: tokenizer {model!r:.40} with pre-tokenizer {pre!r:.40} is not supported; {supported}."
        )
    for key, items in {"tokens": tokens, "token_type": kinds, "merges": merges}.items():
        kind = int if key == "token_type" else str
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise InputError(f"{path}: tokenizer.ggml.{key} is no list of {kind.__name__}: fetch it anew.")
    if len(tokens) != len(kinds):
        raise InputError(f"{path} has {len(tokens)} tokens and {len(kinds)} token types: fetch it anew.")
    # Token types (llama.cpp's `llama_token_type`): 1 text, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] in (1, 6)}
    added = {i: token for i, token in enumerate(tokens) if kinds[i] in (2, 3, 4)}
    ids = {
        name: stored.get(f"{key}_token_id")
        for name, key in zip(_NAMED, ("bos", "eos", "padding", "unknown"), strict=True)
    }
    named = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and i in range(len(tokens))}
    ends = [(str(path), stored[key]) for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in stored]
    add_bos = bool(stored.get("add_bos_token", pre == "llama-bpe"))  # llama.cpp's default
    definition, template = bpe_definition(vocabulary, merges, added, pre), metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return TokenizerFiles(f"gguf-{pre}", str(path), definition, ends, named, add_bos, template)
