"""A comparison as plain text for the terminal and as Markdown, and the templates of all reports."""

import re
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template, select_autoescape
from markupsafe import Markup, escape

from instruct_lm.report import findings
from instruct_lm.report.comparison import Comparison
from instruct_lm.report.plain_tables import plain_table
from instruct_lm.report.side_by_side import by_disagreement, evenly, side_by_side
from instruct_lm.report.tables import all_tables, markdown, markdown_text, seen_sentence, thirds_title

TEMPLATES = Path(__file__).with_name("templates")
N_SHOWN = 5  # entries with their answers in the terminal
N_WRITTEN = 20  # and in Markdown
MAX_TEXT = 400  # characters of a text in the terminal
MAX_SHOWN, MAX_LINES = 320, 6  # a page clamps longer texts


def terminal(comparison: Comparison, width: int, table_width: int) -> str:
    """A few answers, tables and, last, the sentences as plain text.

    Args:
        comparison: The content.
        width: Columns of the terminal, for sentences and answers.
        table_width: Columns for a table, which leaves out some of its own to fit, and says so.
    """
    shown = evenly(side_by_side(comparison), N_SHOWN)
    sizes = {"width": width, "table_width": table_width}
    return template("report.txt").render(content(comparison), shown=shown, **sizes).rstrip()


def markdown_report(comparison: Comparison, title: str) -> str:
    """All tables, the sentences and the answers with the largest disagreement in Markdown."""
    return template("report.md").render(content(comparison, title), n_shown=N_WRITTEN).rstrip() + "\n"


def content(comparison: Comparison, title: str = "") -> dict[str, Any]:
    """What all templates show; the entries in the order of disagreement."""
    entries = by_disagreement(side_by_side(comparison))
    thirds = [
        f"{third.name.capitalize()}: {findings.summary(paired)}"
        for third in comparison.thirds
        if (paired := [contrast for contrast in third.contrasts if contrast.differences])
    ]
    shown = {"tables": all_tables(comparison), "facts": findings.facts(comparison), "thirds": thirds}
    shown |= {"sentences": findings.sentences(comparison), "warnings": findings.warnings(comparison)}
    shown["thirds_title"] = thirds_title(comparison)
    return {"comparison": comparison, "title": title, "entries": entries, "seen": seen_sentence(comparison), **shown}


def template(name: str) -> Template:
    """A file of `templates/`; in HTML, all values that it inserts are escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown": markdown_text, "markdown_table": markdown, "plain_table": plain_table}
    environment.filters |= {"fill": textwrap.fill, "wrapped": _wrapped, "breakable": _breakable, "unbroken": _unbroken}
    environment.tests |= {"long": _long}
    return environment.get_template(name)


def _wrapped(text: str, name: str, width: int) -> str:
    """A named text with a hanging indent; control characters, which a terminal would obey, are spelled out."""
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.replace("\t", " "))
    wrap = textwrap.TextWrapper(max(width, 40), initial_indent="  ", subsequent_indent="    ")
    return "\n".join(wrap.fill(line) for line in f"{name}{text}".split("\n"))


def _breakable(name: str) -> Markup:
    """HTML of a name that may break after `_`, `=` and `,`."""
    return Markup(re.sub("(?<=[_=,])", "<wbr>", str(escape(name))))


def _long(text: str) -> bool:
    """Whether a page shows only its first lines at first."""
    return len(text) > MAX_SHOWN or text.count("\n") >= MAX_LINES


def _unbroken(sentence: str) -> str:
    """A sentence that does not break within `4.1 ± 2.0` and `p = 0.2`."""
    return re.sub(r" ([±<=]) ", "\u00a0\\1\u00a0", sentence)
