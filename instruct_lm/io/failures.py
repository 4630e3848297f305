"""Failures of the machine in words: a full or failing disk, no memory, a device that is gone."""

import errno
from collections.abc import Iterator

_DISK = {
    errno.ENOSPC: "there is no room left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the disk or a limit allows",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the network disk is gone",
    errno.ENODEV: "the disk is gone",
}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")  # of torch's errors
_NO_DEVICE = ("CUDA error", "CUDA driver error", "device lost")


def outside_failure(error: BaseException) -> str | None:
    """What outside the program made it fail; None for anything else, which may be a bug.

    Libraries raise errors of their own about a full disk or missing memory. So the errors that `error` comes from are
    looked at, too.

    Example:
        >>> outside_failure(OSError(errno.ENOSPC, "No space left on device", "last.ckpt"))
        'there is no room left on the disk (last.ckpt)'
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _DISK:
            where = f" ({each.filename})" if each.filename else ""
            return f"{_DISK[each.errno]}{where}"
        text = str(each)
        if isinstance(each, MemoryError) or (isinstance(each, RuntimeError) and any(w in text for w in _NO_MEMORY)):
            return "there is not enough memory"
        if isinstance(each, RuntimeError) and any(words in text for words in _NO_DEVICE):
            return f"the device fails ({text.splitlines()[0]})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it comes from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
