"""The exit status of the commands that use argparse."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from instruct_lm.commands.exit_status import describe, exit_status
from instruct_lm.errors import InputError, RunError
from instruct_lm.io.failures import outside_failure


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b.json"), "a/b.json: No room is left on the disk. Free"),
        (OSError(errno.ENOSPC, "No space left on device"), "No room is left on the disk. Free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "x: The disk quota is used up."),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: The disk is read-only."),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied. Give another path"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many files are open in this process."),
        (OSError(errno.EIO, "Input/output error", "x"), "x: The disk failed (input/output error)."),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x: The name is too long for this disk."),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "x: No such file or folder;"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "x", None, "y"), "x: y: Invalid cross-device link."),
        (MemoryError(), "No memory is left (MemoryError). Lower data.batch_size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "No memory is left (DefaultCPUAllocator",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "The device has no memory left (CUDA out of memory. Tried)",
        ),
        (torch.AcceleratorError("CUDA error: device lost\nmore"), "The device failed (CUDA error: device lost)."),
        (RuntimeError("CUDA error: an illegal address\nmore"), "The device failed (CUDA error: an illegal address)."),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos"), "A file could not be written"),
    ],
)
def test_what_disk_memory_and_device_do_is_a_few_lines(error: BaseException, words: str) -> None:
    status, message = describe(error, "Continue with: python train.py resume=run")
    assert status == 1
    assert message.startswith(words)
    assert message.endswith("\nContinue with: python train.py resume=run")
    assert len(message.splitlines()) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_checkpoint_on_a_full_disk_names_the_disk() -> None:
    """What torch raises hides what the file has said."""
    with pytest.raises(Exception) as failed, open("/dev/full", "wb", buffering=0) as file:  # noqa: PT011, PTH123
        torch.save({"weights": torch.zeros(100_000)}, file)
    assert describe(failed.value)[1].startswith("No room is left on the disk.")


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_found_behind_a_librarys_own_error(named: bool) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "last.ckpt")
    error = ValueError("cannot write")
    error.__cause__, error.__context__ = (full if named else None), full  # `raise … from`, and without it
    assert str(outside_failure(error)).startswith("last.ckpt: No room is left")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("of a library"), ValueError("CUDA error")])
def test_other_errors_are_bugs(error: Exception) -> None:
    assert "Traceback" in describe(error)[1] or type(error).__name__ in describe(error)[1]
    assert str(error) in describe(error)[1].splitlines()[-1]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_in_words(capsys: pytest.CaptureFixture[str], name: str, status: int) -> None:
    number, left = getattr(signal, name), []
    before = signal.SIG_DFL
    was = signal.signal(number, before)  # under nohup it is ignored

    def job() -> None:
        try:
            try:
                os.kill(os.getpid(), number)
            except (Exception, KeyboardInterrupt):  # as the chat does with Ctrl-C
                left.append("caught")
        finally:
            left.append("tidy")

    assert exit_status(job) == status
    assert left == ["tidy"]
    assert capsys.readouterr().err == f"Ended by {name}. What was written before is whole.\n"
    assert signal.signal(number, was) == before
