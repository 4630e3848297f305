"""What the callbacks write and count, with a trainer that is told where it stands."""

from types import SimpleNamespace
from typing import Any

import pytest

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.prompts import ALPACA
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.model.generation import GREEDY, Sampling
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder, Response
from instruct_lm.training import callbacks
from instruct_lm.training.callbacks import SampleResponses, Throughput, ValidateEvery
from instruct_lm.training.module import InstructionTuner


def test_samples_are_short_greedy_and_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Responder] = []

    def answer(self: Responder, conversations: Any) -> list[Response]:
        asked.append(self)
        return [Response(f"a|{i}\nb", 3, True) for i, _ in enumerate(conversations)]

    monkeypatch.setattr(Responder, "answer", answer)
    model = GPT(GPTConfig(vocab_size=257, block_size=300, n_layer=1, n_head=1, n_embd=8))
    responder = Responder(model, load_tokenizer("bytes"), ALPACA, 256, Sampling(temperature=1.0))
    tuner = InstructionTuner(model, responder)
    turns = (Turn("system", "Be brief."), Turn("user", "Add.", "1, 2"), Turn("assistant", "3"))
    written: list[Any] = []
    logger = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *args: written.append(args)))
    trainer = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, logger=logger, global_step=7, progress_bar_callback=None
    )
    samples = SampleResponses([Conversation(turns), Conversation.of("Say x.", "", "x")])
    samples.on_validation_end(trainer, tuner)  # type: ignore[arg-type]
    assert written == [
        (
            "responses",
            "| instruction | reference | response |\n|---|---|---|\n"
            "| Be brief. Add. 1, 2 | 3 | a\\|0<br>b |\n| Say x. | x | a\\|1<br>b |",
            6,  # as the curves, whose first step is 0
        )
    ]
    assert [(each.max_new_tokens, each.sampling) for each in asked] == [(32, GREEDY)]
    for change in ({"is_global_zero": False}, {"sanity_checking": True}, {"logger": None}):
        other = SimpleNamespace(**{**vars(trainer), **change})
        samples.on_validation_end(other, tuner)  # type: ignore[arg-type]
    assert len(written) == 1
    trainer.global_step = 0
    samples.on_validation_end(trainer, tuner)  # type: ignore[arg-type]
    assert written[1][2] == 0  # before training


def test_throughput_counts_tokens_and_seconds_of_steps_and_of_the_whole_run_also_after_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([8.0, 10.0, 12.0, 14.0, 50.0, 51.0, 53.0])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(callbacks, "peak_memory", lambda device: 3e9)
    logged: list[tuple[str, float]] = []
    module = SimpleNamespace(device=None, log=lambda name, value, **_: logged.append((name, value)))
    throughput = Throughput(started=8.0)
    for tokens, started in ((30, 8.0), (70, 48.0)):
        resumed = Throughput(started)
        resumed.load_state_dict(throughput.state_dict())
        throughput = resumed
        throughput.on_train_batch_start()
        throughput.on_train_batch_end(None, module, None, SimpleNamespace(n_tokens=tokens), 0)  # type: ignore[arg-type]
    assert (throughput.tokens, throughput.seconds) == (100, 3.0)
    assert throughput.summary() == {"seconds": 11.0, "train_seconds": 3.0, "tokens_per_second": 33.3}
    memory = ("train/memory_gb", 3.0)
    first = [("train/tokens_per_second", 15.0), ("train/tokens_seen", 30.0), memory]
    assert logged == [*first, ("train/tokens_per_second", 70.0), ("train/tokens_seen", 100.0), memory]


@pytest.mark.parametrize(
    ("batches", "accumulate", "interval", "expected"),
    [
        (9, 1, 0.5, [[5, 9], [5, 9]]),
        (9, 2, 0.5, [[6, 9], [6, 9]]),  # between optimizer steps
        (10, 1, 0.1, [list(range(1, 11))] * 2),
        (4, 1, 2, [[], [4]]),
        (4, 1, 1.5, [[], [2, 4]]),  # and after the last step of all
        (4, 1, 3, [[], [4]]),
    ],
)
def test_validations_follow_their_intervals(
    batches: int, accumulate: int, interval: float, expected: list[list[int]]
) -> None:
    validated: list[list[int]] = []
    steps = -(-batches // accumulate)
    for epoch in range(2):
        validated.append([])
        for batch in range(batches):
            done = batch + 1
            trainer = SimpleNamespace(
                num_training_batches=batches, accumulate_grad_batches=accumulate, current_epoch=epoch,
                global_step=epoch * steps + (steps if done == batches else done // accumulate),
                estimated_stepping_batches=2 * steps, val_check_batch=None,
            )  # fmt: skip
            ValidateEvery(interval).on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
            if done % trainer.val_check_batch == 0:
                validated[-1].append(done)
    assert validated == expected
