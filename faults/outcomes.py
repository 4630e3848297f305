"""What became of each fault, and the table of them all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    Args:
        fault: Its row in the table.
        name: How `--only` names it, so that it can be repeated.
        survived: The right end, or an error in words where there can be none; what could be repeated was.
        identical: Whether the end is that of a run without faults, bit for bit; None where there is none to compare,
            since the command refused to go on.
        seen: What was seen instead, or is worth a line.
        times: How many faults it stands for.
    """

    fault: str
    name: str
    survived: bool
    identical: bool | None = None
    seen: str = ""
    times: int = 1


@dataclass(frozen=True)
class Skipped:
    """A fault that cannot be tried here, with the reason."""

    fault: str
    reason: str


def table(outcomes: Iterable[Outcome | Skipped]) -> str:
    """A row for each fault, in Markdown.

    Example:
        >>> print(table([Outcome("SIGKILL", "kills:1", True, True), Skipped("full disk", "needs root")]))
        | fault | tried | survived | bit-identical ends |
        |---|---|---|---|
        | SIGKILL | 1 | 1 | 1 of 1 |
        | full disk | skipped: needs root | | |
    """
    rows: dict[str, list[Outcome] | str] = {}
    for each in outcomes:
        if isinstance(each, Skipped):
            rows[each.fault] = each.reason
        else:
            found = rows.setdefault(each.fault, [])
            if isinstance(found, list):
                found.append(each)
    lines = ["| fault | tried | survived | bit-identical ends |", "|---|---|---|---|"]
    for fault, found in rows.items():
        lines.append(f"| {fault} | skipped: {found} | | |" if isinstance(found, str) else _row(fault, found))
    return "\n".join(lines)


def _row(fault: str, outcomes: Sequence[Outcome]) -> str:
    compared = [each.identical for each in outcomes if each.identical is not None]
    ends = f"{sum(compared)} of {len(compared)}" if compared else "none to compare"
    tried, survived = (sum(each.times for each in some) for some in (outcomes, [e for e in outcomes if e.survived]))
    return f"| {fault} | {tried} | {survived} | {ends} |"
