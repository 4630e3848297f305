"""Atomic writes, file hashes and display paths."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: readers see the old content or the new, never a part.

    Yields a path in the same folder to write to. At the end that file is synced and moved to `path`; after an exception
    it is deleted and `path` stays as it was. The folder is created if necessary.

    Example:
        >>> with replacing(Path("model.ckpt")) as part:
        ...     torch.save(weights, part)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def move_into_place(part: Path, path: Path) -> None:
    """Sync a complete file to the disk, then rename it to `path`."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 file atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(value: Any, path: Path) -> None:
    """Write an indented JSON file atomically."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes: 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_stamps(*paths: str | Path | None) -> dict[str, list[int]]:
    """Path → [size in bytes, modification time in ns] of the local files among `paths`; detects changed content."""
    files = [Path(path) for path in paths if path is not None and Path(path).is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def shown(path: Path) -> Path:
    """A path as the user would type it: relative if it lies in the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
