"""`--help` at the widths of a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.commands.help_text import fitted, help_keys
from instruct_lm.config import COMMANDS

WORDS = st.lists(st.text("ab.=_-", min_size=1, max_size=12), min_size=1, max_size=30).map(" ".join)
FIRST = WORDS.map(lambda words: words[:30].strip())  # a command that is wider than the terminal is not broken
COLUMNS = st.builds("{:<{}}  {}".format, FIRST, st.integers(0, 40), WORDS)


@given(st.integers(60, 130), st.lists(st.builds(lambda n, line: " " * n + line, st.integers(0, 25), WORDS | COLUMNS)))
def test_no_line_is_wider_than_the_terminal_and_every_word_stays(width: int, lines: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        made = fitted("\n".join(lines))
    assert made.split() == "\n".join(lines).split()
    assert max(map(len, made.splitlines()), default=0) <= width


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_key_means_stays_in_its_column(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for line in fitted(help_keys(name)).splitlines():
        indent = len(line) - len(line.lstrip())
        assert indent in (0, 2, 4, 6, 25, 33), line


def test_what_begins_far_right_goes_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    line = f"  python train.py {'a' * 20}=1  {'words ' * 12}".rstrip()
    first, *others = fitted(line).splitlines()
    assert first == f"  python train.py {'a' * 20}=1"
    assert [len(each) - len(each.lstrip()) for each in others] == [6, 6]
