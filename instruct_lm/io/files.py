"""Atomic writes, file hashes and display paths."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from instruct_lm.errors import InputError, RunError

CONTENTS = "contents.json"
"""The record of a folder that `new_folder` made: the names of its files."""


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file
        raise
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Delete the unfinished files in a folder of processes that are gone, killed while `replacing` wrote."""
    for file in folder.glob("*.part"):
        match = re.search(r"\.(\d+)\.part$", file.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            file.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool = False, key: str = "output_dir") -> Iterator[Path]:
    """Make a folder that is there whole or not at all.

    Yields an empty folder beside it to write into. At the end the names of its files are recorded in `CONTENTS`, all
    are synced, and it is moved to `path`; after an exception it is deleted, and what `path` held is as it was.

    Args:
        path: The folder; one that is there and empty is replaced.
        overwrite: Replace a folder of which all files are in its own record.
        key: What a message calls the path.

    Raises:
        InputError: The folder is there already, or holds something else, or cannot be made.
    """
    try:
        _check_free(path, overwrite, key)
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{key}={path} cannot be a folder ({error.strerror}). Give another.") from error
    missing = [parent for parent in path.parents if not parent.exists()]
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        _clear_leftovers(path)
        _check_free(path, overwrite, key)  # an old folder may be back
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{key}={path}: cannot make {part} ({error.strerror}). Give another folder.") from error
    try:
        yield part
        write_json({"files": sorted(file.name for file in part.iterdir())}, part / CONTENTS)
        for file in part.iterdir():
            _sync(file)
        _check_free(path, overwrite, key)  # another process may have been faster
        if path.exists():
            path.rename(old)
        part.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()


def _check_free(path: Path, overwrite: bool, key: str) -> None:
    """Raise an InputError unless `new_folder` may put its folder there."""
    if path.is_symlink():
        raise InputError(f"{key}={path} is a link to {path.readlink()}, where nothing is: delete it, or give a folder.")
    if path.exists() and not path.is_dir():
        raise InputError(f"{key}={path} is a file: give a folder that does not exist yet.")
    if path.is_mount() or Path.cwd().is_relative_to(path.absolute()):
        kind = "a mounted disk" if path.is_mount() else "the current folder, or holds it"
        raise InputError(f"{key}={path} is {kind}, which cannot be replaced: give a folder in it, {path / 'exported'}.")
    there = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    if there and not overwrite:
        raise InputError(f"{key}={path} holds {there[0]} already: give a new folder, or overwrite=true.")
    try:
        listed = json.loads((path / CONTENTS).read_text(encoding="utf-8"))["files"] if there else []
        recorded = listed if isinstance(listed, list) else []
    except (OSError, ValueError, KeyError, TypeError):
        recorded = []
    if foreign := [name for name in there if name not in recorded and (name != CONTENTS or not recorded)]:
        raise InputError(f"{key}={path} holds {foreign[0]}, which no export wrote there: give another folder.")


def _clear_leftovers(path: Path) -> None:
    """Delete what processes left that were killed while they made this folder; an old folder moves back."""
    name = re.compile(re.escape(path.name) + r"\.(\d+)\.(part|old)")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        if (match := name.fullmatch(folder.name)) and not psutil.pid_exists(int(match[1])):
            if match[2] == "old" and not path.exists():
                folder.rename(path)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Check that a disk has room for so many bytes before they are written, and say it where it has not after all.

    Raises:
        RunError: It has not; the message says how much is needed and how much there is.
    """
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    remedy = "Free some, or give an output_dir on another disk"
    wanted = f"{shown(path)} needs about {needed / 1e9:.2f} GB"
    if (free := shutil.disk_usage(folder).free) < needed:
        raise RunError(f"{wanted}, and the disk has {free / 1e9:.2f} GB left. {remedy}.")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{wanted}, and the disk has no room left ({error.strerror}). {remedy}.") from error


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
    """Write an indented JSON file atomically; NaN and infinities, which JSON has not, become null."""
    write_text(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def finite(value: Any) -> Any:
    """A JSON value with null in place of every NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes: 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_READ = {".json", ".jsonl", ".safetensors", ".gguf", ".txt", ".jinja", ".model"}
_WEIGHTS = {".safetensors", ".gguf"}


def content_hash(path: Path, weights: bool = True) -> str:
    """The sha256 of a file, or of the names and hashes of the files in a folder that are read as model or tokenizer.

    Args:
        path: A file, or a folder in the hub's layout, of which a README and the like do not count.
        weights: False leaves out the files of a folder that hold weights, as for a tokenizer.

    Raises:
        OSError: A file cannot be read.
    """
    if not path.is_dir():
        return _hashed(path, path.stat().st_size, path.stat().st_mtime_ns)
    suffixes = _READ if weights else _READ - _WEIGHTS
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    listed = [(file.name, content_hash(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@lru_cache(maxsize=1000)
def _hashed(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)  # once in a process: a GGUF file is looked for, recorded, and may be base and tokenizer


def shown(path: Path) -> Path:
    """A path as the user would type it: relative if it lies in the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
