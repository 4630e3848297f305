"""The files of a checkpoint: one safetensors file, shards with an index, or GGUF. Tensors are read one at a time."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from instruct_lm.errors import InputError, listing
from instruct_lm.io.gguf import read_gguf

SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
_FORMS = f"give a folder with {SINGLE} or with shards and {INDEX}, such a file, or a .gguf file"


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: In torch's order.
        read: Reads it, dequantised if it is quantised.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor | np.ndarray]


def open_tensors(path: Path) -> dict[str, Stored]:
    """Name → tensor, for all tensors of a checkpoint; none is read yet.

    Args:
        path: A ``.safetensors`` or ``.gguf`` file, the index of shards, or a folder with one of the first or the last.

    Raises:
        InputError: A file or a tensor that the index names is missing, a file is broken, or the weights are pickled.
    """
    if path.suffix == ".gguf":
        header = read_gguf(path)
        return {name: Stored(tensor.shape, partial(header.read, name)) for name, tensor in header.tensors.items()}
    index = path / INDEX if path.is_dir() else path
    if path.is_dir() and (path / SINGLE).is_file():
        return _open_safetensors(path / SINGLE)
    if index.name.endswith(".index.json") and index.is_file():
        return _open_shards(index)
    if path.suffix == SUFFIX:
        if re.search(r"-\d+-of-\d+\.safetensors$", path.name):
            raise InputError(f"{path} is one of several shards: give its folder, {path.parent}.")
        return _open_safetensors(path)
    raise InputError(_no_weights(path))


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            return {n: Stored(tuple(stored.get_slice(n).get_shape()), partial(_read, file, n)) for n in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} holds no weights that can be read ({error}): fetch it anew, or {_FORMS}.") from error


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as stored:  # opened for each tensor, so that its pages are released
        return stored.get_tensor(name)


def _open_shards(index: Path) -> dict[str, Stored]:
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(places.values()))
        outside = [name for name in names if "\\" in name or Path(name).name != name or not name.endswith(SUFFIX)]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{index} is no index of shards ({error!r}): fetch it anew.") from error
    if not names:
        raise InputError(f"{index} names no files: fetch it anew.")
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is no .safetensors file beside it: correct the index.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        lines = [f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names:"]
        raise InputError("\n".join([*lines, *listing(missing), "Fetch them too, into the same folder."]))
    shards = {name: _open_safetensors(index.parent / name) for name in names}
    if lost := [f"{tensor}: not in {place}" for tensor, place in places.items() if tensor not in shards[place]]:
        lines = [f"{index} names {len(lost)} tensors that are not in their files:", *listing(lost)]
        raise InputError("\n".join([*lines, "Fetch index and files anew, of one revision."]))
    return {tensor: stored for shard in shards.values() for tensor, stored in shard.items()}


def _no_weights(path: Path) -> str:
    """What a path without readable weights has instead, and the remedy."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if pickled := [file for file in files if file.suffix in _PICKLED and not file.name.startswith("training_args")]:
        return (
            f"{pickled[0]}: pickled weights are not read, since a pickle may run any program. Convert them once: in "
            "transformers AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), or "
            f"safetensors.torch.save_file(torch.load(FILE, weights_only=True), '{SINGLE}'); for a run of train.py "
            "python -m instruct_lm.export run=RUN output_dir=NEW_FOLDER."
        )
    if any(file.name == "adapter_config.json" for file in files):
        return f"{path} holds an adapter alone: merge it into its base with peft (merge_and_unload) and save that."
    if ggufs := [file for file in files if file.suffix == ".gguf"]:
        return f"{path} holds no weights that can be read, but GGUF files: give one of them, such as {ggufs[0]}."
    return f"{path} holds no weights that can be read: {_FORMS}."
