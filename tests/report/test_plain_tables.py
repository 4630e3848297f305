"""Tables of a report at the widths of a terminal."""

import pytest

from instruct_lm.report.plain_tables import plain_table
from instruct_lm.report.tables import Table

ROWS = [
    {"setting": "prompt_loss_weight=0.1", "score": "+1.8 [−0.2, +3.9]", "exact match": "3 of 110 [1, 6]"}
    | {"chrF": "+0.3 [−0.1, +0.7]", "p": "< 0.001", "entries needed": "1,200"},
    {
        "setting": "a|b*c_",
        "score": "–",
        "exact match": "0 of 110 [0, 3]",
        "chrF": "–",
        "p": "0.20",
        "entries needed": "–",
    },
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_what_is_left_out_is_named(width: int) -> None:
    lines = plain_table(Table("", ROWS), width).splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(lines)
    assert all(name in shown for name in ROWS[0])
    assert ("A wider terminal" in shown) == (width < 120)


def test_cells_stand_under_their_names_as_they_are() -> None:
    lines = plain_table(Table("", ROWS), 80).splitlines()
    header, rule, *rows = lines[:4]
    assert header.split("  ")[0] == "setting"
    assert set(rule) == {"-", " "}
    for row, texts in zip(rows, ROWS, strict=True):
        assert row.startswith(texts["setting"])
        assert row[header.index("score") :].startswith(texts["score"])
        assert row.endswith(f"  {texts['p']}")  # the verdict stays
    assert "chrF" not in header


def test_a_long_name_is_cut_in_its_middle() -> None:
    rows = [{"setting": f"model=smollm2-135m, prompt_loss_weight={w}, optimizer.lr=5e-5", "score": "1"} for w in (0, 1)]
    first = plain_table(Table("", rows), 60).splitlines()[2]
    assert first.startswith("model=smollm2")
    assert "…" in first
    assert "lr=5e-5  1" in first
