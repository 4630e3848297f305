"""Atomic writes, file hashes and display paths."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError


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


@contextmanager
def new_folder(path: Path, overwrite: bool = False, own: Sequence[str] = ()) -> Iterator[Path]:
    """Make a folder that is there whole or not at all.

    Yields an empty folder beside it to write into. At the end its files are synced and it is moved to `path`; after an
    exception it is deleted, and what `path` held is as it was.

    Args:
        path: The folder; one that is there and empty is replaced.
        overwrite: Replace a folder whose files are all of `own`.
        own: Patterns of the names that the caller writes.

    Raises:
        InputError: The folder is there already, or holds something else, or cannot be made.
    """
    there = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in there if not any(fnmatch(name, pattern) for pattern in own)]
    if path.exists() and not path.is_dir():
        raise InputError(f"output_dir={path} is a file: give a folder that does not exist yet.")
    if foreign and overwrite:
        raise InputError(f"output_dir={path} holds {foreign[0]}, which no export has written: give another folder.")
    if there and not overwrite:
        raise InputError(f"output_dir={path} holds {there[0]} already: give a new folder, or overwrite=true.")
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"output_dir={path}: cannot make {part} ({error.strerror}). Give another folder.") from error
    try:
        yield part
        for file in part.iterdir():
            _sync(file)
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)


def move_into_place(part: Path, path: Path) -> None:
    """Sync a complete file to the disk, then rename it to `path`."""
    _sync(part)
    part.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


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
