"""Evaluations read from their folders: scores, answers, settings, and the losses of the run behind them."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from instruct_lm.data.conversation import Conversation
from instruct_lm.data.dataset import duplicates_between, read_conversations, split
from instruct_lm.errors import InputError
from instruct_lm.evaluation.responses import load_responses, made_by_of
from instruct_lm.evaluation.score_file import read_scores
from instruct_lm.io.conf_files import flatten
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import content_hash
from instruct_lm.io.records import read_record
from instruct_lm.io.run_files import CONFIG_FILE, JOBS, RESPONSES, SCORES, SUMMARY, UNTUNED, evaluation_dir
from instruct_lm.io.sweep_files import unfinished_jobs

METRICS = ("score", "exact_match", "chrf", "rouge_l")
CURVES = ("train/loss", "val/loss", "val/response_loss")
# Keys that change no result. Values of other keys tell settings apart.
_PLACES = {"cache_dir", "offline", "mirror", "output_dir", "resume", "evaluate"}
_IRRELEVANT = _PLACES | {"trainer.progress", "trainer.keep_last", "data.num_workers"}


class NotEvaluatedError(InputError):
    """A folder holds no evaluation.

    Args:
        folder: The folder.
        run: The first run in it to evaluate, or the folder itself.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        super().__init__(f"{folder} holds no evaluation: run evaluate.py first.")
        self.folder, self.run = folder, run


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and, if its folder names one, the training run behind it.

    Attributes:
        name: Its name in the report.
        alone: Whether the user named this evaluation itself, not a folder of several: then it is never grouped.
        run: The training run's folder; None for an untuned model or answers of unknown origin.
        summary: Content of `summary.json`.
        examples: (n,) entries of the split.
        answers: (n,) the model's answers to them.
        values: Name in `METRICS` → (n,) float64: `exact_match` 0 or 1, the others 0-100; NaN where there is no score.
        config: Of the run, or of the untuned model, with the judge and the evaluation's own options.
        settings: Dotted key → value of everything in it that decides the result.
        training: The run's own `summary.json`; empty without a run.
        day: On which it was scored, such as 2026-01-31; empty if unknown.
    """

    name: str
    alone: bool
    run: Path | None
    summary: Mapping[str, Any]
    examples: list[Conversation]
    answers: list[str]
    values: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    day: str = ""

    @property
    def precision(self) -> str | None:
        """In which the model answered; None for answers of unknown origin. Before it was written down, it was fp32."""
        return self.summary.get("precision") or ("32-true" if "model" in self.summary else None)

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
        return curves

    @cached_property
    def seen(self) -> list[int] | None:
        """Places of the entries whose prompt is also in the training split; None if unknown.

        For an untuned model, this is the training split that its configuration describes.
        """
        if "data" not in self.config:
            return None
        data, cache_dir = self.config["data"], self.config.get("cache_dir")
        if data.get("deduplicate") is not None:
            return []  # equal prompts have the highest similarity
        fetcher = Fetcher(Path(cache_dir) if cache_dir else None, offline=True, mirror=self.config.get("mirror"))
        try:
            file, reading = fetcher.fetch(data["source"], sha256=data["sha256"]), ("columns", "unusable", "clean")
            options = {key: data[key] for key in reading if key in data}
            examples = read_conversations(file, data["limit"], **options).conversations
        except InputError:  # the file is not on this machine, or another one
            return None
        splits = split(examples, data["train_fraction"], data["test_fraction"], data["shuffle"], self.config["seed"])
        found = duplicates_between(splits._replace(test=self.examples, validation=[]))
        return sorted(number - 1 for duplicate in found for number in duplicate.places["test"])


def collect(arguments: Sequence[str]) -> tuple[list[Evaluation], list[Path]]:
    """Load the evaluations that the arguments name.

    Args:
        arguments: `PATH` or `NAME=PATH`, where the path is that of an evaluation, of a run whose test split was
            evaluated, or of a folder (a multirun) that holds such.

    Returns:
        The evaluations, in the order given, those of a folder by their job numbers, behind those of the untuned models
        that a multirun's jobs hold, unless one of these is given; and the complete runs of such folders that are not
        evaluated yet.

    Raises:
        InputError: A path that holds no complete evaluation; a NotEvaluatedError names the run to evaluate.
    """
    chosen: list[tuple[Path, str, bool]] = []  # arguments of `load`
    waiting: list[Path] = []
    named = [("", "", each) if Path(each).exists() else each.rpartition("=") for each in arguments]
    given = {Path(location).resolve() for _, _, location in named}
    for argument, (name, _, location) in zip(arguments, named, strict=True):
        path = Path(location)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder. Give one that train.py or evaluate.py wrote.")
        if (folder := _evaluation_folder(path)) is not None:
            chosen.append((folder, name, True))
            continue
        inside = {p: _evaluation_folder(p) for p in sorted(filter(Path.is_dir, path.iterdir()), key=_job_order)}
        found = [folder for folder in inside.values() if folder]
        left = {job.name for job in unfinished_jobs(path)}
        runs = [p for p, at in inside.items() if at is None and (p / CONFIG_FILE).is_file() and p.name not in left]
        if not found:
            raise NotEvaluatedError(path, (runs or [path])[0])
        if name:
            raise InputError(f"{argument}: a folder's evaluations are named by their settings. Leave out {name}=.")
        before = [evaluation_dir(p, checkpoint=UNTUNED) for p in inside] if (path / JOBS).is_file() else []
        if given.isdisjoint(folder.resolve() for folder in before):
            chosen += [(folder, "", True) for folder in before if _evaluation_folder(folder)]
        chosen += [(folder, "", False) for folder in found]
        waiting += runs
    if len({folder.resolve() for folder, _, _ in chosen}) < len(chosen):
        raise InputError("The same evaluation is given twice: leave one out.")
    return [load(folder, name, alone) for folder, name, alone in chosen], waiting


def load(folder: Path, name: str = "", alone: bool = True) -> Evaluation:
    """Load one evaluation.

    Args:
        folder: Where `evaluate.py` wrote it.
        name: Its name in the report; empty: made from the folder's name.
        alone: As in `Evaluation`.

    Raises:
        InputError: A file is missing or damaged, or the scoring was interrupted.
    """
    summary = read_record(folder / SUMMARY)
    if summary is None or not {"judge", "failed", "made_from"} <= summary.keys():
        raise InputError(f"{folder / SUMMARY} is missing, damaged or of another version. Run evaluate.py again.")
    if (folder / RESPONSES).is_file() and content_hash(folder / RESPONSES) != summary["made_from"].get("responses"):
        raise InputError(f"{folder / RESPONSES} is not the file that {SUMMARY} was made from. Run evaluate.py again.")
    examples, answers = _read_answers(folder / RESPONSES)
    made_by = made_by_of(folder / RESPONSES)
    checkpoint = _read(folder / ".hydra" / "evaluate" / "config.yaml").get("checkpoint")
    run = None if checkpoint == UNTUNED else _find_run(folder, summary)
    for key in ("files", "precision"):  # the first is no setting, the second stands in the summary and tells none apart
        made_by.pop(key, None)
    config = made_by | (_read(run / CONFIG_FILE) if run else {})
    # An evaluation has its own split and generation options, whatever its run's configuration says.
    config |= {key: made_by[key] for key in ("generation", "split") if key in made_by}
    config |= {"judge": summary["judge"], "checkpoint": checkpoint if run else None}
    return Evaluation(
        name=name or _folder_name(folder),
        alone=alone,
        run=run,
        summary=summary,
        examples=examples,
        answers=answers,
        values=_read_scores(folder / SCORES, len(examples)),
        config=config,
        settings={key: value for key, value in flatten(config).items() if key not in _IRRELEVANT},
        training=(read_record(run / SUMMARY) or {}) if run else {},
        day=str(summary.get("date", "")),
    )


def _job_order(path: Path) -> list[str | float]:
    """`10_lr-1` after `9_lr-1`, `weight-0.1` after `weight-0`, `lr-5e-4` after `lr-5e-5`."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", path.name)  # texts and numbers in turn
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _evaluation_folder(path: Path) -> Path | None:
    """The folder itself if it holds an evaluation, or that of a run's test split."""
    folders = (evaluation_dir(path), path)  # a run has a summary of its own, but no responses beside it
    return next((f for f in folders if (f / SUMMARY).is_file() and (f / RESPONSES).is_file()), None)


def _folder_name(folder: Path) -> str:
    """`outputs/demo/evaluation/test` → `demo`, `…/test-last` → `demo test-last`, `…/test-untuned` → `untuned`."""
    folder = folder.resolve()
    if folder.parent.name != "evaluation":
        return folder.name
    if folder.name == f"test-{UNTUNED}":
        return UNTUNED
    return folder.parents[1].name if folder.name == "test" else f"{folder.parents[1].name} {folder.name}"


def _find_run(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """The run whose folder holds the evaluation, or else the run that the summary names."""
    candidates = [folder.resolve().parents[1]] if folder.resolve().parent.name == "evaluation" else []
    candidates += [Path(summary["run"])] if summary.get("run") else []
    return next((run for run in candidates if (run / CONFIG_FILE).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    """The values in a YAML file; empty if there is no such file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        if not isinstance(value, dict):
            raise ValueError(f"it holds {value!r:.40}, no keys")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}. Run evaluate.py again.") from error
    return value


def _read_answers(path: Path) -> tuple[list[Conversation], list[str]]:
    """The entries of `responses.json`, which scoring has checked, and the answers to them."""
    examples, answers = [], []
    for number, entry in enumerate(load_responses(path), start=1):
        match entry:
            case {"instruction": str(), "output": str(), "model_response": str(answer)}:
                examples.append(Conversation.from_entry(entry, number))
                answers.append(answer)
            case _:
                texts = "instruction, output and model_response"
                raise InputError(f"{path}: entry {number} needs the texts {texts}. Run evaluate.py again.")
    return examples, answers


def _read_scores(path: Path, n: int) -> dict[str, np.ndarray]:
    """The columns of `scores.jsonl`."""
    scored = read_scores(path)
    done = [[getattr(scored[i], metric) for metric in METRICS] for i in range(n) if i in scored]
    if len(done) < n:
        what = f"{path} has {len(done)} of {n} entries whole"
        raise InputError(f"{what}: the evaluation was interrupted, or the file is damaged. Run it again.")
    columns = np.array(done, dtype=np.float64).reshape(n, len(METRICS)).T  # None: NaN
    return dict(zip(METRICS, columns, strict=True))
