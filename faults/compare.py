"""Whether two runs ended alike, bit for bit: weights, optimizer, schedule, every logged value, the summary."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_lm.io.run_files import BEST, LAST, SUMMARY

MEASURED = ("train/tokens_per_second", "train/memory_gb")
"""Curves that no two runs share."""

_STATES = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
_NUMBERS = ("before", "after", "epochs", "steps", "entries", "trained_parameters", "prompt_loss_weight")


def differences(run: Path, reference: Path, with_curves: bool = True) -> list[str]:
    """How a run's end differs from another's; empty where it is the same, bit for bit.

    Compared are the weights, the states of optimizer and schedule in both checkpoints, each logged value of each step,
    also where a step was logged twice, and the summary's numbers. Parts of files that lie about are a difference too.
    """
    found = [f"left behind: {path.name}" for path in run.rglob("*.part")]
    for name in (BEST, LAST):
        found += [f"{name}: {place}" for place in _unequal(_states(run / name), _states(reference / name))]
    if with_curves:
        found += _curves_differ(curves(run), curves(reference))
    numbers = [_numbers(each / SUMMARY) for each in (run, reference)]
    return found + [f"{SUMMARY}: {place}" for place in _unequal(*numbers)]


def curves(run: Path) -> dict[str, dict[int, set[str]]]:
    """Tag → step → the values logged there, as `float.hex` gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: dict[str, dict[int, set[str]]] = {}
    for file in sorted((run / "tensorboard").glob("events.out.*")):
        # Each by itself: files of the same second are not read in the order of their steps.
        log = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            for point in log.Scalars(tag):
                if tag not in MEASURED:
                    logged.setdefault(tag, {}).setdefault(point.step, set()).add(float(point.value).hex())
    return logged


def evaluation(folder: Path) -> Any:
    """What an evaluation found: its answers and its scores; the seconds and paths are left out."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    scores = {score["index"]: score.get("score") for score in map(json.loads, lines)}
    answers = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
    return {
        "answers": [answer["model_response"] for answer in answers],
        "scores": [scores[index] for index in sorted(scores)],
        "summary": {key: summary[key] for key in ("n", "scored", "failed", "mean", "ci95", "exact_match", "chrf")},
    }


def _states(path: Path) -> Any:
    import torch

    if not path.is_file():
        return None
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in _STATES if name in checkpoint}


def _numbers(path: Path) -> Any:
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: summary.get(name) for name in _NUMBERS}


def _curves_differ(mine: dict[str, dict[int, set[str]]], other: dict[str, dict[int, set[str]]]) -> Iterator[str]:
    for tag in sorted(mine.keys() | other.keys()):
        a, b = mine.get(tag, {}), other.get(tag, {})
        steps = [step for step in sorted(a.keys() | b.keys()) if a.get(step) != b.get(step)]
        if steps:
            step = steps[0]
            values = " and ".join(str([float.fromhex(value) for value in each.get(step, ())]) for each in (a, b))
            yield f"{tag} at {len(steps)} steps, first {step}: {values}"


def _unequal(mine: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two trees of tensors and plain values differ."""
    import torch

    if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
        if mine.dtype != other.dtype or mine.shape != other.shape or not torch.equal(_bytes(mine), _bytes(other)):
            yield f"{place} differs"
    elif isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in {**mine, **other}:
            if (key in mine) != (key in other):
                yield f"{place}/{key} is missing"
            else:
                yield from _unequal(mine[key], other[key], f"{place}/{key}")
    elif isinstance(mine, Sequence) and isinstance(other, Sequence) and not isinstance(mine, str):
        if len(mine) != len(other):
            yield f"{place} has {len(mine)} items, not {len(other)}"
        for n, pair in enumerate(zip(mine, other, strict=False)):
            yield from _unequal(*pair, f"{place}/{n}")
    elif repr(mine) != repr(other):
        yield f"{place} is {mine!r:.60}, not {other!r:.60}"


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8)  # so that NaN equals itself, and -0 is not 0
