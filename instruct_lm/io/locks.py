"""One owner for each folder: a second process that would write there is refused, and told who has it.

The lock is the operating system's (flock; on Windows its like), which ends with the process that holds it, however that
ends. On a network file system without flock, filelock uses a marker file instead; where that cannot tell that its owner
is dead, delete the file that the message names.
"""

import errno
import itertools
import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from instruct_lm.errors import InputError, RunError
from instruct_lm.io.files import clear_parts, shown
from instruct_lm.io.run_files import CONFIG_FILE

LOCK, OWNER = ".lock", ".owner.json"
"""In an owned folder: the locked file, and who has locked it, in words for a message."""

# Environment variable: JSON, folder asked for → folder owned by this process or the one that started it.
_INHERITED = "INSTRUCT_LM_OWNS"
_held: dict[Path, BaseFileLock] = {}


def own(folder: Path) -> None:
    """Make a folder if necessary, and keep every other process from owning it until this one ends, or `release`.

    What this process owns already, or the process that started it (as a sweep does its jobs), is left as it is.

    Raises:
        InputError: Another process owns it.
        RunError: The file system has no locks of any kind.
        OSError: It cannot be made or written.
    """
    folder = folder.expanduser().resolve()
    if folder in _held or str(folder) in _owned():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{shown(folder)} is in use by {_owner(folder)}. Wait until it ends, or stop it.") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        remedy = "Give an output_dir on a local disk, or mount this one with locks"
        raise RunError(f"{folder / LOCK} cannot be locked ({error}), so two runs could mix there. {remedy}.") from error
    _held[folder] = lock
    _remember(str(folder), str(folder))
    clear_parts(folder)  # nobody else writes here now
    clear_parts(folder / CONFIG_FILE.parent)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = {"pid": os.getpid(), "host": platform.node(), "command": command}
    with suppress(OSError):  # it is for a message alone
        (folder / OWNER).write_text(json.dumps(owner, ensure_ascii=False), encoding="utf-8", errors="replace")


def claim(folder: str) -> str:
    """Make and own a folder that nobody has: `folder`, or else `folder_2` and so on, where others begin with it too.

    Asked again, also by a process that this one starts, it gives the same folder.
    """
    if folder in (owned := _owned()):
        return owned[folder]
    for n in itertools.count(1):
        name = folder if n == 1 else f"{folder}_{n}"
        with suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            break
    own(Path(name))
    _remember(folder, name)
    return name


def descriptors() -> tuple[int, ...]:
    """Of the locked files: a process that inherits them keeps the folders locked until it has ended too.

    Else they would be free once the process that owns them is killed, while those that it has started still write.
    """
    files = (lock._context.lock_file_fd for lock in _held.values())  # filelock has no public name for it
    return tuple(file for file in files if file is not None) if os.name == "posix" else ()


def release() -> None:
    """Give up all that this process owns."""
    for folder, lock in _held.items():
        (folder / OWNER).unlink(missing_ok=True)
        lock.release(force=True)
    if _held:
        os.environ.pop(_INHERITED, None)
    _held.clear()


def _owned() -> dict[str, str]:
    return dict(json.loads(os.environ.get(_INHERITED, "{}")))


def _remember(asked: str, owned: str) -> None:
    os.environ[_INHERITED] = json.dumps({**_owned(), asked: owned})


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {int(owner['pid'])} on {owner['host']} ({owner['command']!s:.300})"
    except (OSError, ValueError, TypeError, LookupError):  # it has only just begun
        return "another process"
