"""A table in plain columns, within the width of a terminal."""

import textwrap

from instruct_lm.report.tables import Table

_GAP = "  "
_VERDICTS = ("p",)  # columns that stay, and so come last, when others are left out


def plain_table(table: Table, width: int) -> str:
    """The table's header and rows as plain columns, at most so wide where two columns can be.

    Columns are left out from the right, but for the verdict, and the line below the table names them. The first column,
    which names the rows, is cut in its middle where it would take more than half of the width.

    Args:
        table: What to show; its title and note are left to the caller.
        width: Of the terminal, in characters.
    """
    header, longest = table.header, max(12, width // 2 - len(_GAP))
    rows = [[" ".join(cell.split()) for cell in row] for row in (header, *table.cells)]
    cells = [[_shortened(row[0], longest), *row[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(widths)))
    while len(shown) > 2 and sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) > width:
        can_go = [i for i in shown[2:] if header[i] not in _VERDICTS]
        shown.remove(can_go[-1] if can_go else shown[-1])
    cells.insert(1, ["-" * each for each in widths])
    lines = [_GAP.join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in cells]
    if left_out := ", ".join(name for i, name in enumerate(header) if i not in shown):
        lines.append(textwrap.fill(f"A wider terminal, --md and --html show: {left_out}", width))
    return "\n".join(lines)


def _shortened(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    head = longest // 2
    return f"{name[:head]}…{name[head + 1 - longest :]}"
