"""Damaged files: each file of a run, of a base and of the cache is damaged in each way, and what reads it is called.

The right ends: the numbers of undamaged files, or an error in words. The files in `_RECOVERED` can be made anew, or
stand elsewhere too: there an error is not enough.
"""

import queue
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from faults.commands import Ended, call, must
from faults.compare import differences, evaluation
from faults.kinds import Run, reference
from faults.options import Options
from faults.outcomes import Outcome

Damage = Callable[[Path, Random], None]
_RECOVERED = (
    "*/last.ckpt",
    "*/previous.ckpt",
    "summary.json",
    "tensorboard/*",
    "evaluation/test/*",
    "*.npz",
)
_LOCKS: dict[Path, threading.Lock] = defaultdict(threading.Lock)
_ANOTHER = "of another run"  # a checkpoint alone
_CURVES = "tensorboard/*"  # what a damaged event file held is lost


def _truncated(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * rng.uniform(0.1, 0.95))])


def _emptied(path: Path, rng: Random) -> None:
    path.write_bytes(b"")


def _a_bit_flipped(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _garbage(path: Path, rng: Random) -> None:
    path.write_bytes(rng.randbytes(max(100, path.stat().st_size)))


def _deleted(path: Path, rng: Random) -> None:
    path.unlink()


def _unreadable(path: Path, rng: Random) -> None:
    path.chmod(0)


DAMAGES: dict[str, Damage] = {
    "truncated": _truncated,
    "emptied": _emptied,
    "a bit flipped": _a_bit_flipped,
    "garbage": _garbage,
    "deleted": _deleted,
    "unreadable": _unreadable,
}


@dataclass(frozen=True)
class Scene:
    """A folder whose files are damaged one at a time, and what is called then.

    Args:
        name: Of the scene.
        folder: What lies there undamaged; each trial has a copy.
        files: Patterns of those to damage, relative to the folder.
        act: Calls a command on a copy; returns how it ended and how its results differ from the right ones.
        skip: Damages that nobody can notice here.
        place: Where the copy must lie, since a run records the path; None: anywhere.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    act: Callable[[Path, bool], tuple[Ended, list[str]]]
    skip: tuple[str, ...] = ()
    place: Path | None = None


def damage(options: Options) -> Iterator[Outcome]:
    """Damage every file of every scene in every way."""
    places: queue.Queue[Path] = queue.Queue()  # paths stay the same, as those of a user's folder do
    for n in range(options.jobs):
        places.put(options.work / f"damaged-{n}")
    trials = [
        (scene, file, how)
        for scene in scenes(options)
        for pattern in scene.files
        for file in sorted(path.relative_to(scene.folder) for path in scene.folder.glob(pattern) if path.is_file())
        for how in (*DAMAGES, _ANOTHER)
        if how not in scene.skip
        and (how != _ANOTHER or file.suffix == ".ckpt")
        and options.wants(f"damage:{scene.name}:{file}:{how}")
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(lambda each: _trial(each[0], each[1], each[2], places, options), trials)


def scenes(options: Options) -> Iterator[Scene]:
    """The scenes, made when they are wanted."""
    longer = ("trainer.max_epochs=3",)
    if options.wants("damage:resume"):
        whole = reference("gpt2", options.work, *longer)
        stopped = Run("gpt2", options.work / "stopped", options.work / "cache-of-stopped", *longer).stop_early()

        def resumed(run: Path, with_curves: bool) -> tuple[Ended, list[str]]:
            ended = call("train.py", f"resume={run}", folder=run.parent, limited=True)
            return ended, [] if ended.status else differences(run, whole.folder, with_curves)

        def without_cache(place: Path, with_curves: bool) -> tuple[Ended, list[str]]:
            run = _copy(stopped.folder, place.with_name(f"{place.name}-run"))
            ended = call("train.py", f"resume={run}", f"cache_dir={place}", folder=run.parent, limited=True)
            return ended, [] if ended.status else differences(run, whole.folder)

        files = ("checkpoints/*.ckpt", "*.json", ".hydra/config.yaml", "tensorboard/events.*")
        yield Scene("resume", stopped.folder, files, resumed)
        yield Scene("resume-cache", stopped.cache, ("tokens/*.npz",), without_cache)
    if options.wants("damage:evaluate") or options.wants("damage:complete"):
        yield from _of_a_complete_run(options)
    for form in ("hf", "gguf"):
        if options.wants(f"damage:base-{form}"):
            yield from _of_a_base(form, options)


def _of_a_complete_run(options: Options) -> Iterator[Scene]:
    whole = reference("gpt2", options.work)
    scored = _copy(whole.folder, options.work / "scored")
    settings = (f"cache_dir={whole.cache}", "offline=true")
    must("evaluate.py", f"run={scored}", *settings, folder=options.work)
    right = evaluation(scored / "evaluation" / "test")

    def evaluated(run: Path, with_curves: bool) -> tuple[Ended, list[str]]:
        ended = call("evaluate.py", f"run={run}", *settings, folder=run.parent, limited=True)
        same = ended.status != 0 or evaluation(run / "evaluation" / "test") == right
        return ended, [] if same else ["other answers or scores"]

    def resumed(run: Path, with_curves: bool) -> tuple[Ended, list[str]]:
        ended = call("train.py", f"resume={run}", folder=run.parent, limited=True)
        return ended, [] if ended.status else differences(run, whole.folder, with_curves)

    yield Scene("evaluate", whole.folder, ("checkpoints/best.ckpt", "*.json", ".hydra/config.yaml"), evaluated)
    yield Scene("evaluate-again", scored, ("evaluation/test/*.json*",), evaluated)
    yield Scene("complete", whole.folder, ("checkpoints/*.ckpt", "*.json", ".hydra/config.yaml"), resumed)


def _of_a_base(form: str, options: Options) -> Iterator[Scene]:
    """A base in the hub's layout, or a GGUF file, and a run of adapters on it that was stopped."""
    source, place = reference("llama", options.work), options.work / f"on-{form}"
    base, cache = place / "base", f"cache_dir={source.cache}"
    place.mkdir()
    must(
        "instruct_lm.export", f"run={source.folder}", f"format={form}", f"output_dir={base}", cache, folder=options.work
    )
    weights = base if form == "hf" else next(base.glob("*.gguf"))
    settings = ("model=auto", f"model.weights={weights}")
    whole = reference("gpt2-lora", options.work, *settings)
    Run("gpt2-lora", place / "run", source.cache, *settings).stop_early()
    good = _copy(place, options.work / f"on-{form}-good")

    def resumed(copy: Path, with_curves: bool) -> tuple[Ended, list[str]]:
        ended = call("train.py", f"resume={copy / 'run'}", folder=copy, limited=True)
        return ended, [] if ended.status else differences(copy / "run", whole.folder)

    def trained(copy: Path, with_curves: bool) -> tuple[Ended, list[str]]:
        run = Run("gpt2-lora", copy / "new", source.cache, *settings)
        ended = call("train.py", *run.first, folder=copy, limited=True)
        return ended, [] if ended.status else differences(run.folder, whole.folder)

    files = ("base/*.safetensors", "base/*config.json", "base/tokenizer.json", "base/*.gguf")
    yield Scene(f"base-{form}-resume", good, files, resumed, place=place)
    # A first run has no record to hold a flipped bit against.
    yield Scene(f"base-{form}-train", good, files, trained, ("a bit flipped",), place)


def _trial(scene: Scene, file: Path, how: str, places: "queue.Queue[Path]", options: Options) -> Outcome:
    """Damage a file of a copy, and see what becomes of it."""
    name, fault, place = f"damage:{scene.name}:{file}:{how}", _row(scene, file), places.get()
    try:
        with _LOCKS[scene.place or place]:
            copy = _copy(scene.folder, scene.place or place / scene.name)
            if how == _ANOTHER:
                other = reference("gpt2", options.work, "seed=7").folder / "checkpoints"
                shutil.copy(other / ("best.ckpt" if file.stem == "best" else "last.ckpt"), copy / file)
            else:
                DAMAGES[how](copy / file, Random(f"{options.seed}{name}"))
            ended, unlike = scene.act(copy, not fnmatch(str(file), _CURVES))
    except Exception as error:
        return Outcome(fault, name, False, False, f"the results cannot be read: {error!r:.200}")
    finally:
        places.put(place)
    if ended.status == 0:
        seen = "; ".join(unlike[:3]) if ended.is_clean else str(ended)
        return Outcome(fault, name, not seen, not unlike, seen)
    recovers = how not in ("unreadable", _ANOTHER) and any(fnmatch(str(file), pattern) for pattern in _RECOVERED)
    survived = ended.refused and not recovers
    return Outcome(fault, name, survived, None, "" if survived else str(ended))


def _row(scene: Scene, file: Path) -> str:
    kind = "events" if file.name.startswith("events.") else "tokens" if file.suffix == ".npz" else file.name
    return f"damaged {kind}, {scene.name}"


def _copy(folder: Path, place: Path) -> Path:
    """A fresh copy, times and all."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))
