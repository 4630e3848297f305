"""The precision that a run and its answers take, and what is said of it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from instruct_lm.commands import precision, runs
from instruct_lm.errors import InputError
from instruct_lm.fast import processor
from tests.run_commands import typed


def cpu(monkeypatch: pytest.MonkeyPatch, flags: str = "avx512_bf16", **rates: float) -> list[torch.dtype]:
    """A CPU with these flags that multiplies at these rates, in GFLOP/s; the list of rates that were asked for."""
    asked: list[torch.dtype] = []

    def rate(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return rates["fp32" if dtype == torch.float32 else "bf16"] * 1e9

    monkeypatch.setattr(processor, "cpuinfo", lambda: {"flags": f"fpu avx2 {flags}"})
    monkeypatch.setattr(processor, "product_rate", rate)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return asked


def training(*given: str) -> Any:
    return typed("train", "model=gpt2-tiny", "data=sample", "device=cpu", *given)


@pytest.mark.parametrize(
    ("flags", "fp32", "bf16", "expected"),
    [
        ("avx512_bf16", 200, 400, "bf16-mixed"),
        ("avx512f amx_bf16 amx_tile", 200, 1500, "bf16-mixed"),
        ("avx512_bf16", 200, 210, "32-true"),  # it has them, and they do not pay
        ("avx512_bf16", 50, 10, "32-true"),  # as where oneDNN is told not to use them
        ("avx512f avx512_vnni", 200, 400, "32-true"),  # no such flag: not even measured
        ("avx512_bf16_of_tomorrow", 200, 400, "32-true"),
    ],
)
def test_bf16_is_the_default_where_the_flags_promise_it_and_the_rates_keep_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: str,
    fp32: float,
    bf16: float,
    expected: str,
) -> None:
    asked = cpu(monkeypatch, flags, fp32=fp32, bf16=bf16)
    with caplog.at_level(logging.INFO):
        assert precision.for_training(training(), "cpu").device.precision == expected
    promised = not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())
    assert len(asked) == 2 * promised
    said = caplog.records[-1].getMessage()
    assert said.startswith(f"precision: {expected}: ")
    assert (f"at {bf16} GFLOP/s in bf16 and {fp32} in fp32" if promised else "neither avx512_bf16 nor amx_bf16") in said


def test_without_onednn_there_is_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, fp32=1, bf16=9)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.default("cpu")[0] == "32-true"


@pytest.mark.parametrize(
    ("given", "bf16", "warned"),
    [("bf16-mixed", 10, True), ("bf16-mixed", 900, False), ("32-true", 900, False), ("32-true", 10, False)],
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_is_asked_for_is_taken_and_a_slow_choice_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, given: str, bf16: float, warned: bool
) -> None:
    cpu(monkeypatch, fp32=100, bf16=bf16)
    config = typed(kind, "model=gpt2-tiny", "data=sample", "device=cpu", f"device.precision={given}")
    decide = precision.for_training if kind == "train" else precision.for_answers
    assert decide(config, "cpu") == config
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) == warned
    if warned:
        assert "no faster here than device.precision=32-true: a core of this CPU multiplies at 10" in warnings[0]


def test_processes_that_another_program_started_do_not_measure_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cpu(monkeypatch, fp32=1, bf16=9)
    monkeypatch.setattr(precision.processes, "launcher", lambda: "torchrun")
    assert precision.default("cpu")[0] == "32-true"
    assert asked == []


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_computes_in_16_bits(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert precision.default("gpu")[0] == expected
    assert precision.default("mps")[0] == "32-true"
    in_backward = precision.for_training(training("optimizer.in_backward=true"), "gpu")
    assert in_backward.device.precision == ("bf16-mixed" if supported else "32-true")


def run_of(folder: Path, trained_in: str | None) -> Path:
    """The folder of a run with this precision in its configuration."""
    config = training(f"output_dir={folder}")
    config.folder.mkdir()
    runs.save_config(precision.with_precision(config, trained_in))  # type: ignore[arg-type]
    return config.folder


@pytest.mark.parametrize(
    ("trained_in", "accelerator", "expected", "warned"),
    [
        ("bf16-mixed", "cpu", "bf16-mixed", False),
        ("32-true", "gpu", "32-true", False),
        ("16-mixed", "gpu", "16-mixed", False),
        (None, "cpu", "32-true", False),
        ("16-mixed", "cpu", "32-true", True),
        ("bf16-mixed", "mps", "32-true", True),
    ],
)
def test_a_run_answers_in_the_precision_that_it_was_trained_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trained_in: str | None,
    accelerator: str,
    expected: str,
    warned: bool,
) -> None:
    cpu(monkeypatch, fp32=1, bf16=9)  # what this machine is good at makes no difference
    run = run_of(tmp_path / "run", trained_in)
    decided = precision.for_answers(typed("evaluate", f"run={run}", "device=cpu"), accelerator)
    assert decided.device.precision == expected
    assert any(str(trained_in) in record.getMessage() for record in caplog.records) == warned


def test_a_model_without_a_run_answers_in_what_the_machine_is_good_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, fp32=1, bf16=9)
    untuned = typed("evaluate", "model=gpt2-tiny", "data=sample", "device=cpu")
    assert precision.for_answers(untuned, "cpu").device.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "bf16-mixed"), ({"device"}, "bf16-mixed"), ({"device", "device.precision"}, "bf16-mixed")],
)
def test_a_resumed_run_keeps_its_precision_whatever_its_device(tmp_path: Path, given: set[str], expected: str) -> None:
    run = run_of(tmp_path / "run", "bf16-mixed")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    resumed = runs.resumed(training(f"resume={run}", f"output_dir={run}"), given)
    assert resumed.device.precision == expected
    other = runs.resumed(training(f"resume={run}", "device.precision=32-true"), {"device.precision"})
    assert other.device.precision == "32-true"


def test_an_old_run_without_one_goes_on_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, fp32=1, bf16=9)
    config = training(f"output_dir={tmp_path}").model_copy(update={"resume": str(tmp_path)})
    assert precision.for_training(config, "cpu").device.precision == "32-true"


def test_16_mixed_is_refused_on_a_cpu_with_what_works_there() -> None:
    from instruct_lm.commands.build import choose_accelerator

    with pytest.raises(InputError, match=r"16-mixed needs a GPU: use 32-true or bf16-mixed\."):
        choose_accelerator(training("device.precision=16-mixed").device)


def test_experiment_masking_is_in_fp32_everywhere() -> None:
    experiment = Path(__file__).parents[2] / "conf" / "experiment" / "masking.yaml"
    assert yaml.safe_load(experiment.read_text())["device"]["precision"] == "32-true"
