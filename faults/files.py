"""Hostile files: `python -m faults files` reads 20,000 of six kinds.

An input must give a result or a documented error (`InputError`, `RunError`), within seconds and less than a gigabyte.
Each kind is read in a process of its own with that limit, so that a hang or a crash is a line of the table too. An
input follows from its kind, the seed and its number alone: `--only files:gguf:17` repeats one, with its traceback.
"""

import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from faults import files_data, files_models, files_words
from faults.options import Options
from faults.outcomes import Outcome
from instruct_lm.errors import InputError, RunError

Kind = Callable[[Random, Path], Callable[[], object]]
KINDS: dict[str, Kind] = {
    "data": files_data.data,
    "configuration": files_words.configuration,
    "scores": files_words.scores,
    "safetensors": files_models.safetensors,
    "gguf": files_models.gguf,
    "index": files_models.index,
}
SLOW = 10.0  # seconds of CPU time of one input, since machines are shared
HANG = 600.0  # seconds in all, after which its process is ended
MEMORY = 10**9  # bytes that all inputs of a kind may take


class Hang(BaseException):
    """An input takes too long; no reader may catch it."""


@dataclass
class Row:
    """What became of the inputs of a kind.

    Attributes:
        longest: Seconds of CPU time of the slowest input.
        memory: Bytes that its process took at most beyond those before the first input.
        faults: Words of a fault → the numbers of the inputs that had it.
    """

    kind: str
    inputs: int = 0
    results: int = 0
    refused: int = 0
    longest: float = 0.0
    memory: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)

    @property
    def n_faults(self) -> int:
        """How many inputs had a fault."""
        return sum(map(len, self.faults.values()))


def files(options: Options) -> Iterator[Outcome]:
    """Read hostile files; what became of a kind is one outcome, and each fault another."""
    _, _, number = options.only.removeprefix("files:").partition(":")
    only = int(number) if number else None
    for each in (name for name in KINDS if options.wants(f"files:{name}:")):
        [row] = run(-(-options.inputs // len(KINDS)), options.seed, [each], only)
        yield from outcomes(row)


def outcomes(row: Row) -> Iterator[Outcome]:
    """A row's results and documented errors, then its faults."""
    fault = f"hostile files, {row.kind}"
    seen = (
        f"{row.results} results, {row.refused} errors in words, {row.longest:.1f} s, {row.memory / 1e6:.0f} MB at most"
    )
    if row.inputs > row.n_faults:
        yield Outcome(fault, f"files:{row.kind}", True, None, seen, row.inputs - row.n_faults)
    for words, numbers in row.faults.items():
        yield Outcome(fault, f"files:{row.kind}:{numbers[0]}", False, None, words, len(numbers))


def run(
    inputs: int, seed: int, kinds: Sequence[str] = tuple(KINDS), only: int | None = None, context: str = "forkserver"
) -> list[Row]:
    """Read hostile inputs, about `inputs` in all, and count what becomes of them.

    Args:
        inputs: Shared out evenly among the kinds.
        seed: Decides all inputs.
        kinds: Some of `KINDS`.
        only: The number of the one input to read, of each kind.
        context: How processes begin: ``forkserver``, or ``fork``.
    """
    begin: Any = multiprocessing.get_context(context)
    begin.set_forkserver_preload(["faults.files_preload"])
    each = -(-inputs // len(kinds))
    return [_run_kind(begin, kind, range(each) if only is None else range(only, only + 1), seed) for kind in kinds]


def _run_kind(context: Any, kind: str, numbers: range, seed: int) -> Row:
    row, at = Row(kind, len(numbers)), numbers.start
    while at < numbers.stop:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, kind, range(at, numbers.stop), seed), daemon=True)
        process.start()
        theirs.close()
        while at < numbers.stop:
            fault = "it hangs, and its process had to be ended"
            try:
                answered = ours.poll(HANG)
                answer = ours.recv() if answered else None
            except EOFError:
                process.join()
                answer, fault = None, f"its process ended with status {process.exitcode}"
            if answer is None:
                process.kill()
                row.faults.setdefault(fault, []).append(at)
                row.longest = max(row.longest, HANG * (fault[:2] == "it" and "hangs" in fault))
                at += 1
                break
            outcome, words, seconds, memory = answer
            row.results += outcome == "result"
            row.refused += outcome == "refused"
            if outcome == "fault":
                row.faults.setdefault(words, []).append(at)
            row.longest, row.memory = max(row.longest, seconds), max(row.memory, memory)
            at += 1
        process.join()
    return row


def _work(answers: Connection, kind: str, numbers: range, seed: int) -> None:
    """Read inputs one after the other and send what became of each; runs in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    signal.signal(signal.SIGPROF, _hang)
    with suppress(Exception):
        attempt(KINDS[kind], Random(0), folder)  # what is made once is made before memory is counted
    pages = Path("/proc/self/statm").read_text().split()
    before = [int(n) * resource.getpagesize() for n in pages[:2]]
    resource.setrlimit(resource.RLIMIT_AS, (before[0] + MEMORY, before[0] + MEMORY))
    for number in numbers:
        outcome, words, seconds = attempt(KINDS[kind], Random(f"{kind} {seed} {number}"), folder)
        if outcome == "fault" and len(numbers) == 1:
            print(words, file=sys.stderr)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.send((outcome, words.splitlines()[-1] if words else "", seconds, max(0, peak - before[1])))
    shutil.rmtree(folder, ignore_errors=True)


def attempt(kind: Kind, random: Random, folder: Path) -> tuple[str, str, float]:
    """Make an input and read it: `result`, `refused` or `fault`, the words of a fault, and the seconds that it took."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    read = kind(random, folder)
    begun = time.process_time()
    outcome, words = "result", ""
    try:
        signal.setitimer(signal.ITIMER_PROF, SLOW, 1)  # again each second: a callback of the collector drops exceptions
        read()
        signal.setitimer(signal.ITIMER_PROF, 0)
    except (InputError, RunError) as error:
        outcome, words = "refused", _unclear(str(error))
    except BaseException as error:
        words = "".join(traceback.format_exception(error)) + f"{_place(error)}: {type(error).__name__}: {error!s:.200}"
        words = words.encode("ascii", "backslashreplace").decode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - begun
    if seconds > SLOW and not words:
        words = f"it took {seconds:.0f} s"
    return ("fault" if words else outcome), words, seconds


def _unclear(message: str) -> str:
    """What is wrong with the words of a documented error; empty: nothing."""
    if hidden := sorted({c for c in message if not (c.isprintable() or c in "\n\t\u3000\xa0")}):
        return f"a documented error with {hidden[:5]!a}: {message[:200]!a}"
    return "" if message.strip() and len(message) < 20_000 else f"a documented error of {len(message)} characters"


def _place(error: BaseException) -> str:
    """Where in the package an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "instruct_lm" in frame.filename] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"over {SLOW:g} s")
