"""Kills: runs of each kind are killed at random moments, some of them while a checkpoint is written, and resumed."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path
from random import Random

from faults.commands import Ended, Job
from faults.compare import differences
from faults.kinds import KINDS, Run, reference
from faults.options import Options
from faults.outcomes import Outcome
from instruct_lm.io.run_files import SUMMARY

_MOMENTS = ("start", "training", "training", "checkpoint", "checkpoint")
_SIGNALS = (*[signal.SIGKILL] * 8, signal.SIGTERM, signal.SIGUSR1)
_WRITING = 0.006  # seconds; a checkpoint's writing, syncing and renaming, generously


def kills(options: Options) -> Iterator[Outcome]:
    """Kill runs until `options.count` SIGKILLs have hit, in chains of one to three kills of the same run.

    A chain's name is `kills:KIND:SEED`; `options.only` may name one alone. The moments follow from the seed; where a
    process then is depends on the machine, so a repeated chain may end otherwise.
    """
    kind, _, seed = options.only.removeprefix("kills:").partition(":")
    if seed:
        yield from _chain(kind, int(seed), options)
        return
    kinds = cycle(kind for kind in KINDS if options.wants(f"kills:{kind}:"))
    chains = zip(kinds, count(options.seed), strict=False)
    killed = tried = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        while killed < options.count and tried < 3 * options.count + 10:  # a run that ends at once is never hit
            tried += options.jobs
            batch = [next(chains) for _ in range(options.jobs)]
            for outcomes in pool.map(lambda each: _chain(each[0], each[1], options), batch):
                killed += sum(outcome.fault.startswith("SIGKILL") for outcome in outcomes)
                yield from outcomes


def _chain(kind: str, seed: int, options: Options) -> list[Outcome]:
    """Kill a run one to three times, resume it to its end and compare it."""
    rng, name = Random(seed), f"kills:{kind}:{seed}"
    run = Run(kind, options.work / f"{kind}-{seed}", options.work / "cache")
    try:
        whole = reference(kind, options.work)
    except RuntimeError as error:
        return [Outcome("a run without any fault", name, False, None, str(error))]
    wanted, faults, seen = rng.randint(1, 3), [], ""
    for _ in range(wanted):
        number, moment = rng.choice(_SIGNALS), rng.choice(_MOMENTS)
        job = run.start()
        hit = _aim(job, moment, run.folder, whole.seconds, rng)
        if hit:
            job.send(number)
        ended = job.wait()
        if hit and ended.status in (-number, 128 + number):
            faults.append(_words(number, moment))
        elif ended.status == 0 and (run.folder / SUMMARY).exists():
            break  # it was faster
        clean = ended.is_clean or ended.status == -signal.SIGKILL  # its loader's workers may complain of its death
        if not clean or ended.status not in (0, -number, 128 + number):
            seen = str(ended)
            break
    if not seen:
        seen = _failure(run.finish())
    unlike = differences(run.folder, whole.folder) if not seen else []
    if not seen and not unlike:
        options.discard(run.folder)
    elif not faults:  # something went wrong before the first kill
        faults = ["a run without any fault"]
    return [Outcome(fault, name, not seen, not seen and not unlike, seen or "; ".join(unlike[:4])) for fault in faults]


def _failure(ended: Ended) -> str:
    return "" if ended.status == 0 and ended.is_clean else str(ended)


def _aim(job: Job, moment: str, run: Path, seconds: float, rng: Random) -> bool:
    """Wait for a moment; False if the command ended before it came."""
    if moment == "start":
        pause = rng.uniform(0, seconds)
    elif moment == "training":
        if not job.wait_until(lambda: "training: from step" in job.said, pause=0.005):
            return False
        pause = rng.uniform(0, seconds / 2)
    else:
        for _ in range(rng.randint(1, 6)):
            if not job.wait_until(lambda: _parts(run)) or not job.wait_until(lambda: not _parts(run)):
                return False
        if not job.wait_until(lambda: _parts(run), pause=0.0003):
            return False
        pause = rng.uniform(0, _WRITING)
    time.sleep(pause)
    return job.running


def _parts(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob("*.part"))


def _words(number: int, moment: str) -> str:
    where = "while a checkpoint is written" if moment == "checkpoint" else "at a random moment"
    return f"{signal.Signals(number).name} {where}"
