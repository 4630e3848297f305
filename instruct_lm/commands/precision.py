"""The precision in which a run computes: as asked for, else by what its device is good at; and that of its answers."""

import logging
from typing import TypeVar

import torch

from instruct_lm.commands.runs import load_run_config
from instruct_lm.config import EvaluateConfig, TrainConfig
from instruct_lm.io import processes

log = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", TrainConfig, EvaluateConfig)

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Of products."""

PAYS = 1.2
"""How many times as fast as in fp32 products in bf16 must be for bf16 to be the default on a CPU."""


def for_training(config: TrainConfig, accelerator: str) -> TrainConfig:
    """The configuration of a run with its precision decided, so that a resume and an evaluation find it there.

    Args:
        config: The run's.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
    """
    if config.device.precision is not None:
        return _as_given(config, accelerator)
    if accelerator == "cpu" and config.resume is not None:
        return with_precision(config, "32-true")  # a run of a version that had no other on a CPU
    precision, reason = default(accelerator)
    if precision == "16-mixed" and config.optimizer.in_backward:
        precision, reason = "32-true", f"{reason}, and 16-mixed does not go with optimizer.in_backward"
    log.info("precision: %s: %s", precision, reason)
    return with_precision(config, precision)


def for_answers(config: EvaluateConfig, accelerator: str) -> EvaluateConfig:
    """The configuration of an evaluation with its precision decided: a run answers in that in which it was trained.

    Args:
        config: The evaluation's.
        accelerator: ``cpu``, ``gpu`` or ``mps``; what it cannot do is replaced by fp32.
    """
    if config.device.precision is not None:
        return _as_given(config, accelerator)
    if config.run is None:
        precision, _ = default(accelerator)
        return with_precision(config, precision)
    trained_in = load_run_config(config.run).device.precision or "32-true"
    able = {"cpu": ("32-true", "bf16-mixed"), "gpu": tuple(DTYPES), "mps": ("32-true",)}[accelerator]
    if trained_in not in able:
        log.warning("precision: 32-true; the run was trained in %s, which this device cannot do", trained_in)
    return with_precision(config, trained_in if trained_in in able else "32-true")


def default(accelerator: str) -> tuple[str, str]:
    """The precision of a device, and why: bf16 where it is the faster one, else 16-bit on a GPU, and fp32 elsewhere."""
    if accelerator == "gpu":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU multiplies in bf16"
        return "16-mixed", "this GPU has no bf16"
    if accelerator != "cpu":
        return "32-true", f"on {accelerator}"
    from instruct_lm.fast import processor

    if not processor.has_bf16():
        return "32-true", f"this CPU has neither {' nor '.join(processor.BF16_FLAGS)}"
    if processes.launcher() is not None:
        return "32-true", "each process would measure for itself; device.precision=bf16-mixed sets it for all"
    single, half = (processor.product_rate(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    found = f"a core of this CPU multiplies at {half:.0f} GFLOP/s in bf16 and {single:.0f} in fp32"
    if half < PAYS * single:
        return "32-true", found
    return "bf16-mixed", f"{found}; device.precision=32-true computes in fp32"


def _as_given(config: AnyConfig, accelerator: str) -> AnyConfig:
    """The configuration as it is; a warning if its precision is the slower one on this CPU."""
    if accelerator == "cpu" and config.device.precision == "bf16-mixed" and processes.launcher() is None:
        better, reason = default(accelerator)
        if better == "32-true":
            log.warning("precision: bf16-mixed is no faster here than device.precision=32-true: %s", reason)
    return config


def with_precision(config: AnyConfig, precision: str) -> AnyConfig:
    """The configuration with another precision."""
    return config.model_copy(update={"device": config.device.model_copy(update={"precision": precision})})
