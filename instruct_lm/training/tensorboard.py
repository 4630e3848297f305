"""A run in TensorBoard: its curves, and for HParams what a sweep varies, with the final losses and scores."""

import operator
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from instruct_lm.config import TrainConfig
from instruct_lm.io.conf_files import flatten
from instruct_lm.io.sweep_files import swept_keys

CHIEF = ("mask_instructions", "prompt_loss_weight", "seed", "optimizer.lr")
"""The settings that HParams shows of every run, besides those that a sweep varies."""

OTHERS = (
    *("model.name", "data.name", "prompt.style", "mask_header", "data.batch_size", "lora.rank"),
    *("optimizer.weight_decay", "trainer.accumulate", "trainer.max_epochs"),
)
"""Those of a run outside a multirun that follow them."""

METRICS = ("val/response_loss", "verdict/test_score", "val/loss", "verdict/test_chrf", "verdict/test_exact_match")
"""What HParams compares runs by: the last value of each; an evaluation writes the scores."""


class Curves(TensorBoardLogger):
    """Lightning's logger without the chart of the epoch, which Lightning adds to every value."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log numbers by step."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def record_hparams(trainer: pl.Trainer, config: TrainConfig, summary: Mapping[str, Any]) -> None:
    """Write the settings of a run for TensorBoard's HParams, those of a multirun's job that the multirun varies.

    TensorBoard shows five settings and five metrics unless it is told otherwise: settings that differ before the
    others, each in alphabetical order. It takes what differs, and the metrics, from the run that it reads first. A
    multirun gives it the chief settings and what it varies, so that the metrics stand within a screen's width.

    Args:
        trainer: Of the run, which has ended.
        config: The run's.
        summary: With `prompt_loss_weight`, the one that null has become.
    """
    if not trainer.is_global_zero:
        return
    named = {"model": "model.name", "data": "data.name", "lora": "lora.rank", "prompt": "prompt.style"}
    swept = {named.get(key, key) for key in swept_keys(config.folder)}  # a choice by the key that names it
    varied = [key for key in flatten(config.model_dump()) if key in swept]
    keys = dict.fromkeys([*varied, *CHIEF, *([] if varied else OTHERS)])
    values = {key: operator.attrgetter(key)(config) for key in keys}
    values["prompt_loss_weight"] = summary["prompt_loss_weight"]
    values["mask_instructions"] = summary["prompt_loss_weight"] == 0  # what was trained: a weight of 0 masks too
    settings = {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str))}
    first = [*varied, *(key for key in CHIEF if key not in varied)]
    # HParams would show a bool as 0 or 1.
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    experiment, *session = hparams(texts, dict.fromkeys(METRICS, 0.0))
    content = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(content.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in first[:5]
    content.content = data.SerializeToString()
    for event in (experiment, *session):
        trainer.logger.experiment._get_file_writer().add_summary(event)  # type: ignore[union-attr]  # a closed one opens
    trainer.logger.save()  # type: ignore[union-attr]
