"""Full disks: a small tmpfs holds the run's folder and fills up while something is written into it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from faults.commands import Ended, call
from faults.compare import differences, evaluation
from faults.kinds import Run, reference
from faults.options import Options
from faults.outcomes import Outcome, Skipped
from instruct_lm.io.run_files import LAST, PREVIOUS

_SHARES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)  # of the room that a run takes at most
_LEFT = (0, 4096, 16384, 65536)  # bytes
_LARGE = 1 << 28
_LINES = 20  # of a message that tells in a few lines what is kept and how to go on


def disk(options: Options) -> Iterator[Outcome | Skipped]:
    """Fill a disk up at every stage, then make room and go on."""
    if reason := _unable(options.work):
        yield Skipped("full disk", reason)
        return
    whole = reference("gpt2", options.work)
    weights = (whole.folder / LAST).stat().st_size
    room = sum(file.stat().st_size for file in whole.folder.rglob("*") if file.is_file()) + 2 * weights
    for share in _SHARES:
        if options.wants(name := f"disk:training:{share}"):
            yield from _training(name, "full disk while training", int(room * share), whole, options)
    for n, part in enumerate((0.0, 0.3, 0.6, 0.9)):
        if options.wants(name := f"disk:checkpoint:{n}"):
            yield from _checkpoint(name, int(weights * part), whole, options)
    for left in _LEFT:
        if options.wants(name := f"disk:evaluation:{left}"):
            yield _afterwards(name, "evaluation", left, whole, options)
        if options.wants(name := f"disk:export:{left}"):
            yield _afterwards(name, "export", left, whole, options)


@contextmanager
def _mounted(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a tmpfs of so many bytes; gives a function that changes its size."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(place)], check=True)
    try:
        yield partial(_resize, place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)
        place.rmdir()


def _fill(place: Path, left: int) -> None:
    """Leave so many bytes free, though a command may be writing."""
    while True:
        usage = os.statvfs(place)
        with suppress(subprocess.CalledProcessError):  # more is in use by now
            return _resize(place, (usage.f_blocks - usage.f_bfree) * usage.f_frsize + left)


def _resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True, capture_output=True)


def _unable(work: Path) -> str:
    """Why no tmpfs can be mounted; "" if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting a tmpfs takes root on Linux"
    try:
        with _mounted(work / "try", 4096):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(work / "try", ignore_errors=True)
        return f"no tmpfs can be mounted here ({error})"


def _training(name: str, fault: str, size: int, whole: Run, options: Options) -> Iterator[Outcome]:
    """A disk too small from the start."""
    with _mounted(options.work / "disk", size) as resize:
        run = Run(whole.kind, options.work / "disk" / "run", whole.cache)
        ended = call("train.py", *run.first, folder=options.work)
        if ended.status != 0:  # else there was room
            yield _then_with_room(name, fault, ended, run, whole, resize)


def _checkpoint(name: str, left: int, whole: Run, options: Options) -> Iterator[Outcome]:
    """A disk that has room for a part of the next checkpoint."""
    place = options.work / "disk"
    with _mounted(place, _LARGE) as resize:
        run = Run(whole.kind, place / "run", whole.cache)
        run.folder.mkdir()
        job = run.start()
        job.wait_until((run.folder / LAST).exists)
        _fill(place, left)
        ended = job.wait()
        if ended.status != 0:
            yield _then_with_room(name, "full disk while a checkpoint is written", ended, run, whole, resize)


def _then_with_room(
    name: str, fault: str, ended: Ended, run: Run, whole: Run, resize: Callable[[int], None]
) -> Outcome:
    """What a full disk left is sound, and after making room the run ends as if it had always had it."""
    seen = "" if ended.refused and _is_short(ended) else str(ended)
    kept = [path for path in (run.folder / LAST, run.folder / PREVIOUS) if path.exists()]
    seen = seen or (_unreadable(kept[0]) if kept else "")
    resize(_LARGE)
    resumed = run.finish()
    if resumed.status != 0:
        return Outcome(fault, name, False, False, f"{seen}; with room again {resumed}".strip("; "))
    unlike = differences(run.folder, whole.folder)
    return Outcome(fault, name, not seen, not unlike, seen or "; ".join(unlike[:3]))


def _afterwards(name: str, what: str, left: int, whole: Run, options: Options) -> Outcome:
    """A disk that fills up while a complete run is evaluated or exported."""
    place, fault = options.work / "disk", f"full disk during an {what}"
    with _mounted(place, _LARGE) as resize:
        shutil.copytree(whole.folder, run := place / "run")
        command = [f"run={run}", f"cache_dir={whole.cache}", "offline=true"]
        script = "evaluate.py" if what == "evaluation" else "instruct_lm.export"
        _fill(place, left)
        ended = call(script, *command, folder=options.work)
        seen = "" if ended.status == 0 or (ended.refused and _is_short(ended)) else str(ended)
        resize(_LARGE)
        again = call(script, *command, *_overwrite(script, ended), folder=options.work)
        if again.status != 0:
            return Outcome(fault, name, False, False, f"{seen}; with room again {again}".strip("; "))
        if what == "export":
            return Outcome(fault, name, not seen, None, seen)
        same = evaluation(run / "evaluation" / "test") == _evaluated(whole, options)
        return Outcome(fault, name, not seen, same, seen or ("" if same else "other answers or scores"))


def _overwrite(script: str, ended: Ended) -> list[str]:
    return ["overwrite=true"] if script != "evaluate.py" and ended.status == 0 else []


def _evaluated(whole: Run, options: Options) -> object:
    """The evaluation of a run on a disk with room."""
    run = options.work / "evaluated"
    if not run.exists():
        shutil.copytree(whole.folder, run)
        ended = call("evaluate.py", f"run={run}", f"cache_dir={whole.cache}", "offline=true", folder=options.work)
        if ended.status != 0:
            raise RuntimeError(str(ended))
    return evaluation(run / "evaluation" / "test")


def _is_short(ended: Ended) -> bool:
    """Whether the message is of a few lines; what a command says before its first step is 12 lines."""
    return len(ended.said.splitlines()) <= _LINES + 12


def _unreadable(checkpoint: Path) -> str:
    """Why the last checkpoint cannot be loaded; "" if it can."""
    import torch

    try:
        return "" if torch.load(checkpoint, weights_only=True)["global_step"] >= 0 else "no step"
    except Exception as error:
        return f"{checkpoint.name} does not load: {error!r:.200}"
