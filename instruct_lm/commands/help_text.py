"""The text of `--help`: the keys from `config.py`, the choices from `conf/`, in lines that fit the terminal."""

import re
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from instruct_lm.commands import runs
from instruct_lm.commands.arguments import group_defaults
from instruct_lm.config import COMMANDS
from instruct_lm.io.conf_files import choices

_WIDEST = 116
_FIRST_COLUMN = re.compile(r" *\S+(?: \S+)* {2,}(?=\S)")


def help_keys(name: str) -> str:
    """The part of `--help` that lists keys, groups and choices, from `config.py` and `conf/`."""
    kind: Any = COMMANDS[name]
    lines = ["  Keys (key=value)"]
    lines += [_help_line(f"    {key:<20}", field) for key, field in kind.model_fields.items() if field.description]
    if name == "train":
        changes = f"beside it may change: {', '.join(runs.RESUME_MAY_CHANGE)}"
        lines.append(" " * 25 + changes)
    lines += ["", "  Groups (group=choice, and group.key=value for its keys)"]
    for group in group_defaults(name):
        folder, _, package = group.partition("@")
        lines.append(f"    {group:<20} {', '.join(choices(folder))}")
        if folder in kind.model_fields and not package:
            fields = kind.model_fields[folder].annotation.model_fields
            lines += [_help_line(f"      .{key:<25}", field) for key, field in fields.items()]
    return "\n".join(lines)


def _help_line(key: str, field: FieldInfo) -> str:
    kinds = (field.annotation, *get_args(field.annotation))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return f"{key} {field.description}" + (f" ({', '.join(words)})" if words else "")


def fitted(text: str) -> str:
    """The text in lines no wider than the terminal; a second column stays one, or goes below if it begins far right."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    return "\n".join(piece for line in text.splitlines() for piece in _pieces(line, width))


def _pieces(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = len(line) - len(line.lstrip())
    first, left, second = "", indent, line[indent:]
    head = []
    if column := _FIRST_COLUMN.match(line):
        first, left, second = column[0], column.end(), line[column.end() :]
        if left > width // 2:
            head, first, left = [first.rstrip()], "", indent + 4
    wrap = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    wrap.initial_indent, wrap.subsequent_indent = first or " " * left, " " * left
    return head + wrap.wrap(second)
