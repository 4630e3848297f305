"""Evaluations as they lie in their folders: scores, answers, settings, and the losses of the run behind them."""

from __future__ import annotations

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
from instruct_lm.io.run_files import CONFIG_FILE, UNTUNED
from instruct_lm.io.sources import DownloadError, Fetcher

METRICS = ("score", "exact_match", "chrf", "rouge_l")
CURVES = ("train/loss", "val/loss", "val/response_loss")
_DECIDE_NOTHING = (
    "cache_dir",
    "offline",
    "mirror",
    "output_dir",
    "resume",
    "evaluate",
    "trainer.progress",
    "trainer.keep_last",
    "data.num_workers",
)
_MADE_BY = ("model", "data", "prompt", "lora", "generation", "seed", "split")
EVALUATE_CONFIG_FILE = Path(".hydra", "evaluate", "config.yaml")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and, if its folder names one, the training run behind it.

    Attributes:
        name: What a report calls it.
        alone: Given by itself, and not as one of a folder's: it is not put together with others.
        folder: With `summary.json`, `scores.jsonl` and `responses.json`.
        run: The training run's folder; None for an untuned model or answers of unknown origin.
        summary: Content of `summary.json`.
        entries: (n,) dicts of the texts `instruction`, `input`, `output` and `model_response`.
        values: Name in `METRICS` → (n,) float64: `exact_match` 0 or 1, the others 0-100; NaN where there is no score.
        config: Of the run, or of the untuned model; empty if unknown.
        settings: Dotted key → value of all that decides the result, the judge included.
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
        """Name in `CURVES` → (optimizer step, loss), in the order of steps; empty without a run."""
        return read_curves(self.run / "tensorboard") if self.run else {}

    @cached_property
    def seen(self) -> list[int] | None:
        """Places of the entries whose instruction and input stand in the training split too; None: unknown.

        For an untuned model it is the training split that its configuration describes.
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
        name, path = ("", Path(argument)) if Path(argument).exists() else _name_and_path(argument)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder. Give one that train.py or evaluate.py wrote.")
        if (folder := _evaluation_folder(path)) is not None:
            loaded.append(load(folder, name))
            continue
        if (path / CONFIG_FILE).is_file():
            raise InputError(f"{path} is not evaluated yet: run python evaluate.py run={path} first.")
        inside = sorted(filter(Path.is_dir, path.iterdir()), key=_job_order)
        found = [folder for p in inside if (folder := _evaluation_folder(p)) is not None]
        runs = [p for p in inside if (p / CONFIG_FILE).is_file() and _evaluation_folder(p) is None]
        if not found:
            raise InputError(f"{path} holds no evaluation: run python evaluate.py run={(runs or [path])[0]} first.")
        if name:
            raise InputError(
                f"{argument}: the evaluations of a folder are called by their settings. Leave out {name}=."
            )
        loaded += [load(folder, alone=False) for folder in found]
        waiting += runs
    if len({item.folder.resolve() for item in loaded}) < len(loaded):
        raise InputError("The same evaluation is given twice: leave one out.")
    return loaded, waiting


def load(folder: Path, name: str = "", alone: bool = True) -> Evaluation:
    """Load one evaluation.

    Args:
        folder: Where `evaluate.py` wrote it.
        name: What to call it; empty: by its folder.
        alone: As in `Evaluation`.

    Raises:
        InputError: A file is missing or damaged, or the scoring was interrupted.
    """
    summary = _read_json(folder / "summary.json", dict)
    entries = [_texts(entry, i, folder) for i, entry in enumerate(_read_json(folder / "responses.json", list))]
    if not {"judge", "failed"} <= set(summary):
        raise InputError(f"{folder / 'summary.json'} lacks the judge: it is of another version. Run evaluate.py again.")
    made_file = folder / "responses.made.json"
    made_by = _read_json(made_file, dict).get("made_by", {}) if made_file.is_file() else {}
    made_by = {key: made_by[key] for key in _MADE_BY if key in made_by}
    checkpoint = _read_yaml(folder / EVALUATE_CONFIG_FILE).get("checkpoint")
    run = None if checkpoint == UNTUNED else _find_run(folder, summary)
    config = {**made_by, **(_read_yaml(run / CONFIG_FILE) if run else {})}
    given_beside_run = {key: made_by[key] for key in ("generation", "split") if key in made_by}
    decisive = {**config, **given_beside_run, "judge": summary["judge"], "checkpoint": checkpoint if run else None}
    training = run / "summary.json" if run else None
    return Evaluation(
        name=name or _folder_name(folder),
        alone=alone,
        folder=folder,
        run=run,
        summary=summary,
        entries=entries,
        values=_read_scores(folder / "scores.jsonl", len(entries)),
        config=config,
        settings={key: value for key, value in _flatten(decisive) if key not in _DECIDE_NOTHING},
        training=_read_json(training, dict) if training and training.is_file() else {},
    )


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the losses in `CURVES` from a folder of TensorBoard event files; of a step logged twice, the last counts.

    Returns:
        Name → (optimizer step, loss), in the order of steps and without values that are not finite; only names that
        have some.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of every file
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: keep all
    events.Reload()
    curves = {}
    for name in set(CURVES) & set(events.Tags()[SCALARS]):
        by_step = {event.step: event.value for event in events.Scalars(name) if math.isfinite(event.value)}
        if by_step:
            curves[name] = sorted(by_step.items())
    return curves


@cache
def _training_split(key: str) -> list[Example] | None:
    """The training split of a configuration's data, if the file is at hand; never fetches it."""
    data, seed, cache_dir, mirror = json.loads(key)
    source = data["source"]
    fetcher = Fetcher(Path(cache_dir).expanduser() if cache_dir else None, offline=True, mirror=mirror)
    try:
        path = source if source == "sample" else fetcher.fetch(source, sha256=data["sha256"])
        examples = load_examples(path, data["limit"])
    except (InputError, DownloadError):
        return None
    return split(examples, data["train_fraction"], data["test_fraction"], data["shuffle"], seed).train


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, _, path = argument.rpartition("=")
    return name, Path(path)


def _job_order(path: Path) -> list[str | float]:
    """`10_lr-1` after `9_lr-1`, `weight-0.1` after `weight-0`."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", path.name)  # texts and numbers in turn
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _evaluation_folder(path: Path) -> Path | None:
    """The folder itself if it holds an evaluation, or that of a run's test split."""
    for folder in (path / "evaluation" / "test", path):
        # a run's own summary has no responses beside it
        if (folder / "responses.json").is_file() and (folder / "summary.json").is_file():
            return folder
    return None


def _folder_name(folder: Path) -> str:
    """`outputs/demo/evaluation/test` → `demo`, `…/test-last` → `demo test-last`, other folders by their own name."""
    folder = folder.resolve()
    if folder.parent.name != "evaluation":
        return folder.name
    return folder.parents[1].name if folder.name == "test" else f"{folder.parents[1].name} {folder.name}"


def _find_run(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """The run that an evaluation lies in, or else names."""
    inside = folder.resolve().parents[1]
    candidates = [inside] if folder.resolve().parent.name == "evaluation" else []
    candidates += [Path(summary["run"])] if summary.get("run") else []
    return next((run for run in candidates if (run / CONFIG_FILE).is_file()), None)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"it is no JSON ({error})"
        raise InputError(f"{path} cannot be read: {reason}. Run evaluate.py again.") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} holds no {'object' if kind is dict else 'list'}. Run evaluate.py again.")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    """Empty if there is none."""
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _texts(entry: Any, index: int, folder: Path) -> dict[str, str]:
    texts = {}
    for key in ("instruction", "input", "output", "model_response"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str) and not (value is None and key == "input"):
            raise InputError(
                f"{folder / 'responses.json'}: entry {index + 1} has no text {key!r}. Run evaluate.py again."
            )
        # JSON may hold half of a surrogate pair, which no UTF-8 file can
        texts[key] = (value or "").encode("utf-8", "replace").decode("utf-8")
    return texts


def _read_scores(path: Path, n: int) -> dict[str, np.ndarray]:
    """The columns of `scores.jsonl`; of two lines for an entry the last counts, a torn line does not."""
    values = {metric: np.full(n, math.nan) for metric in METRICS}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Run evaluate.py again.") from error
    for line in lines:
        try:
            item = json.loads(line)
            for metric in METRICS:
                values[metric][item["index"]] = math.nan if item[metric] is None else float(item[metric])
        except (ValueError, TypeError, LookupError):
            continue
    done = n - int(np.isnan(values["exact_match"]).sum())
    if done < n:
        raise InputError(f"{path} has {done} of {n} entries: the evaluation was interrupted. Run the same again.")
    return values


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"model": {"name": "gpt2"}}` → `("model.name", "gpt2")`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
