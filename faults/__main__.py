"""`python -m faults [FAULT…]`: break things on purpose, and a table of what survived.

The status is 1 if a fault was not survived, or an end is not that of a run without faults, bit for bit.
"""

import argparse
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from faults.commands import ROOT
from faults.damage import damage
from faults.disk import disk
from faults.files import files
from faults.kills import kills
from faults.options import Options
from faults.outcomes import Outcome, Skipped, table
from faults.owners import owners
from faults.servers import servers

FAULTS: dict[str, Callable[[Options], Iterable[Outcome | Skipped]]] = {
    "kills": kills,
    "disk": disk,
    "damage": damage,
    "servers": servers,
    "owners": owners,
    "files": files,
}
RESULTS = ROOT / "faults" / "results" / "table.md"
_PLACE = re.compile(r"(<!-- last run -->\n).*(<!-- end of last run -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults and print the table; returns the exit status."""
    parser = argparse.ArgumentParser("python -m faults", description=__doc__)
    add = parser.add_argument
    add("faults", nargs="*", metavar="FAULT", help=f"{', '.join(FAULTS)}; default: all")
    add("--count", type=int, default=Options.count, help="SIGKILLs (default: %(default)s)")
    add("--inputs", type=int, default=Options.inputs, help="hostile files (default: %(default)s)")
    add("--seed", type=int, default=Options.seed, help="of all that is random (default: %(default)s)")
    add("--only", default="", metavar="NAME", help="those whose names begin so, as a line on stderr gives them")
    add("--jobs", type=int, default=Options.jobs, help="commands at a time (default: %(default)s)")
    add("--work", type=Path, help="where the runs' folder is made (default: the system's temporary folder)")
    add("--keep", action="store_true", help="keep also the folders of what ended well")
    add("--write", type=Path, metavar="FILE", help="put the table into this file, between its marks, as docs/faults.md")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.faults if name not in FAULTS]:
        parser.error(f"no fault {unknown[0]}: choose from {', '.join(FAULTS)}")
    work = Path(tempfile.mkdtemp(prefix="faults-", dir=chosen.work)).resolve()
    options = Options(work, chosen.count, chosen.inputs, chosen.seed, chosen.only, chosen.jobs, chosen.keep)

    started = time.monotonic()
    outcomes: list[Outcome | Skipped] = []
    stopped = False
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for outcome in _tried([name for name in chosen.faults or FAULTS if options.wants(f"{name}:")], options):
            outcomes.append(outcome)
    except KeyboardInterrupt:  # what was tried so far is worth its table
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, old)
    if not outcomes and not stopped:
        parser.error(f"--only {chosen.only}: there is no such fault")
    failed = [
        each for each in outcomes if isinstance(each, Outcome) and not (each.survived and each.identical is not False)
    ]
    text = f"{_heading(time.monotonic() - started, chosen)}{' stopped early.' * stopped}\n\n{table(outcomes)}\n"
    print(f"\n{text}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    if chosen.write is not None and not stopped:
        page = chosen.write.read_text(encoding="utf-8")
        chosen.write.write_text(_PLACE.sub(lambda mark: f"{mark[1]}{text}{mark[2]}", page), encoding="utf-8")
    if failed:
        print(f"{len(failed)} faults were not survived, or not to the bit. What they left: {work}", file=sys.stderr)
    else:
        options.discard(work)
    return 130 if stopped else int(bool(failed))


def _tried(names: Iterable[str], options: Options) -> Iterator[Outcome | Skipped]:
    """The outcomes as they come, each with its line; one that the harness itself cannot make is not survived."""
    for name in names:
        outcomes = iter(FAULTS[name](options))
        while True:
            try:
                outcome = next(outcomes, None)
            except Exception as error:
                outcome, outcomes = Outcome(f"{name}, to be tried at all", name, False, None, f"{error}"), iter(())
            if outcome is None:
                break
            print(_line(outcome), file=sys.stderr, flush=True)
            yield outcome


def _line(outcome: Outcome | Skipped) -> str:
    if isinstance(outcome, Skipped):
        return f"skipped    {outcome.fault}: {outcome.reason}"
    end = {True: "identical", False: "DIFFERENT", None: "refused  "}[outcome.identical]
    return f"{end if outcome.survived else 'LOST     '}  {outcome.name}  {outcome.fault}  {outcome.seen}".rstrip()


def _heading(seconds: float, chosen: argparse.Namespace) -> str:
    """When, where and of what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    more = [f"--count {chosen.count}"] * (chosen.count != Options.count)
    more += [f"--inputs {chosen.inputs}"] * (chosen.inputs != Options.inputs)
    more += [f"--only {chosen.only!r}"] * bool(chosen.only)
    called = " ".join(["python -m faults", *chosen.faults, f"--seed {chosen.seed}", *more])
    return f"`{called}`, {time.strftime('%Y-%m-%d')}, commit {commit}, {machine}, {seconds / 60:.0f} minutes:"


if __name__ == "__main__":
    sys.exit(main())
