"""What `evaluate.py` takes for answers made before, and where it writes its scores."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import evaluate
from instruct_lm.errors import InputError
from instruct_lm.evaluation import tensorboard
from instruct_lm.report import evaluations
from tests.run_commands import typed


def config(folder: Path, *args: str) -> Any:
    given = ["model=gpt2-tiny", "data=sample", "device=cpu", "judge=reference", f"output_dir={folder}", *args]
    return typed("evaluate", *given)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("device.precision=32-true", True),  # the CPU's own
        ("judge=none", True),
        ("device.precision=bf16-mixed", False),
        ("generation.max_new_tokens=9", False),
        ("prompt=phi3", False),
        ("seed=8", False),
        ("split=validation", False),
        ("data.limit=30", False),
    ],
)
def test_answers_count_where_all_that_determines_them_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, same: bool
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluate, "respond", lambda config, checkpoint, made_by: made.append(made_by))
    monkeypatch.setattr(evaluate, "score", lambda *_: 0)
    for args in ([], [other]):
        assert evaluate.main(config(tmp_path, *args)) == 0
    assert (made[0] == made[1]) == same


@pytest.mark.parametrize(("lora", "weights"), [("none", False), ("r16", True)])
def test_sources_that_have_changed_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str, weights: bool
) -> None:
    told: list[tuple[Path, bool]] = []

    def refuse(run: Path, config: Any, fetcher: Any, *, weights: bool) -> None:
        told.append((run, weights))
        raise InputError("the data have changed")

    monkeypatch.setattr(evaluate, "check_origin", refuse)
    monkeypatch.setattr(evaluate, "fetch_sources", lambda *_, **__: None)
    settings = config(tmp_path, f"lora={lora}").model_copy(update={"run": "run"})
    with pytest.raises(InputError, match="the data have changed"):
        evaluate.respond(settings, tmp_path / "best.ckpt", {})
    assert told == [(Path("run"), weights)]  # those of the base count under adapters


@pytest.mark.parametrize("checkpoint", ["best", "last", "untuned"])
def test_the_scores_of_the_best_weights_alone_go_to_the_curves_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    recorded: list[tuple[Any, ...]] = []
    loaded = SimpleNamespace(training={"steps": 7}, values={"score": [1.0]}, summary={})
    monkeypatch.setattr(evaluate, "judge_responses", lambda *_: 0)
    monkeypatch.setattr(evaluations, "load", lambda *_: loaded)
    monkeypatch.setattr(tensorboard, "record_evaluation", lambda *given: recorded.append(given))
    settings = config(tmp_path).model_copy(update={"checkpoint": checkpoint})
    assert evaluate.score(settings, tmp_path / "responses.json", {"run": "run"}) == 0
    assert recorded == ([(Path("run"), "test", 7, [1.0], {})] if checkpoint == "best" else [])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 1)])
def test_an_entry_without_a_score_of_either_judge_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    statuses = iter([first, second])
    monkeypatch.setattr(evaluate, "judge_responses", lambda *_: next(statuses))
    monkeypatch.setattr(evaluations, "load", lambda *_: None)
    monkeypatch.setattr("instruct_lm.report.comparison.compare", lambda *_: None)
    monkeypatch.setattr("instruct_lm.report.tables.agreement_table", lambda *_: SimpleNamespace(rows=[]))
    settings = config(tmp_path, "second_judge.kind=reference")
    assert evaluate.score(settings, tmp_path / "responses.json", {}) == max(first, second)
