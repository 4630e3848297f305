"""Verification of a file's sha256 and kind, with its hash recorded beside it.

A file in the cache is hashed once in each process that uses it, which takes a second for a gigabyte or two: bits flip
on disks, and a weight that is wrong by one of them is still a number.
"""

import contextlib
import json
from pathlib import Path

from instruct_lm.errors import InputError
from instruct_lm.io.files import content_hash, move_into_place, sha256_of

_GZIP = b"\x1f\x8b"
_LARGE = 50_000_000  # bytes; JSON takes ten times as much memory


def beside(path: Path, suffix: str) -> Path:
    """The path with `suffix` appended to its name."""
    return path.with_name(path.name + suffix)


def place(part: Path, path: Path, sha256: str | None) -> None:
    """Verify a finished `.part` file and move it into place.

    Without an expected sha256, the file must fit the suffix of its name.

    Raises:
        InputError: It is not the expected file, and is deleted; the message says why, the caller adds place and remedy.
    """
    digest = sha256_of(part)
    try:
        if sha256 and digest != sha256:
            raise InputError(f"its sha256 is {digest} instead of {sha256}")
        if not sha256:
            _check_kind(part, path.name)
    except InputError:
        part.unlink()
        raise
    beside(path, ".sha256").unlink(missing_ok=True)
    move_into_place(part, path)
    beside(path, ".part.etag").unlink(missing_ok=True)
    _record_hash(path, digest)


def in_place(path: Path, sha256: str | None) -> bool:
    """Whether a file exists with this hash, and is not damaged."""
    return path.is_file() and not is_damaged(path) and (not sha256 or content_hash(path) == sha256)


def is_damaged(path: Path) -> bool:
    """Whether a file's content is not what was recorded, though nobody wrote to it since.

    A file without a record, or one that somebody has put in its place since, is recorded as it is now.
    """
    now = _state(path)
    digest, recorded = content_hash(path), ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        recorded, _, state = beside(path, ".sha256").read_text().strip().partition(" ")
        recorded = recorded if state == now else ""
    if not recorded:
        _record_hash(path, digest)
    return recorded not in ("", digest)


def _record_hash(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):  # a read-only cache
        beside(path, ".sha256").write_text(f"{digest} {_state(path)}\n")


def _state(path: Path) -> str:
    """Size and modification time; if they differ, a recorded hash is out of date."""
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _check_kind(path: Path, name: str) -> None:
    """Raise InputError if a file cannot be of the kind that its name says, such as an error page in its place."""
    suffix, size = Path(name).suffix.lower(), path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(max(0, size - 4))
        tail = file.read()
    if not is_page(name) and head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputError("it is a web page")
    if suffix == ".gguf" and not head.startswith(b"GGUF"):
        raise InputError("it does not begin with GGUF")
    # safetensors: u64 length of the header, then the header, a JSON object
    if suffix == ".safetensors" and (head[8:9] != b"{" or int.from_bytes(head[:8], "little") > size - 8):
        raise InputError("it has no safetensors header")
    if suffix == ".parquet" and not (head.startswith(b"PAR1") and tail == b"PAR1"):
        raise InputError("it does not begin and end with PAR1")
    if suffix == ".gz" and not head.startswith(_GZIP):
        raise InputError("it does not begin as gzip does")
    if suffix == ".json" and not head.startswith(_GZIP):
        _check_json(path)


def _check_json(path: Path) -> None:
    """JSON, or JSON lines, which many data sets name .json. A large file is left to its reader, which streams it."""
    if path.stat().st_size > _LARGE:
        return
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        with contextlib.suppress(ValueError, RecursionError), path.open("rb") as file:
            if isinstance(json.loads(file.readline()), dict):
                return
        raise InputError(f"it is not JSON ({error})") from error


def is_page(name: str) -> bool:
    """Whether a file of this name may be a web page."""
    return name.lower().endswith((".html", ".htm"))
