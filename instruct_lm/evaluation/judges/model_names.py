"""The names of the models that a server has."""

import json
from collections.abc import Sequence
from difflib import get_close_matches

import requests

from instruct_lm.errors import listing

SHOWN = 20  # names in a message


def list_names(reply: requests.Response) -> list[str]:
    """The names in a server's reply to `GET /models`; empty if it has no such list, or answers to any name."""
    try:
        models = json.loads(reply.content)["data"]
        names = [model["id"] for model in models if isinstance(model["id"], str)]
        any_name = len(models) == 1 and models[0].get("owned_by") == "llamacpp"  # llama.cpp's server with one model
        return [] if any_name else names
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def find_name(model: str, names: Sequence[str]) -> str | None:
    """The name that means a model: its own, with Ollama's `:latest`, or without a router's suffix such as `:free`."""
    return next((name for name in (model, f"{model}:latest", model.rpartition(":")[0]) if name in names), None)


def nearest_first(model: str, names: Sequence[str]) -> str:
    """A sentence or two that name a server's models, those most like `model` first.

    Example:
        >>> nearest_first("gpt4o", ["whisper-1", "gpt-4o"])
        'Did you mean gpt-4o? It has gpt-4o, whisper-1.'
    """
    lower = {name.lower(): name for name in sorted(names)}
    near = [lower[name] for name in get_close_matches(model.lower(), lower, n=3, cutoff=0.5)]
    ordered = near + [name for name in sorted(names) if name not in near]
    listed = f"It has {', '.join(listing(ordered, SHOWN))}."
    return f"Did you mean {near[0]}? {listed}" if near else listed
