"""The architectures that are computed: each is a set of choices of `GPTConfig`."""

from typing import Any

from pydantic import ValidationError

from instruct_lm.errors import InputError
from instruct_lm.model.gpt import GPTConfig

_GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
_LLAMA = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False}
_NEITHER = {"qkv_bias": False, "qk_norm": False}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | _NEITHER,
    "llama": _LLAMA | _NEITHER,
    "qwen2": _LLAMA | _NEITHER | {"qkv_bias": True},
    "qwen3": _LLAMA | _NEITHER | {"qk_norm": True},
}
"""Name, as in `config.json` (``model_type``) and in GGUF (``general.architecture``) → choices."""


def architecture_of(config: GPTConfig) -> str:
    """The name of a configuration's architecture.

    Raises:
        InputError: The configuration mixes choices of several, so that no checkpoint can hold it.
    """
    for name, choices in ARCHITECTURES.items():
        gpt2_heads = config.kv_heads * config.head_width == config.n_embd or name != "gpt2"
        if gpt2_heads and all(getattr(config, field) == value for field, value in choices.items()):
            return name
    names = ("norm", "position", "activation", "bias", "qkv_bias", "qk_norm", "n_kv_head", "head_dim")
    chosen = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    raise InputError(f"model.{chosen}: together these are none of {', '.join(ARCHITECTURES)}. Take those of one.")


def check_supported(name: object, key: str, place: str) -> str:
    """The name itself if it is one of `ARCHITECTURES`.

    Raises:
        InputError: It is not; the message begins with ``place`` and names ``key``.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return name
    remedy = f"take a base of {', '.join(ARCHITECTURES)}"
    raise InputError(f"{place}: {key}={name} is an architecture that is not computed here: {remedy}.")


def make_gpt_config(architecture: str, sizes: dict[str, Any], place: str, keys: dict[str, str]) -> GPTConfig:
    """The configuration of an architecture with these sizes.

    Args:
        architecture: One of `ARCHITECTURES`.
        sizes: Field of `GPTConfig` → value, of any type.
        place: The file that they come from.
        keys: Field → its name there.

    Raises:
        InputError: A size is out of range, is no number, or does not divide; the message names keys and values.
    """
    try:
        return GPTConfig(**ARCHITECTURES[architecture], **sizes)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = str(fault["loc"][0]) if fault["loc"] else ""  # none: sizes that do not go together
            place_of = f"{keys.get(name, name)}={sizes[name]!r}: "[:120] if name in sizes else ""
            faults.append(place_of + fault["msg"].removeprefix("Value error, ").replace("Input should", "must"))
        remedy = "Fetch the file anew, or take another base."
        raise InputError(f"{place} describes no model that can be computed: {'; '.join(faults)}. {remedy}") from error
