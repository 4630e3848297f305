"""Commands that a message prints: they run when pasted into a shell, whatever is in their values."""

import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from instruct_lm.io.files import shown

_PLAIN = re.compile(r"[\w./:@%+-]+", re.ASCII)  # read by Hydra as the text itself, without quotes …
_OTHER = re.compile(r"null|true|false|[+-]?(nan|inf|[\d_.]+(e[+-]?\d+)?)", re.IGNORECASE)  # … unless it is one of these
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def command(program: str, **values: Any) -> str:
    """A command line of this project, quoted for Hydra and for the shell.

    Args:
        program: Such as ``train.py``, or ``-m instruct_lm.chat``.
        values: Key → value; a path is shown relative to the current folder where it lies in it. A key with a dot is
            given as ``**{"device.devices": 2}``.

    Example:
        >>> command("train.py", resume=Path("outputs/a run"))
        'python train.py \\'resume="outputs/a run"\\''
    """
    return shlex.join(["python", *program.split(), *(override(key, value) for key, value in values.items())])


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it, for one argument of a command; a text is quoted where it must be."""
    if value is None or isinstance(value, (bool, int, float)):
        return f"{key}={'null' if value is None else str(value).lower()}"
    text = str(shown(value) if isinstance(value, Path) else value)
    if _PLAIN.fullmatch(text) and not _OTHER.fullmatch(text):
        return f"{key}={text}"
    literal = _INTERPOLATION.sub(r"\1\1\\${", text)  # OmegaConf would resolve ${…}
    return f"{key}={QuotedString(literal, Quote.double).with_quotes()}"
