"""What stands in messages and log lines: no control characters, no secrets, no line without end."""

import io
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.commands.exit_status import describe
from instruct_lm.errors import InputError, RunError, guard_logs, presentable, visible, without_secrets


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_message_shows_what_a_terminal_would_act_on(kind: type[Exception]) -> None:
    error = kind("file \x1b]0;title\x07 \r \x9b2J \u202egnp \ud800, é 東京\u3000🙏\n\tnext line")
    shown = "file \\x1b]0;title\\x07 \\r \\x9b2J \\u202egnp \\ud800, é 東京\u3000🙏\n\tnext line"
    assert str(error) == shown
    assert f"{error}" == shown
    assert describe(error)[1] == shown


def test_a_traceback_of_a_bug_is_shown_so_too() -> None:
    assert "\x1b" not in describe(KeyError("\x1b[2J"))[1]
    assert "\x1b" not in describe(OSError(2, "no such file", "\x1b[2J"))[1]


@given(st.text())
def test_a_visible_text_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert all(c.isprintable() or c in "\n\t\xa0\u200c\u200d\u3000" for c in shown)
    shown.encode()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:pw@host/a.json", "https://***@host/a.json"),
        ("https://token@host", "https://***@host"),
        ("http://me:p@w@host:8/a@b", "http://***@host:8/a@b"),
        ("https://h/a?rev=3&token=abc&x=1", "https://h/a?rev=3&token=***&x=1"),
        ("https://h/a?access_token=abc#part", "https://h/a?access_token=***#part"),
        ("https://h/a?apiKey=abc", "https://h/a?apiKey=***"),
        (
            "https://h/a?X-Amz-Credential=A%2F1&X-Amz-Signature=0f",
            "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("https://h/a?Policy=x&Key-Pair-Id=K", "https://h/a?Policy=***&Key-Pair-Id=***"),
        ("https://h/a?sv=1&sig=Q%3D", "https://h/a?sv=1&sig=***"),
        ("https://h/a?download=true&keyword=x&monkey=2", "https://h/a?download=true&keyword=x&monkey=2"),
        ("hf:owner/repo@main/a.json", "hf:owner/repo@main/a.json"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_in_addresses_are_hidden(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    assert str(InputError(f"source '{address}': no")) == f"source '{shown}': no"


def test_a_line_without_end_is_cut() -> None:
    first, second = presentable("x" * 100_000 + "\nsecond").split("\n")
    assert len(first) < 5000
    assert first.endswith("… (100000 characters)")
    assert second == "second"


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    factory, stream = logging.getLogRecordFactory(), io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("a library")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
    logging.setLogRecordFactory(factory)


def test_log_lines_of_every_module_are_shown_so(logged: io.StringIO) -> None:
    guard_logs()
    guard_logs()
    logging.getLogger("a library").warning("%s from %s: 100%%", "\x1b[2J", "https://me:pw@host/?token=abc")
    assert logged.getvalue() == "\\x1b[2J from https://***@host/?token=***: 100%\n"
