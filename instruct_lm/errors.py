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


def listing(items: Sequence[str], most: int = 10) -> list[str]:
    """The first items of a list in a message, and one that counts the rest.

    Example:
        >>> listing(["entry 3", "entry 5", "entry 8"], most=2)
        ['entry 3', 'entry 5', 'and 1 more']
    """
    rest = len(items) - most
    return [*items[:most], f"and {rest} more"] if rest > 0 else list(items)
