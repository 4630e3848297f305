"""Files that are whole or not there."""

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
