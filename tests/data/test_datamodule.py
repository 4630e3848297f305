"""The plan of an epoch, and the data module on real files."""

import json
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.sampling import MicroBatch, StepSampler
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError


def samplers(n: int, world_size: int, **settings: object) -> list[StepSampler]:
    lengths, weights = np.arange(1, n + 1) * 7 % 23, np.arange(1.0, n + 1)
    return [StepSampler(lengths, weights, rank=r, world_size=world_size, **settings) for r in range(world_size)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.booleans())
@example(n=3, batch_size=1, accumulate=2, world_size=2, group=False)  # the second process has no row for its second
@example(n=1, batch_size=1, accumulate=1, world_size=3, group=False)
def test_every_row_is_seen_once_and_every_step_knows_its_weight(
    n: int, batch_size: int, accumulate: int, world_size: int, group: bool
) -> None:
    settings = {"batch_size": batch_size, "accumulate": accumulate, "group_by_length": group}
    ranks = [list(sampler) for sampler in samplers(n, world_size, **settings)]
    assert {len(rank) for rank in ranks} == {len(samplers(n, world_size, **settings)[0])}
    assert sorted(row for rank in ranks for micro in rank if not micro.idle for row in micro.rows) == list(range(n))
    for start in range(0, len(ranks[0]), accumulate):  # as Lightning counts: the last step may have fewer
        step = [micro for rank in ranks for micro in rank[start : start + accumulate]]
        weight = sum(row + 1.0 for micro in step if not micro.idle for row in micro.rows)
        assert all(0 < len(micro.rows) <= batch_size for micro in step)
        assert [micro.step_weight for micro in step] == [weight] * len(step)


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 90), st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.booleans(), st.booleans())
def test_a_step_of_several_processes_holds_the_rows_of_one_process_with_their_batch(
    n: int, batch_size: int, accumulate: int, world_size: int, group: bool, shuffle: bool
) -> None:
    options = {"group_by_length": group, "shuffle": shuffle}
    (one,) = samplers(n, 1, batch_size=batch_size * accumulate * world_size, **options)
    ranks = [
        list(sampler) for sampler in samplers(n, world_size, batch_size=batch_size, accumulate=accumulate, **options)
    ]
    steps = [
        sorted(
            row for rank in ranks for micro in rank[start : start + accumulate] if not micro.idle for row in micro.rows
        )
        for start in range(0, len(ranks[0]), accumulate)
    ]
    whole = [sorted(micro.rows) for micro in one]
    assert steps == whole


def test_grouping_within_a_step_does_not_change_which_rows_share_it() -> None:
    (one,), (four,) = samplers(64, 1, batch_size=16), samplers(64, 1, batch_size=4, accumulate=4)
    together = [sorted(micro.rows) for micro in one]
    micros = list(four)
    assert [sorted(row for m in micros[i : i + 4] for row in m.rows) for i in range(0, 16, 4)] == together
    first = [four.lengths[m.rows] for m in micros[:4]]
    assert all(a.min() >= b.max() for a, b in pairwise(first))


def test_each_epoch_has_its_own_order_and_each_seed_its_own() -> None:
    orders = set()
    for seed in range(5):
        (sampler,) = samplers(40, 1, batch_size=4, seed=seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            order = [row for m in sampler for row in m.rows]
            assert [row for m in sampler for row in m.rows] == order
            orders.add(tuple(order))
    assert len(orders) == 25  # so the second epoch of one seed is not the first of the next


def test_an_epoch_goes_on_where_it_stopped() -> None:
    (sampler,) = samplers(40, 1, batch_size=4)
    whole = list(sampler)
    sampler.start = 3
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole  # the next epoch starts at its beginning


def test_a_step_without_weight_names_its_rows() -> None:
    sampler = StepSampler(np.ones(6, int), np.array([1, 1, 1, 0, 0, 1.0]), batch_size=2, shuffle=False, seed=0)
    sampler.weights[:] = 0
    with pytest.raises(InputError, match=r"entries are \[0, 1\]"):
        next(iter(sampler))


@pytest.mark.parametrize(("n", "step_size", "batch_size"), [(40, 8, 8), (41, 8, 3), (9, 4, 1), (3, 8, 2)])
def test_steps_keep_their_rows_on_any_number_of_processes(n: int, step_size: int, batch_size: int) -> None:
    planned = []
    for world_size in (1, 2, 3, 4):
        ranks = samplers(n, world_size, batch_size=batch_size, step_size=step_size, seed=3)
        every, done = ranks[0].accumulate, [list(rank) for rank in ranks]
        assert every == -(-step_size // (batch_size * world_size))
        steps = [[m for micros in done for m in micros[i : i + every]] for i in range(0, len(done[0]), every)]
        planned.append([(sorted(r for m in s if not m.idle for r in m.rows), s[0].step_weight) for s in steps])
    assert planned[0] == planned[1] == planned[2] == planned[3]


def test_an_idle_micro_batch_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries(20)))
    data = data_module(path)
    data.setup()
    batch = data.encoded["train"][MicroBatch([2], 5.0, idle=True)]
    assert batch.input_ids.numel() > 0
    assert batch.weights.sum() == batch.response_weights.sum() == 0
    assert batch.step_weight == 5.0


def entries(n: int) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "input": "", "output": f"{i}, of course."} for i in range(n)]


def data_module(path: Path | list[dict[str, str]], **settings: object) -> InstructionDataModule:
    return InstructionDataModule(path, load_tokenizer("bytes"), block_size=512, **settings)


def test_the_weight_of_a_step_is_that_of_its_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries(40)))
    for weight, mask_header in ((1.0, False), (0.0, False), (0.1, True)):
        data = data_module(path, prompt_loss_weight=weight, mask_header=mask_header, batch_size=3)
        data.trainer = pl.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False)
        data.setup()
        batches = list(data.train_dataloader())
        assert len(batches) == 12  # 34 entries: 5 steps of 2 x 3, then 4 in 2 x 2
        for i in range(0, 12, 2):
            total = sum(float(batch.weights.sum()) for batch in batches[i : i + 2])
            assert [batch.step_weight for batch in batches[i : i + 2]] == pytest.approx([total] * 2, rel=1e-6)


def test_the_loader_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries(40)))
    data = data_module(path, batch_size=4)
    data.setup()
    loader = data.train_dataloader()
    whole = [batch.entries for batch in loader]
    assert loader.state_dict() == {"steps": 0}  # the epoch is over
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    other = data.train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert [batch.entries for batch in other] == whole[3:]


def test_the_real_entries_are_split_as_in_the_book(shared_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = data_module(shared_dir / "data" / "instruction-data.json")
    data.setup()
    assert [len(part) for part in data.splits] == [935, 110, 55]
    assert "splits: train 935, test 110, validation 55" in caplog.text


def test_entries_may_be_a_list() -> None:
    data = data_module(entries(40))
    data.prepare_data()
    data.setup("fit")
    assert [example.prompt[0].text for example in data.splits.test] == [f"Say {i}." for i in range(34, 38)]
    with pytest.raises(InputError, match=r"the list of entries: 1 of 2 entries are malformed\. .*\n  entry 2: output"):
        data_module([{"instruction": "a", "output": "b"}, {"instruction": "c"}]).setup()


def test_each_stage_has_its_loader() -> None:
    data = data_module(entries(100), batch_size=3)
    data.setup("test")
    assert list(data.encoded) == ["test"]  # not encoded before it is needed
    assert sorted(entry for batch in data.test_dataloader() for entry in batch.entries) == list(range(86, 96))
    data.setup("predict")
    assert [len(batch) for batch in data.predict_dataloader()] == [3, 3, 3, 1]
    assert next(iter(data.predict_dataloader()))[0] == data.splits.test[0]


def test_rows_of_similar_length_share_a_batch_of_validation_and_where_asked_of_training() -> None:
    made = [{"instruction": "x" * (i * 37 % 100), "output": "y"} for i in range(1, 101)]
    for group in (False, True):
        data = data_module(made, batch_size=2, test_fraction=0.05, group_by_length=group)
        data.setup()
        for loader, grouped in ((data.val_dataloader(), True), (data.train_dataloader(), group)):
            spans = [max(batch.lengths) - min(batch.lengths) for batch in loader if len(batch.lengths) == 2]
            assert (sum(spans) / len(spans) < 20) == grouped


def test_near_duplicates_of_held_out_entries_are_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    colours = [f"Which colour has the fruit called {name}?" for name in ("apple", "melon", "plum", "fig")]
    others = [f"{word.capitalize()} rivers are {word} and {word * 2}." for word in map(chr, range(97, 113))]
    said = [*colours, *others]
    said[-1] = colours[1].upper()  # in the validation split; entry 2 is in the training split
    data = data_module([{"instruction": text, "output": "x"} for text in said], deduplicate=0.99)
    data.setup("fit")
    assert [entry.number for entry in data.splits.train] == [1, *range(3, 18)]
    assert [len(part) for part in data.splits] == [16, 2, 1]
    assert "1 training entries removed that are near to a test or validation entry: entry 2 (like 20: 1" in caplog.text
