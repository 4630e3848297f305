"""Evaluations read from their folders: scores, answers, settings, and the losses of the run behind them."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from instruct_lm.data.dataset import Splits, duplicates_between, load_examples, split
from instruct_lm.data.prompts import Example
from instruct_lm.errors import InputError
from instruct_lm.io.run_files import CONFIG_FILE, SUMMARY, UNTUNED
from instruct_lm.io.sources import DownloadError, Fetcher

METRICS = ("score", "exact_match", "chrf", "rouge_l")
CURVES = ("train/loss", "val/loss", "val/response_loss")
# Keys that change no result. Values of other keys tell settings apart.
_FILES = {"cache_dir", "offline", "mirror", "output_dir", "resume", "evaluate"}
_IRRELEVANT = _FILES | {"trainer.progress", "trainer.keep_last", "data.num_workers"}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and, if its folder names one, the training run behind it.

    Attributes:
        name: Its name in the report.
        alone: Whether the user named this evaluation itself, not a folder of several: then it is never grouped.
        folder: With `summary.json`, `scores.jsonl` and `responses.json`.
        run: The training run's folder; None for an untuned model or answers of unknown origin.
        summary: Content of `summary.json`.
        entries: (n,) dicts of the texts `instruction`, `input`, `output` and `model_response`.
        values: Name in `METRICS` → (n,) float64: `exact_match` 0 or 1, the others 0-100; NaN where there is no score.
        config: Of the run, or of the untuned model; empty if unknown.
        settings: Dotted key → value of everything that decides the result, the judge included.
        training: The run's own `summary.json`; empty without a run.
    """

    name: str
    alone: bool
    folder: Path
    run: Path | None
    summary: Mapping[str, Any]
    entries: Sequence[Mapping[str, str]]
    values: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    training: Mapping[str, Any]

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Name in `CURVES` → (optimizer step, loss) from the run's TensorBoard events, in the order of steps.

        Of a step that was logged twice the last value counts. Values that are not finite are left out.
        """
        if self.run is None or not (self.run / "tensorboard").is_dir():
            return {}
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it reports every file
        events = EventAccumulator(str(self.run / "tensorboard"), size_guidance={SCALARS: 0})  # 0: keep all
        events.Reload()
        curves = {}
        for name in set(CURVES) & set(events.Tags()[SCALARS]):
            by_step = {event.step: event.value for event in events.Scalars(name) if math.isfinite(event.value)}
            curves[name] = sorted(by_step.items())
        return {name: points for name, points in curves.items() if points}

    @cached_property
    def seen(self) -> list[int] | None:
        """Places of the entries whose instruction and input are also in the training split; None if unknown.

        For an untuned model, this is the training split that its configuration describes.
        """
        if "data" not in self.config:
            return None
        keys = ("data", "seed", "cache_dir", "mirror")
        train = _training_split(json.dumps([self.config.get(key) for key in keys]))
        if train is None:
            return None
        answered = [Example(entry["instruction"], entry["input"], entry["output"]) for entry in self.entries]
        found = duplicates_between(Splits(train, answered, []))
        return sorted(place for duplicate in found for place in duplicate.places["test"])


def collect(arguments: Sequence[str]) -> tuple[list[Evaluation], list[Path]]:
    """Load the evaluations that the arguments name.

    Args:
        arguments: `PATH` or `NAME=PATH`, where the path is that of an evaluation, of a run whose test split was
            evaluated, or of a folder (a multirun) that holds such.

    Returns:
        The evaluations, in the order given, those of a folder by their job numbers; and the runs of such folders that
        are not evaluated yet.

    Raises:
        InputError: A path that holds no complete evaluation; the message names the command that makes one.
    """
    loaded: list[Evaluation] = []
    waiting: list[Path] = []
    for argument in arguments:
        name, _, location = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        path = Path(location)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder. Give one that train.py or evaluate.py wrote.")
        if (folder := _evaluation_folder(path)) is not None:
            loaded.append(load(folder, name))
            continue
        inside = {p: _evaluation_folder(p) for p in sorted(filter(Path.is_dir, path.iterdir()), key=_job_order)}
        found = [folder for folder in inside.values() if folder]
        runs = [p for p, folder in inside.items() if folder is None and (p / CONFIG_FILE).is_file()]
        if not found:
            raise InputError(f"{path} holds no evaluation: run python evaluate.py run={(runs or [path])[0]} first.")
        if name:
            raise InputError(f"{argument}: a folder's evaluations are named by their settings. Leave out {name}=.")
        loaded += [load(folder, alone=False) for folder in found]
        waiting += runs
    if len({item.folder.resolve() for item in loaded}) < len(loaded):
        raise InputError("The same evaluation is given twice: leave one out.")
    return loaded, waiting


def load(folder: Path, name: str = "", alone: bool = True) -> Evaluation:
    """Load one evaluation.

    Args:
        folder: Where `evaluate.py` wrote it.
        name: Its name in the report; empty: made from the folder's name.
        alone: As in `Evaluation`.

    Raises:
        InputError: A file is missing or damaged, or the scoring was interrupted.
    """
    summary = _read(folder / SUMMARY)
    if not {"judge", "failed"} <= summary.keys():
        raise InputError(f"{folder / SUMMARY} lacks the judge: another version wrote it. Run evaluate.py again.")
    entries = _read_entries(folder / "responses.json")
    made_by = _read(folder / "responses.made.json", required=False).get("made_by", {})
    checkpoint = _read(folder / ".hydra" / "evaluate" / "config.yaml", required=False).get("checkpoint")
    run = None if checkpoint == UNTUNED else _find_run(folder, summary)
    config = {key: value for key, value in made_by.items() if key != "files"}
    config |= _read(run / CONFIG_FILE) if run else {}
    # An evaluation has its own split and generation options, whatever its run's configuration says.
    own = {key: made_by[key] for key in ("generation", "split") if key in made_by}
    decisive = {**config, **own, "judge": summary["judge"], "checkpoint": checkpoint if run else None}
    return Evaluation(
        name=name or _folder_name(folder),
        alone=alone,
        folder=folder,
        run=run,
        summary=summary,
        entries=entries,
        values=_read_scores(folder / "scores.jsonl", len(entries)),
        config=config,
        settings={key: value for key, value in _flatten(decisive) if key not in _IRRELEVANT},
        training=_read(run / SUMMARY, required=False) if run else {},
    )


@cache
def _training_split(key: str) -> list[Example] | None:
    """The training split of a configuration's data if the file is on this machine; never downloads it."""
    data, seed, cache_dir, mirror = json.loads(key)
    source = data["source"]
    fetcher = Fetcher(Path(cache_dir).expanduser() if cache_dir else None, offline=True, mirror=mirror)
    try:
        path = fetcher.fetch(source, sha256=data["sha256"])
        examples = load_examples(path, data["limit"])
    except (InputError, DownloadError):
        return None
    return split(examples, data["train_fraction"], data["test_fraction"], data["shuffle"], seed).train


def _job_order(path: Path) -> list[str | float]:
    """`10_lr-1` after `9_lr-1`, `weight-0.1` after `weight-0`."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", path.name)  # texts and numbers in turn
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _evaluation_folder(path: Path) -> Path | None:
    """The folder itself if it holds an evaluation, or that of a run's test split."""
    folders = (path / "evaluation" / "test", path)  # a run has a summary of its own, but no responses beside it
    return next((f for f in folders if (f / SUMMARY).is_file() and (f / "responses.json").is_file()), None)


def _folder_name(folder: Path) -> str:
    """`outputs/demo/evaluation/test` → `demo`, `…/test-last` → `demo test-last`, other folders by their own name."""
    folder = folder.resolve()
    if folder.parent.name != "evaluation":
        return folder.name
    return folder.parents[1].name if folder.name == "test" else f"{folder.parents[1].name} {folder.name}"


def _find_run(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """The run whose folder holds the evaluation, or else the run that the summary names."""
    candidates = [folder.resolve().parents[1]] if folder.resolve().parent.name == "evaluation" else []
    candidates += [Path(summary["run"])] if summary.get("run") else []
    return next((run for run in candidates if (run / CONFIG_FILE).is_file()), None)


def _read(path: Path, kind: type = dict, required: bool = True) -> Any:
    """Content of a JSON or YAML file, or lines of a JSONL file; empty if the file is missing and not required."""
    if not required and not path.is_file():
        return kind()
    parse = {".json": json.loads, ".yaml": yaml.safe_load, ".jsonl": str.splitlines}[path.suffix]
    try:
        value = parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or f"it is not valid {path.suffix[1:].upper()} ({error})"
        raise InputError(f"{path} cannot be read: {reason}. Run evaluate.py again.") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} must hold {'an object' if kind is dict else 'a list'}. Run evaluate.py again.")
    return value


def _read_entries(path: Path) -> list[dict[str, str]]:
    entries = []
    for number, entry in enumerate(_read(path, list), start=1):
        texts = {}
        for key in ("instruction", "input", "output", "model_response"):
            value = entry.get(key) if isinstance(entry, dict) else None
            value = "" if value is None and key == "input" else value
            if not isinstance(value, str):
                raise InputError(f"{path}: entry {number} has no text {key!r}. Run evaluate.py again.")
            texts[key] = value.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
        entries.append(texts)
    return entries


def _read_scores(path: Path, n: int) -> dict[str, np.ndarray]:
    """The columns of `scores.jsonl`; of two lines for an entry the last counts, a torn line does not."""
    scored = {}
    for line in _read(path, list):
        try:
            item = json.loads(line)
            scored[item["index"]] = [float("nan" if item[metric] is None else item[metric]) for metric in METRICS]
        except (ValueError, TypeError, LookupError):
            continue
    done = [scored[i] for i in range(n) if i in scored]
    if len(done) < n:
        raise InputError(f"{path} has {len(done)} of {n} entries: the evaluation was interrupted. Run it again.")
    return dict(zip(METRICS, np.array(done).reshape(n, len(METRICS)).T, strict=True))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"model": {"name": "gpt2"}}` → `("model.name", "gpt2")`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
