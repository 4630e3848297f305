"""Exceptions that the commands print as a message alone, without a traceback."""


class InputError(ValueError):
    """Bad input or configuration: the message names the value, the place and the remedy.

    The commands end with exit status 2.
    """


class RunError(RuntimeError):
    """A failure outside the user's input, such as a server that does not answer; the message says what and why.

    The commands end with exit status 1.
    """
