"""What TensorBoard's HParams shows of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from instruct_lm.commands.check_config import make_config
from instruct_lm.config import TrainConfig
from instruct_lm.training.tensorboard import Curves, record_hparams
from tests.run_commands import composed


@pytest.mark.parametrize(
    ("overrides", "weight", "shown"),
    [((), 1, "false"), (("mask_instructions=true",), 0, "true"), (("prompt_loss_weight=0",), 0, "true")],
)
def test_a_weight_of_0_masks_the_instructions_however_it_was_given(
    tmp_path: Path, overrides: tuple[str, ...], weight: float, shown: str
) -> None:
    config = make_config(TrainConfig, {**composed("train", *overrides), "output_dir": str(tmp_path)})
    logger = Curves(tmp_path, name="tensorboard", version="", default_hp_metric=False)
    trainer: Any = SimpleNamespace(is_global_zero=True, logger=logger)
    record_hparams(trainer, config, {"prompt_loss_weight": weight})
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["mask_instructions"].string_value == shown
    assert hparams["prompt_loss_weight"].number_value == weight
