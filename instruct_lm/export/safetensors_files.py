"""Safetensors files, written a tensor at a time: the memory of the largest tensor is enough.

The format (https://huggingface.co/docs/safetensors): the length of the header in 8 bytes, little-endian; the header, a
JSON object of name → dtype, shape and place; the tensors' bytes.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from instruct_lm.errors import InputError
from instruct_lm.io.files import replacing, write_json
from instruct_lm.model.pretrained import Piece
from instruct_lm.model.weight_files import INDEX, SINGLE

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Name in `dtype=` → dtype; upper case, the names are the format's own."""

SHARD_BYTES = 5 * 10**9
"""Largest file, as transformers 4 writes them."""


def write_safetensors(
    tensors: Iterable[Piece], folder: Path, dtype: str = "f32", shard_bytes: int = SHARD_BYTES, name: str = SINGLE
) -> None:
    """Write one file, or shards with an index if they would be too large for one.

    Args:
        tensors: What to write; all in one dtype.
        folder: Where to.
        dtype: One of `DTYPES`.
        shard_bytes: Most bytes of tensors in a file that holds more than one.
        name: Of the file; shards are named after it, `model-00001-of-00003.safetensors`.

    Raises:
        InputError: A number is not finite, or too large for the dtype; the message names the tensor.
    """
    shards = _shards(list(tensors), DTYPES[dtype].itemsize, shard_bytes)
    stem, total = name.removesuffix(".safetensors"), sum(_size(tensor, dtype) for shard in shards for tensor in shard)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with tqdm(desc="writing", total=total, unit="B", unit_scale=True) as bar:
        for shard, file in zip(shards, names if len(shards) > 1 else [name], strict=True):
            _write(shard, folder / file, dtype, bar)
    if len(shards) > 1:
        places = {tensor.name: file for shard, file in zip(shards, names, strict=True) for tensor in shard}
        write_json({"metadata": {"total_size": total}, "weight_map": places}, folder / INDEX)


def _size(tensor: Piece, dtype: str) -> int:
    return math.prod(tensor.shape) * DTYPES[dtype].itemsize


def _shards(tensors: Sequence[Piece], itemsize: int, limit: int) -> list[list[Piece]]:
    """The tensors in order; a new shard begins where the next tensor would exceed the limit."""
    shards: list[list[Piece]] = [[]]
    held = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    return shards


def _write(tensors: Sequence[Piece], path: Path, dtype: str, bar: tqdm) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _size(tensor, dtype)
        header[tensor.name] = {"dtype": dtype.upper(), "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = converted(tensor.values, dtype, tensor.name).contiguous()
            file.write(values.view(torch.uint8).numpy())  # type: ignore[arg-type]  # any buffer will do
            bar.update(_size(tensor, dtype))


def converted(values: Tensor, dtype: str, name: str) -> Tensor:
    """A tensor in another dtype.

    Raises:
        InputError: A number is not finite, or too large for the dtype.
    """
    made = values.detach().to(DTYPES[dtype])
    if _finite(made):
        return made
    if _finite(values):
        largest, most = float(values.abs().max()), torch.finfo(DTYPES[dtype]).max
        fault = f"holds {largest:g}, beyond the {most:g} of dtype={dtype}"
        raise InputError(f"{name} {fault}: use dtype=bf16, or f32.")
    remedy = "the run has diverged. Export its other checkpoint, or another run"
    raise InputError(f"{name} holds numbers that are not finite (NaN or infinity): {remedy}.")


def _finite(values: Tensor) -> bool:
    return values.numel() == 0 or all(math.isfinite(float(end)) for end in values.aminmax())
