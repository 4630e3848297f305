"""What the files of a base model say of its sizes, and whether a configuration agrees with it."""

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from instruct_lm.config import ModelConfig
from instruct_lm.errors import InputError
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.gguf_config import read_gguf_config
from instruct_lm.model.gpt import GPTConfig
from instruct_lm.model.hub_config import CONFIG_NAME, read_hub_config
from instruct_lm.model.weight_files import open_tensors

# Fields of `GPTConfig` that may be None → the properties that have their values.
_EFFECTIVE = {"n_kv_head": "kv_heads", "head_dim": "head_width", "n_inner": "inner"}


def describe(path: Path) -> GPTConfig | None:
    """The sizes and choices of a base, from the GGUF file or from the `config.json` in or beside ``path``.

    Returns:
        The configuration; None if there is no such file, as with a `model.safetensors` alone.

    Raises:
        InputError: As for `read_hub_config` and `read_gguf_config`.
    """
    if path.suffix == ".gguf":
        return read_gguf_config(read_gguf(path))
    config = config_file(path)
    return read_hub_config(config) if config.is_file() else None


def config_file(path: Path) -> Path:
    """Where the `config.json` of a folder or of a file of weights is, if there is one."""
    return (path if path.is_dir() else path.parent) / CONFIG_NAME


def check_agreement(config: GPTConfig, path: Path) -> None:
    """Compare a configuration with what the base's files say, if they do.

    A model with rotary positions may have a smaller ``block_size``; ``dropout`` is free.

    Raises:
        InputError: They differ; the message lists keys and both values. Or as for `describe`.
    """
    if (base := describe(path)) is None:
        return
    differing = []
    for name in (field.name for field in fields(config) if field.name != "dropout"):
        given, found = (getattr(each, _EFFECTIVE.get(name, name)) for each in (config, base))
        shorter = name == "block_size" and base.position == "rotary" and given <= found
        if not shorter and not _same(given, found):
            differing.append(f"model.{name}={_shown(given)}, there {_shown(found)}")
    if differing:
        place = path if path.suffix == ".gguf" else config_file(path)
        remedy = "Leave them out with model=auto, which takes them from there, or give the weights of such a model."
        raise InputError(f"{place} describes another model: {'; '.join(differing)}. {remedy}")


def _same(a: Any, b: Any) -> bool:
    """Equal, numbers to the precision of a float32, in which GGUF has them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


def _shown(value: Any) -> str:
    return f"{value[:3]}…" if isinstance(value, tuple) else f"{value}"


def complete(settings: ModelConfig, path: Path) -> ModelConfig:
    """Fill what a configuration leaves to the base's own files: sizes, tokenizer and name.

    Args:
        settings: With None for what is left open, and ``weights`` that were fetched to ``path``.
        path: A file or folder.

    Raises:
        InputError: The base does not describe itself, or not as what ``settings`` state. Or as for `open_tensors`.
    """
    open_tensors(path)  # weights that are missing or pickled are refused before data and tokenizer take their time
    if (base := describe(path)) is None:
        remedy = f"give the folder or repository that has {CONFIG_NAME}, or a GGUF file"
        raise InputError(f"model.weights={settings.weights}: no {CONFIG_NAME} there tells the model's sizes: {remedy}.")
    open_sizes = {field.name: getattr(base, field.name) for field in fields(base) if field.name != "dropout"}
    open_sizes["rope_factors"] = list(base.rope_factors) if base.rope_factors else None
    values = {"name": source_name(str(settings.weights)), "tokenizer": _home(str(settings.weights)), **open_sizes}
    update = {name: value for name, value in values.items() if getattr(settings, name) is None}
    completed = settings.model_copy(update=update)
    check_agreement(GPTConfig.of(completed), path)
    return completed


def _home(source: str) -> str:
    """Where a base's tokenizer is: a GGUF file itself, else the folder or repository of the weights."""
    return re.sub(r"[/\\][^/\\]+(\.safetensors|\.index\.json)$", "", source)


def source_name(source: str) -> str:
    """The name of a base: of its GGUF file without the suffix, else of its folder or repository.

    Example:
        >>> source_name("hf:Qwen/Qwen3-0.6B@main"), source_name("bases/tuned/model.safetensors")
        ('Qwen3-0.6B', 'tuned')
    """
    if (repository := re.match(r"hf:[^/]+/([^/@]+)", source)) and not source.endswith(".gguf"):
        return repository[1]
    return re.split(r"[/\\]", _home(source).rstrip("/\\"))[-1].removesuffix(".gguf") or source
