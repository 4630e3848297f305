"""Markdown tables within the width of a terminal: plain columns, and fewer of them where they do not fit."""

import re
import textwrap

_GAP = "  "
_VERDICTS = ("p",)  # columns that stay, and so come last, when others are left out
_TABLE = re.compile(r"(?:^\|.*\|$\n?)+", re.MULTILINE)
_CELLS = re.compile(r"(?<!\\)\|")


def fit_tables(text: str, width: int) -> str:
    """A text whose Markdown tables are set as plain columns, at most so wide.

    Columns are left out from the right, but for the verdict, and the line below the table names them. The first column,
    which names the rows, is cut in its middle where it would take more than half of the width.

    Args:
        text: With tables as `instruct_lm.report.tables.markdown` writes them.
        width: Of the terminal, in characters.
    """
    return _TABLE.sub(lambda found: _fitted(found[0], width), text)


def _fitted(table: str, width: int) -> str:
    header, _, *rows = [[_plain(cell) for cell in _CELLS.split(line)[1:-1]] for line in table.splitlines()]
    longest = max(12, width // 2 - len(_GAP))
    cells = [[_shortened(row[0], longest), *row[1:]] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(widths)))
    while len(shown) > 2 and sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) > width:
        can_go = [i for i in shown[2:] if header[i].strip() not in _VERDICTS]
        shown.remove(can_go[-1] if can_go else shown[-1])
    cells.insert(1, ["-" * each for each in widths])
    lines = [_GAP.join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in cells]
    if left_out := ", ".join(name for i, name in enumerate(header) if i not in shown):
        lines.append(textwrap.fill(f"A wider terminal shows: {left_out}", width))
    return "\n".join(lines) + ("\n" if table.endswith("\n") else "")


def _plain(cell: str) -> str:
    """What Markdown shows of a cell, as a terminal may."""
    cell = re.sub(r"\\([\\`*|~_\]])", r"\1", cell.strip())
    return cell.replace("&lt;", "<").replace("<br>", " ").replace("&amp;", "&")


def _shortened(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    head = longest // 2
    return f"{name[:head]}…{name[head + 1 - longest :]}"
