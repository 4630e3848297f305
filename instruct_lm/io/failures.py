"""Failures of the machine in words: a full or failing disk, no memory, a device that is gone."""

import errno
import os
from collections.abc import Iterator

_SYSTEM = {
    errno.ENOSPC: "No room is left on the disk. Free some, or give an output_dir on another disk.",
    errno.EDQUOT: "The disk quota is used up. Free some of it, or give an output_dir on another disk.",
    errno.EFBIG: "The file would be larger than this disk or this user may have. Give an output_dir on another disk.",
    errno.EROFS: "The disk is read-only. Give an output_dir, or a cache_dir, on another.",
    errno.EACCES: "Permission denied. Give another path, or have its permissions changed.",
    errno.EPERM: "Not permitted. Give another path, or have its permissions changed.",
    errno.EMFILE: "Too many files are open in this process. Raise the limit (ulimit -n), or lower data.num_workers.",
    errno.ENFILE: "Too many files are open on this machine. Close some programs.",
    errno.EIO: "The disk failed (input/output error). Look at its health before you go on.",
    errno.ESTALE: "A network disk lost the file (stale handle). Look whether it is mounted.",
    errno.ENAMETOOLONG: "The name is too long for this disk. Give a shorter one.",
    errno.ENOENT: "No such file or folder; it may have been moved or deleted meanwhile. Put it back.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Give another path.",
    errno.EISDIR: "It is a folder, not a file. Give another path.",
    errno.EPIPE: "The program that read this output has ended.",
    errno.ENOMEM: "The system has no memory left. Close some programs, or lower data.batch_size.",
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_SMALLER = (
    "Lower data.batch_size (with trainer.accumulate, for the same result) or generation.batch_size, set "
    "trainer.activation_checkpointing=true, or take a smaller model"
)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc")  # of torch's errors
_NO_DEVICE = ("CUDA error", "CUDA driver error", "NCCL error", "cuDNN error", "device lost")


def outside_failure(error: BaseException) -> str | None:
    """What outside the program made it fail, and the remedy; None for anything else, which may be a bug.

    Libraries raise errors of their own about a full disk. So the errors that `error` comes from are looked at, too.

    Example:
        >>> outside_failure(OSError(errno.EROFS, "Read-only file system", "last.ckpt"))
        'last.ckpt: The disk is read-only. Give an output_dir, or a cache_dir, on another.'
    """
    if isinstance(error, OSError):
        return _system_error(error)
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _DISK:
            return _system_error(each)
    text, kind = str(error), type(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in _NO_MEMORY)):
        return f"No memory is left ({_first_line(text) or 'MemoryError'}). {_SMALLER}."
    if not kind.__module__.startswith("torch") and not isinstance(error, RuntimeError):
        return None
    if kind.__name__ == "OutOfMemoryError" or "out of memory" in text:
        return f"The device has no memory left ({_first_line(text)}). {_SMALLER}."
    if kind.__name__ == "AcceleratorError" or any(name in text for name in _NO_DEVICE):
        return f"The device failed ({_first_line(text)}). Look at it (nvidia-smi), or give device=cpu."
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save, whose file has not said why
        return "A file could not be written, most likely for want of room on the disk."
    return None


def _system_error(error: OSError) -> str | None:
    """An operating system's error in words; None where it has no number, as errors of libraries."""
    if error.errno is None:
        return None
    place = ": ".join(str(each) for each in (error.filename, error.filename2) if each is not None)
    words = _SYSTEM.get(error.errno, f"{error.strerror or os.strerror(error.errno)}.")
    return f"{place}: {words}" if place else words


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it comes from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".")[:300] for line in text.splitlines() if line.strip()), "")
