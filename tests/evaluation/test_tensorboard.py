"""An evaluation in the event files of its run, as TensorBoard itself reads them."""

from pathlib import Path

import numpy as np
import pytest

from instruct_lm.evaluation.metrics import METRICS
from instruct_lm.evaluation.tensorboard import record_evaluation

SUMMARY = {name: 10.0 * number for number, name in enumerate(METRICS)}


def read(folder: Path) -> tuple[dict[str, tuple[int, float]], list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    assert all(len(values) == 1 for values in scalars.values())
    return {tag: values[0] for tag, values in scalars.items()}, tags["histograms"]


def test_a_second_evaluation_of_the_split_replaces_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    record_evaluation(tmp_path, "test", 7, np.array([0.0, 100.0]), SUMMARY)
    record_evaluation(tmp_path, "validation", 7, np.array([np.nan]), SUMMARY)
    record_evaluation(tmp_path, "test", 7, np.array([80.0, np.nan, 60.0]), SUMMARY)
    scalars, histograms = read(folder)
    assert histograms == ["verdict/test_scores"]
    assert scalars["verdict/test_score"] == (7, 70.0)
    assert "validation/score" not in scalars
    for split in ("test", "validation"):
        assert [scalars[f"verdict/{split}_{name}"] for name in SUMMARY] == [(7, value) for value in SUMMARY.values()]


def test_a_run_without_event_files_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record_evaluation(tmp_path, "test", 7, np.array([80.0]), SUMMARY)
    assert "not writable" in caplog.text
    assert list(tmp_path.iterdir()) == []
