"""Files that are whole or not there, and what to call them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text beside its place, sync it and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
