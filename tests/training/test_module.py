"""What a training run computes: the same step by layout, accumulation and interruption."""

import itertools
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from instruct_lm.data.batching import collate
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.pieces import Kind
from instruct_lm.data.prompts import CHATML
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError, StoppedError
from instruct_lm.fast import accelerate
from instruct_lm.io.conf_files import model_config
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.respond import Responder
from instruct_lm.training import module as module_file
from instruct_lm.training.checkpoints import AtomicCheckpointIO
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings
from instruct_lm.training.saving import SaveLast
from instruct_lm.training.signals import StopSignals

ARCHITECTURES = {
    "gpt2": {},
    "llama": {"n_kv_head": 1, "norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False},
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.json"
    entries = [
        {"instruction": f"Say {'very ' * (i % 5)}{i}.", "input": "so" * (i % 3), "output": f"{i * i}!"}
        for i in range(60)
    ]
    path.write_text(json.dumps(entries))
    return path


def build(
    data_file: Path,
    architecture: str = "gpt2",
    lr: float = 1e-3,
    *,
    fast: bool = False,
    packed: bool = True,
    **data: object,
) -> tuple[InstructionTuner, InstructionDataModule]:
    config = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=16, **ARCHITECTURES[architecture])
    module = InstructionTuner(GPT(config).init_weights(1), optimizer=OptimizerSettings(lr=lr))
    if fast:
        accelerate(module, packed=packed)
    settings = {"batch_size": 6, "seed": 5, **data}
    return module, InstructionDataModule(data_file, load_tokenizer("bytes"), block_size=256, **settings)


def trainer(folder: Path, *callbacks: pl.Callback, **settings: object) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip


class Recorder(pl.Callback):
    """Losses and gradients of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
        self.grads.append({name: p.grad.clone() for name, p in module.named_parameters()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(
            float(trainer.callback_metrics["train/loss"]) if "train/loss" in trainer.callback_metrics else 0.0
        )


def run(
    data_file: Path, folder: Path, architecture: str = "gpt2", max_steps: int = 3, accumulate: int = 1, **data: object
) -> Recorder:
    recorder = Recorder()
    module, datamodule = build(data_file, architecture, **data)
    trainer(folder, recorder, max_steps=max_steps, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(
        module, datamodule
    )
    return recorder


def assert_same_gradients(one: Recorder, other: Recorder) -> None:
    assert len(one.grads) == len(other.grads) > 0
    for ours, theirs in zip(one.grads, other.grads, strict=True):
        for name, grad in ours.items():
            torch.testing.assert_close(
                grad, theirs[name], rtol=2e-3, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weight", [1.0, 0.0, 0.1])
@pytest.mark.parametrize("mask_header", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_fast_steps_have_the_plain_gradients(
    data_file: Path, tmp_path: Path, architecture: str, weight: float, mask_header: bool, packed: bool
) -> None:
    settings = {"prompt_loss_weight": weight, "mask_header": mask_header}
    fast = run(data_file, tmp_path, architecture, fast=True, packed=packed, **settings)
    assert_same_gradients(fast, run(data_file, tmp_path, architecture, **settings))


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("fast", [True, False])
def test_accumulated_micro_batches_equal_one_batch(data_file: Path, tmp_path: Path, weight: float, fast: bool) -> None:
    one = run(data_file, tmp_path, batch_size=12, prompt_loss_weight=weight, max_steps=5)
    for batch_size, accumulate in ((4, 3), (1, 12)):
        many = run(
            data_file,
            tmp_path,
            batch_size=batch_size,
            accumulate=accumulate,
            prompt_loss_weight=weight,
            max_steps=5,
            fast=fast,
        )  # 51 entries: the fifth step has 3 only
        assert_same_gradients(one, many)


def test_the_first_step_equals_the_plain_formula(data_file: Path, tmp_path: Path) -> None:
    module, datamodule = build(data_file, prompt_loss_weight=0.3)
    datamodule.setup()
    rows = next(iter(datamodule.train_dataloader().sampler)).rows
    nll, weights = [], []
    for row in rows:
        ids = torch.from_numpy(datamodule.encoded["train"].encoded[row].input_ids).long()
        kinds = torch.from_numpy(datamodule.encoded["train"].encoded[row].kinds)
        logits = module.model(ids[None, :-1])[0]
        nll.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        weights.append(torch.where(kinds[1:] == Kind.PROMPT, 0.3, 1.0))
    loss = (torch.cat(nll) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    loss.backward()
    recorder = run(data_file, tmp_path, prompt_loss_weight=0.3, max_steps=1)
    assert recorder.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(recorder.grads[0][name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_validation_losses_are_ratios_over_the_split(data_file: Path, tmp_path: Path) -> None:
    results = []
    for batch_size in (1, 2, 4):
        module, datamodule = build(data_file, prompt_loss_weight=0.5, batch_size=batch_size)
        results.append(trainer(tmp_path).validate(module, datamodule, verbose=False)[0])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)
    module, datamodule = build(data_file, prompt_loss_weight=0.0)
    masked = trainer(tmp_path).validate(module, datamodule, verbose=False)[0]
    assert masked["val/response_loss"] == pytest.approx(results[0]["val/response_loss"], rel=1e-5)


def test_of_several_processes_and_micro_batches_each_has_its_share_of_the_step(data_file: Path) -> None:
    """Lightning divides by the micro-batches and averages over the processes; the step's weight is of all of them."""
    tuner, datamodule = build(data_file, batch_size=6)
    datamodule.setup()
    batch = next(iter(datamodule.train_dataloader()))._replace(step_weight=1000.0)
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: {"sum": 2 * x, "mean": x, "max": x}[reduce_op])
    tuner.trainer = SimpleNamespace(accumulate_grad_batches=3, world_size=2, strategy=strategy)
    weighted, response = tuner.loss(tuner.model, batch)
    torch.testing.assert_close(tuner.training_step(batch, 0), weighted / 1000 * 6)
    sums = [weighted.item(), float(batch.weights.sum()), response.item(), float(batch.response_weights.sum())]
    assert tuner._reduced(tuner._train_sums) == pytest.approx([2 * each for each in sums])  # the other has the same


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    tuner, logged = InstructionTuner(GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4))), dict[str, float]()
    tuner.trainer = SimpleNamespace(testing=False, world_size=1)
    tuner.log = lambda name, value, **_: logged.update({name: value})
    tuner._sums = [torch.tensor([1600.0, 2.0, 3 * np.log(4), 3.0])]  # nats and tokens
    tuner.on_validation_epoch_end()
    assert (logged["val/loss"], logged["val/perplexity"]) == (800, np.inf)
    assert (logged["val/response_loss"], logged["val/response_perplexity"]) == pytest.approx((np.log(4), 4))


def final_weights(module: InstructionTuner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("stop_at", [1, 4, 9, 10, 18])  # 51 entries in steps of 6: 9 batches an epoch
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_ends_where_the_whole_one_does(
    data_file: Path, tmp_path: Path, stop_at: int, accumulate: int
) -> None:
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "val_check_interval": 0.5}
    module, datamodule = build(data_file, fast=True)
    trainer(tmp_path, **settings).fit(module, datamodule)
    whole = final_weights(module)

    class Interrupt(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, batch_idx: int
        ) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    last = tmp_path / "last.ckpt"
    module, datamodule = build(data_file, fast=True)
    signals = StopSignals()
    with pytest.raises(StoppedError):
        trainer(tmp_path, Interrupt(), signals, SaveLast(last, tmp_path / "previous.ckpt", signals), **settings).fit(
            module, datamodule
        )
    module, datamodule = build(data_file, fast=True)
    trainer(tmp_path, **settings).fit(module, datamodule, ckpt_path=last, weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(
            module.state_dict()[name], tensor, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_random_numbers_depend_on_seed_epoch_micro_batch_and_process_alone() -> None:
    model = GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4))

    def drawn(seed: int, epoch: int, batch: int, process: int) -> tuple[float, float, float]:
        tuner = InstructionTuner(model, seed=seed)
        tuner.trainer = SimpleNamespace(current_epoch=epoch, global_rank=process, accumulate_grad_batches=2)
        tuner.on_train_batch_start(None, batch)
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    places = list(itertools.product(range(3), repeat=4))
    draws = [drawn(*place) for place in places]
    assert [len(set(of_one)) for of_one in zip(*draws, strict=True)] == [81] * 3
    assert [drawn(*place) for place in places] == draws


def test_a_signal_while_the_last_step_is_saved_is_not_lost(data_file: Path, tmp_path: Path) -> None:
    class Late(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            signal.raise_signal(signal.SIGTERM)

    module, datamodule = build(data_file)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="Stopped after step 1, the last") as stopped:
        trainer(tmp_path, StopSignals(), Late(), max_steps=1).fit(module, datamodule)
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_can_be_trained_further(data_file: Path, tmp_path: Path) -> None:
    module, datamodule = build(data_file)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule)
    whole = final_weights(module)
    last = tmp_path / "last.ckpt"
    module, datamodule = build(data_file)
    trainer(tmp_path, SaveLast(last, tmp_path / "previous.ckpt", StopSignals()), max_epochs=2).fit(module, datamodule)
    module, datamodule = build(data_file)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule, ckpt_path=last, weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fast", [True, False])
def test_the_optimizer_in_the_backward_pass_is_the_same_optimizer(
    data_file: Path, tmp_path: Path, architecture: str, fast: bool
) -> None:
    weights = []
    for in_backward in (False, True):
        module, datamodule = build(data_file, architecture, fast=fast)
        module.settings = OptimizerSettings(lr=1e-3, in_backward=in_backward, warmup_steps=3)
        trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(module, datamodule)
        weights.append(final_weights(module))
        matrices = [p for name, p in module.named_parameters() if p.dim() == 2 and ".h." in name]
        assert all((p.grad is None) == in_backward for p in matrices)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", None)])
def test_adamw_is_fused_where_gradients_can_be_clipped_and_logged_unscaled(precision: str, fused: bool | None) -> None:
    tuner = InstructionTuner(GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4)))
    tuner.trainer = SimpleNamespace(precision=precision)
    group = tuner.configure_optimizers()["optimizer"].param_groups[0]
    assert (group["fused"], group["foreach"]) == (fused, None)  # None: torch chooses by the device


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(data_file: Path, tmp_path: Path, precision: str) -> None:
    norms: list[float] = []

    class Watched(InstructionTuner):
        def on_train_batch_end(self, *_: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    module, datamodule = build(data_file, "gpt2", fast=True)
    watched = Watched(module.model)
    trainer(tmp_path, max_steps=3, limit_val_batches=0, precision=precision, gradient_clip_val=0.01).fit(
        watched, datamodule
    )
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)  # they are larger


def test_scaled_gradients_are_not_used_in_the_backward_pass() -> None:
    model = GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4))
    tuner = InstructionTuner(model, optimizer=OptimizerSettings(in_backward=True))
    tuner.trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(InputError, match=r"bf16-mixed.*in_backward=false"):
        tuner.configure_optimizers()


def test_adafactor_lowers_the_loss(data_file: Path, tmp_path: Path) -> None:
    module, datamodule = build(data_file)
    module.settings = OptimizerSettings("adafactor", lr=1e-2)
    recorder = Recorder()
    trainer(tmp_path, recorder, max_steps=20, max_epochs=-1, limit_val_batches=0).fit(module, datamodule)
    assert recorder.losses[-1] < recorder.losses[0] - 0.1


@pytest.mark.parametrize("kind", [{}, {"in_backward": True}, {"name": "adafactor"}])
def test_an_optimizer_has_its_settings_and_only_matrices_decay(kind: dict[str, Any]) -> None:
    settings = OptimizerSettings(lr=3e-4, weight_decay=0.2, beta1=0.8, beta2=0.95, eps=1e-6, **kind)
    decayed, kept = settings.build(GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4))).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    for group in (decayed, kept):
        assert group["lr"] == 3e-4
        assert settings.name != "adamw" or (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OptimizerSettings(), [1, 1, 1, 1]),
        (OptimizerSettings(warmup_steps=2), [0.5, 1, 1, 1]),
        (OptimizerSettings(schedule="cosine"), [1, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi t / 4)) / 2
        (OptimizerSettings(schedule="cosine", warmup_steps=2), [0.5, 1, 1, 0.5]),
    ],
)
def test_learning_rate_schedules(settings: OptimizerSettings, expected: list[float]) -> None:
    assert [settings.factor(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)
    # A cosine does not rise again after its end, where a run that was made shorter may stand.
    assert settings.factor(9, 4) == pytest.approx(0 if settings.schedule == "cosine" else 1)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3), "no pickle": lambda: None}, path)
    assert torch.load(path)["weights"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_test_and_predict_work_with_any_trainer(data_file: Path, tmp_path: Path) -> None:
    module, datamodule = build(data_file, prompt_loss_weight=0.5)
    losses = trainer(tmp_path).test(module, datamodule, verbose=False)[0]
    rows = [datamodule.encoded["test"].encoded[i] for i in range(6)]  # a tenth of 60
    nll = [F.cross_entropy(module.model(ids[None, :-1])[0], ids[1:], reduction="none")
           for ids in (torch.from_numpy(row.input_ids).long() for row in rows)]  # fmt: skip
    response = torch.cat(
        [row[torch.from_numpy(kinds[1:] == Kind.RESPONSE)] for row, (_, kinds) in zip(nll, rows, strict=True)]
    )
    assert losses["test/response_loss"] == pytest.approx(response.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="give InstructionTuner a responder"):
        trainer(tmp_path).predict(module, datamodule)
    responder = Responder(module.model, datamodule.tokenizer, datamodule.prompt_style, max_new_tokens=5)
    tuner = InstructionTuner(module.model, responder)
    answers = trainer(tmp_path).predict(tuner, datamodule)
    assert [answer for batch in answers for answer in batch] == responder.answer(datamodule.splits.test)
    assert tuner.answer("Say 3.", "now") == responder.answer([Conversation.of("Say 3.", "now", "")])[0].text


def test_a_checkpoint_of_adapters_alone_loads_into_a_tuner_adapted_after_it_was_made(
    data_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapters.ckpt"
    for resumed in (False, True):
        module, datamodule = build(data_file)
        add_lora(module.model, rank=2, alpha=4)
        trained = trainer(tmp_path, max_steps=4 if resumed else 2)
        trained.fit(module, datamodule, ckpt_path=path if resumed else None)
        assert trained.global_step == (4 if resumed else 2)
        trained.save_checkpoint(path)
    assert all("lora_" in name for name in torch.load(path, weights_only=True)["state_dict"])


def test_the_files_of_a_pretrained_model_are_held_against_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, str | None]] = []
    model, tokenizer = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=1, n_embd=4)), load_tokenizer("bytes")
    monkeypatch.setattr(
        Fetcher, "fetch", lambda self, source, *, sha256=None: fetched.append((source, sha256)) or Path(source)
    )
    monkeypatch.setattr(module_file, "load_pretrained", lambda config, path: model)
    monkeypatch.setattr(module_file, "load_tokenizer", lambda path: tokenizer)
    tuner = InstructionTuner.from_pretrained("smollm2-135m", style="chatml", max_new_tokens=7)
    wanted = model_config("smollm2-135m")
    assert fetched == [(wanted.weights, wanted.weights_sha256), (wanted.tokenizer, wanted.tokenizer_sha256)]
    assert None not in dict(fetched).values()
    assert tuner.responder == Responder(model, tokenizer, CHATML, 7)


def test_a_step_without_weight_names_its_entries(data_file: Path) -> None:
    module, _ = build(data_file)
    batch = collate([np.array([1, 2, 3])], [np.zeros(3)], [np.ones(3)], entries=[41])
    with pytest.raises(ValueError, match=r"no token of this step counts in the loss: entries \[41\]"):
        module.training_step(batch, 0)
