"""Files that are whole or not there, and what to call them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move what is there into place, synced to disk, once the block is left.

    A reader of ``path`` sees the old file or the new one, never a part; an exception leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file whole or not at all."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def file_stamps(*paths: str | Path | None) -> dict[str, list[int]]:
    """Bytes and time of change (ns) of those that are local files: other stamps, other content."""
    files = [Path(path) for path in paths if path is not None and Path(path).is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def shown(path: Path) -> Path:
    """A path as the user would type it: relative where it lies in the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
