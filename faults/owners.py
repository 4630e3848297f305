"""Two owners: the same command twice, at once, seconds apart, and while the first is killed or sleeps."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from random import Random

from faults.commands import Ended, Job, call
from faults.compare import differences, evaluation
from faults.kinds import Run, reference
from faults.options import Options
from faults.outcomes import Outcome
from instruct_lm.io.run_files import SUMMARY

_ROUNDS = 5


def owners(options: Options) -> Iterator[Outcome]:
    """Each way of two owners several times: one owns the folder, and its results are those of one run."""
    whole = reference("gpt2", options.work)
    for what, rival in _RIVALS.items():
        for seed in range(options.seed, options.seed + _ROUNDS):
            if not options.wants(name := f"owners:{what}:{seed}"):
                continue
            run = Run(whole.kind, options.work / f"owned-{what.replace(' ', '-')}-{seed}" / "run", whole.cache)
            run.folder.parent.mkdir()
            seen = rival(run, Random(seed))
            if not seen and (ended := run.finish()).status != 0:
                seen = str(ended)
            unlike = differences(run.folder, whole.folder)
            yield Outcome(f"two owners, {what}", name, not seen, not unlike, "; ".join([seen, *unlike[:3]]).strip("; "))
            if not seen and not unlike:
                options.discard(run.folder.parent)
    for name, trial in (
        ("owners:evaluations", _evaluations),
        ("owners:over the run", _over),
        ("owners:sweeps", _sweeps),
    ):
        if options.wants(name):
            yield trial(name, whole, options)


def _at_once(run: Run, rng: Random) -> str:
    first, second = run.start(), run.start()
    return _one_owner(first.wait(), second.wait())


def _seconds_apart(run: Run, rng: Random) -> str:
    first = run.start()
    first.wait_until(lambda: "training: from step" in first.said)
    time.sleep(rng.uniform(0, 1))
    second = run.start()
    return _one_owner(first.wait(), second.wait())


def _resumed_twice(run: Run, rng: Random) -> str:
    run.stop_early()
    first = run.start()
    time.sleep(rng.uniform(0, 0.5))
    second = run.start()
    return _one_owner(first.wait(), second.wait())


def _first_killed(run: Run, rng: Random) -> str:
    """The second may be refused, if it looked before the first was dead, or go on."""
    first = run.start()
    first.wait_until(lambda: "training: from step" in first.said)
    time.sleep(rng.uniform(0, 1))
    second = run.start()
    time.sleep(rng.uniform(0, 2))
    first.send(signal.SIGKILL)
    first.wait()
    ended = second.wait()
    return "" if ended.status == 0 or ended.refused else str(ended)


def _first_asleep(run: Run, rng: Random) -> str:
    """A laptop that sleeps, or a process in the background: it still owns its folder."""
    first = run.start()
    first.wait_until(lambda: "training: from step" in first.said)
    first.send(signal.SIGSTOP)
    try:
        second = run.start().wait()
    finally:
        first.send(signal.SIGCONT)
    return _one_owner(first.wait(), second)


_RIVALS: dict[str, Callable[[Run, Random], str]] = {
    "at once": _at_once,
    "seconds apart": _seconds_apart,
    "resumed twice at once": _resumed_twice,
    "the first killed": _first_killed,
    "the first asleep": _first_asleep,
}


def _one_owner(first: Ended, second: Ended) -> str:
    """What is wrong unless one of two has done the work and the other was refused."""
    statuses = sorted((first.status, second.status), key=str)
    other = second if first.status == 0 else first
    return "" if 0 in statuses and other.refused else f"statuses {statuses}: {other}"


def _evaluations(name: str, whole: Run, options: Options) -> Outcome:
    """Two evaluations of a run at once: one does the work, the other is refused or comes to the same."""
    alone, both = (options.work / f"evaluated-{which}" for which in ("alone", "twice"))
    command = [f"cache_dir={whole.cache}", "offline=true"]
    for place in (alone, both):
        shutil.copytree(whole.folder, place)
    call("evaluate.py", f"run={alone}", *command, folder=options.work)
    jobs = [Job("evaluate.py", f"run={both}", *command, folder=options.work) for _ in range(2)]
    ended = [job.wait() for job in jobs]
    wrong = [str(each) for each in ended if each.status != 0 and not each.refused]
    survived = not wrong and any(each.status == 0 for each in ended)
    same = survived and evaluation(both / "evaluation" / "test") == evaluation(alone / "evaluation" / "test")
    return Outcome("two evaluations of a run at once", name, survived, same, "; ".join(wrong))


def _over(name: str, whole: Run, options: Options) -> Outcome:
    """An evaluation into the run's own folder is refused and changes nothing."""
    run = options.work / "evaluated-over"
    shutil.copytree(whole.folder, run)
    ended = call("evaluate.py", f"run={run}", f"output_dir={run}", f"cache_dir={whole.cache}", folder=options.work)
    same = (run / SUMMARY).read_bytes() == (whole.folder / SUMMARY).read_bytes()
    seen = "" if ended.refused and same else str(ended)
    return Outcome("an evaluation into the run's own folder", name, not seen, same, seen)


def _sweeps(name: str, whole: Run, options: Options) -> Outcome:
    """Two sweeps of one folder at once: one is refused, and the jobs end as those of a sweep alone."""
    alone, both = options.work / "sweep-alone", options.work / "sweep-twice"
    settings = [item for item in whole.first if not item.startswith("output_dir=")] + ["seed=1,2"]
    call("train.py", "-m", *settings, f"output_dir={alone}", folder=options.work)
    jobs = [Job("train.py", "-m", *settings, f"output_dir={both}", folder=options.work) for _ in range(2)]
    seen = _one_owner(*(job.wait() for job in jobs))
    runs = [sorted(path.name for path in place.iterdir() if (path / SUMMARY).exists()) for place in (alone, both)]
    unlike = [] if runs[0] == runs[1] and runs[0] else [f"runs {runs[1]}, not {runs[0]}"]
    unlike += [each for run in runs[0] for each in differences(both / run, alone / run)]
    return Outcome(
        "two sweeps of one folder at once", name, not seen, not unlike, "; ".join([seen, *unlike[:3]]).strip("; ")
    )
