"""Exceptions that the commands print as a message alone, without a traceback."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input or configuration: the message names the value, the place and the remedy.

    The commands end with exit status 2.
    """


class RunError(RuntimeError):
    """A failure outside the user's input, such as a server that does not answer; the message says what and why.

    The commands end with exit status 1.
    """


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


def listing(items: Sequence[str], most: int = 10) -> list[str]:
    """The first items of a list in a message, and one that counts the rest.

    Example:
        >>> listing(["entry 3", "entry 5", "entry 8"], most=2)
        ['entry 3', 'entry 5', 'and 1 more']
    """
    rest = len(items) - most
    return [*items[:most], f"and {rest} more"] if rest > 0 else list(items)
