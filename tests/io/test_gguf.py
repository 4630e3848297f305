"""Headers of GGUF files that promise what the file does not hold, or hold what no writer writes."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from instruct_lm.errors import InputError
from instruct_lm.io.gguf import GGUFHeader, read_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: list[int], offset: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def write(path: Path, values: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"") -> Path:  # type: ignore[assignment]
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)) + b"".join((*values, *tensors))
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def header(tmp_path: Path, *tensors: bytes, data: bytes = bytes(64)) -> GGUFHeader:
    return read_gguf(write(tmp_path / "x.gguf", tensors=list(tensors), data=data))


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    """200 tensors of 4 KB each in a file of 20 KB would take 800 KB, and a thousand times as many any memory."""
    found = header(tmp_path, *(tensor(f"t{i}", [1024], 0) for i in range(200)), data=bytes(4096))
    with pytest.raises(InputError, match=r"its tensors have 819200 bytes, the file 1\d{4}\. Fetch it again"):
        found.check()
    header(tmp_path, tensor("a", [8], 0), tensor("b", [8], 32)).check()


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_tensors_are_read_where_another_writer_put_them(tmp_path: Path, alignment: int | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    shapes = [(5,), (3, 5), (128, 3), (200, 2), (3, 43, 2)]
    values = {f"t{i}": np.random.default_rng(i).random(shape, np.float32) for i, shape in enumerate(shapes)}
    for name, tensor in values.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x.gguf")
    found.check()
    for name, tensor in values.items():
        np.testing.assert_array_equal(found.read(name), tensor)


@pytest.mark.parametrize("shape", [[], [2**40], [2**40, 2**40], [2**62, 4], [17]])
@pytest.mark.parametrize("kind", [0, 8])
def test_a_tensor_that_cannot_be_there_is_refused_before_memory_is_taken(
    tmp_path: Path, shape: list[int], kind: int
) -> None:
    with pytest.raises(InputError, match="tensor t cannot be read: "):
        header(tmp_path, tensor("t", shape, 0, kind)).read("t")


@pytest.mark.parametrize("offset", [2**31, 2**63, 2**64 - 1])
def test_a_tensor_that_lies_beyond_the_file_is_refused(tmp_path: Path, offset: int) -> None:
    with pytest.raises(InputError, match="tensor t cannot be read: "):
        header(tmp_path, tensor("t", [8], offset)).read("t")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (text("k") + struct.pack("<I", 13), "a value is of type 13"),
        (text("k") + struct.pack("<IQ", 8, 2**63), "a string ends at byte"),
        (text("k") + struct.pack("<IIQ", 9, 4, 2**61), "not a complete GGUF file"),
        (text("k") + struct.pack("<IIQ", 9, 8, 2**61), "not a complete GGUF file"),
        (text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000, "recursion"),
        (struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I?", 7, True), "can't decode"),
    ],
)
def test_metadata_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path, value: bytes, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        read_gguf(write(tmp_path / "x.gguf", values=[value]))


def test_a_folder_or_nothing_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for name, why in (("folder.gguf", "Is a directory"), ("none.gguf", "No such file")):
        with pytest.raises(InputError, match=f"{name}: {why}"):
            read_gguf(tmp_path / name)
