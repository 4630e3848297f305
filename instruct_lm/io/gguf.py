"""GGUF files: the header (metadata and tensor positions) and the dequantised values of a tensor.

Reading a header takes 0.1 s. `gguf.GGUFReader` takes 3.5 s with a vocabulary of 49,152, because it creates several
arrays per string.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instruct_lm.errors import InputError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file.

    Attributes:
        shape: In torch's order, (…, rows, columns); GGUF stores the reverse.
        kind: Value of its `gguf.GGMLQuantizationType`.
        start: Position of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Key → value, such as `general.architecture` → `llama`.
        tensors: Name → shape, type and position.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def check(self) -> None:
        """Look whether all tensors can be read, before any is.

        Raises:
            InputError: The `gguf` package does not dequantise a type, the file ends before its last tensor, or its
                tensors overlap, which lets a small file ask for any amount of memory.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        size, names = self.path.stat().st_size, {kind.value: kind.name for kind in GGMLQuantizationType}
        readable = set()
        for kind in map(GGMLQuantizationType, {tensor.kind for tensor in self.tensors.values()} & names.keys()):
            with contextlib.suppress(NotImplementedError):
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
                readable.add(kind.value)
        stored_bytes = 0
        for name, tensor in self.tensors.items():
            if tensor.kind not in readable:
                stored = names.get(tensor.kind, f"number {tensor.kind}")
                remedy = "Take a file of this base in q8_0, q4_0, q4_1, q4_K, q6_K, f16, bf16 or f32"
                raise InputError(f"{self.path}: tensor {name} is of type {stored}, which is not read here. {remedy}.")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
            n_bytes = math.prod(tensor.shape) // block * block_bytes
            if (end := tensor.start + n_bytes) > size:
                raise InputError(f"{self.path}: tensor {name} ends at byte {end}, the file at {size}. Fetch it again.")
            stored_bytes += n_bytes
        if stored_bytes > size:
            raise InputError(f"{self.path}: its tensors have {stored_bytes} bytes, the file {size}. Fetch it again.")

    def read(self, name: str) -> np.ndarray:
        """Read a tensor, dequantised to a float32 array of its shape.

        Raises:
            InputError: The `gguf` package does not know its type, or the file ends too early.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        try:
            if not tensor.shape:
                raise ValueError("it has no dimensions")
            kind = GGMLQuantizationType(tensor.kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if tensor.start + math.prod(tensor.shape) // block * block_bytes > self.path.stat().st_size:
                raise ValueError("the file ends before it")
            rows = math.prod(tensor.shape[:-1])
            merged = math.gcd(rows, 128)  # `dequantize` takes 16 rows at a time; merging rows makes it 5 times as fast
            shape = (rows // merged, merged * tensor.shape[-1] // block * block_bytes)
            stored = np.asarray(np.memmap(self.path, np.uint8, "r", tensor.start, shape))
            with np.errstate(all="ignore"):  # of damaged scales; whoever uses the numbers looks at them
                values = dequantize(stored, kind)
            return np.require(values.reshape(tensor.shape), np.float32, ["C", "W"])
        except (ValueError, KeyError, OverflowError, NotImplementedError, OSError) as error:
            raise InputError(f"{self.path}: tensor {name} cannot be read: {error}") from error


def read_gguf(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        InputError: The file is missing, is not GGUF version 2 or 3, or ends too early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header(path)
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not a complete GGUF file (version 2 or 3): {error}. Fetch it again.") from error
    except OSError as error:
        raise InputError(f"GGUF file {path}: {error.strerror or error}.") from error


class _Reader:
    """A position in the file; each method reads one item there and moves past it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def header(self, path: Path) -> GGUFHeader:
        magic, version, n_tensors, n_values = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        metadata = {self.string(): self.value(*self.numbers("I")) for _ in range(n_values)}
        stored = [
            (self.string(), self.numbers(f"{self.numbers('I')[0]}Q"), *self.numbers("IQ")) for _ in range(n_tensors)
        ]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = {name: StoredTensor(shape[::-1], kind, start + offset) for name, shape, kind, offset in stored}
        return GGUFHeader(path, metadata, tensors)

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        self.position += length
        if self.position > len(self.data):
            raise ValueError(f"a string ends at byte {self.position}, the file at {len(self.data)}")
        return self.data[self.position - length : self.position].decode()

    def strings(self, count: int) -> list[str]:
        """As `string` for each, without its calls: vocabulary and merges are 100,000 of them."""
        data, position, found = self.data, self.position, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            found.append(data[start:position])
        if position > len(data):
            raise ValueError(f"a string ends at byte {position}, the file at {len(data)}")
        self.position = position
        return [item.decode() for item in found]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}")
        item, count = self.numbers("IQ")
        if item in _NUMBERS:
            return list(self.numbers(f"{count}{_NUMBERS[item]}"))
        if item == _STRING:
            return self.strings(count)
        return [self.value(item) for _ in range(count)]
