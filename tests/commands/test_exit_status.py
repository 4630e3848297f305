"""The exit status of the commands that use argparse."""

import subprocess
import sys

import pytest

from instruct_lm.commands.exit_status import exit_status
from instruct_lm.errors import InputError, RunError


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("entry 3 has no output"), 2, "entry 3 has no output\n"),
        (RunError("the server hung up"), 1, "the server hung up\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_a_known_error_is_a_message_alone(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    def job() -> None:
        raise error

    assert exit_status(job) == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: {}["a bug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'a bug'\n")


def test_all_done_is_0_and_the_job_gets_its_arguments() -> None:
    seen: list[int] = []
    assert exit_status(seen.append, 5) == 0
    assert seen == [5]


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_stops_early_is_no_traceback() -> None:
    code = (
        "import sys; from instruct_lm.commands.exit_status import exit_status\n"
        "sys.exit(exit_status(lambda: [print('x' * 1000) for _ in range(1000)]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 1)
