"""Which signal ends a run, and when it is heeded; the signals are real."""

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from instruct_lm.errors import StoppedError
from instruct_lm.io import processes
from instruct_lm.training.signals import StopSignals

TRAINER: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=2, num_training_batches=5, global_step=3)


@pytest.fixture
def noted() -> Iterator[StopSignals]:
    noted = StopSignals()
    yield noted
    noted.teardown(TRAINER, None, "fit")


def test_the_first_of_several_counts_once_its_step_is_done(noted: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (processes.LAUNCHED, "RANK"):  # what has started this process passes each of them on
        monkeypatch.setenv(name, "1")
    before = signal.getsignal(signal.SIGTERM)
    noted.on_train_start(TRAINER, None)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    heeded = []
    for batch in range(2):
        noted.on_train_batch_end(TRAINER, None, None, None, batch)
        heeded.append(noted.requested)
    assert heeded == [None, signal.SIGTERM]
    noted.teardown(TRAINER, None, "fit")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_one_finds_what_was_there_before(noted: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(processes.LAUNCHED, raising=False)
    before = [signal.getsignal(number) for number in processes.SIGNALS]
    noted.on_train_start(TRAINER, None)  # type: ignore[arg-type]
    assert before != [signal.getsignal(number) for number in processes.SIGNALS]
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.getsignal(number) for number in processes.SIGNALS]


@pytest.mark.parametrize(
    ("hook", "more"),
    [
        ("on_train_batch_end", (None, None, 4)),  # the last step of an epoch is shorter
        ("on_train_epoch_end", ()),  # after the validation
    ],
)
def test_it_is_heeded_at_the_end_of_an_epoch(noted: StopSignals, hook: str, more: tuple[Any, ...]) -> None:
    noted.on_train_start(TRAINER, None)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGTERM)
    getattr(noted, hook)(TRAINER, None, *more)
    assert noted.requested == signal.SIGTERM


def test_one_that_comes_while_the_last_step_is_saved_is_no_success(noted: StopSignals) -> None:
    noted.on_train_start(TRAINER, None)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"after step 3, the last\.") as stopped:
        noted.on_train_end(TRAINER, None)  # type: ignore[arg-type]
    assert stopped.value.signal == signal.SIGTERM


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_signal_that_is_ignored_as_under_nohup_stays_ignored(noted: StopSignals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        noted.on_train_start(TRAINER, None)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGHUP)
        noted.on_train_batch_end(TRAINER, None, None, None, 1)
        assert noted.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)
