"""Exceptions that the commands print as a message alone, without a traceback; and what may stand in a message."""

import logging
import re
from collections.abc import Sequence
from typing import Any

_KEPT = "\n\t\xa0\u200c\u200d\u3000"  # not printable to Python, but harmless: blanks, and joiners that scripts need
_LINE = 4000  # characters of a message's line; the longest command that is printed to be pasted has 900
_LOGIN = re.compile(r"(?<=://)[^\s/?#]*@")
# Parameters named token, api_key, access-token, X-Amz-Signature, Key-Pair-Id and the like; keyword is none.
_WORD = "(?:access|auth|api|refresh|id|secret|private)?(?:token|key|secret|sig|signature|pass|password|passwd|pwd)"
_SECRET = re.compile(
    rf"(?<=[?&;])((?:[\w.~]+-|\w+_)*(?:{_WORD}|credentials?|auth|authorization|jwt|policy|x-(?:amz|goog))"
    r"(?:[-_.][\w.~-]*)?=)[^&;#\s'\"]+(?<![.,:)])",
    re.IGNORECASE,
)


def visible(text: str) -> str:
    r"""A text whose control characters, changes of writing direction and lone surrogates are written out.

    What a file, a server or a path holds may so be shown on a terminal, which acts on none of it.

    Example:
        >>> print(visible("red \x1b[31m, back \r, é 東京"))
        red \x1b[31m, back \r, é 東京
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else c.encode("unicode_escape").decode() for c in text)


def without_secrets(text: str) -> str:
    """A text whose addresses have `***` for user and password, and for parameters that are keys, tokens or signatures.

    Example:
        >>> without_secrets("from https://me:pw@host/a.json?rev=3&token=abc")
        'from https://***@host/a.json?rev=3&token=***'
    """
    return _SECRET.sub(r"\1***", _LOGIN.sub("***@", text))


def presentable(text: str) -> str:
    """A text from outside as a message may show it: `visible` and `without_secrets`, and no line without end."""
    lines = visible(without_secrets(text)).split("\n")
    return "\n".join(f"{line[:_LINE]}… ({len(line)} characters)" if len(line) > _LINE else line for line in lines)


class InputError(ValueError):
    """Bad input or configuration: the message names the value, the place and the remedy, and is `presentable`.

    The commands end with exit status 2.
    """

    def __str__(self) -> str:
        return presentable(super().__str__())


class RunError(RuntimeError):
    """A failure outside the user's input, such as a server that does not answer; the message says what and why.

    The commands end with exit status 1. The message is `presentable`.
    """

    def __str__(self) -> str:
        return presentable(super().__str__())


def guard_logs() -> None:
    """Make every line that is logged from now on `presentable`, whatever module logs it."""
    if getattr(make := logging.getLogRecordFactory(), "guarded", False):
        return

    def guarded(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = presentable(record.getMessage()), ()
        return record

    guarded.guarded = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)


class StoppedError(RunError):
    """A signal ended the work at a point from which it can go on; the message says how.

    The commands end with exit status 128 + the signal's number, as a shell reports it: 130 after Ctrl-C, 143 after
    SIGTERM.

    Args:
        message: What is kept, and how to go on.
        signal: The signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal, self.status = signal, 128 + signal


def listing(items: Sequence[str], most: int = 10, total: int | None = None) -> list[str]:
    """The first items of a list in a message, and one that counts the rest, out of `total` where not all are held.

    Example:
        >>> listing(["entry 3", "entry 5", "entry 8"], most=2)
        ['entry 3', 'entry 5', 'and 1 more']
    """
    rest = (len(items) if total is None else total) - most
    return [*items[:most], f"and {rest} more"] if rest > 0 else list(items)
