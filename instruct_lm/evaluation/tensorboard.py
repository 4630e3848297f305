"""An evaluation's scores in TensorBoard, next to the curves of its run."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instruct_lm.evaluation.metrics import METRICS

logger = logging.getLogger(__name__)


def record_evaluation(run: Path, split: str, step: int, scores: np.ndarray, summary: Mapping[str, Any]) -> None:
    """Write scores and mean metrics to a run's event files, replacing an earlier evaluation of the same split.

    Args:
        run: The run's folder; events go to its folder `tensorboard`.
        split: In the tags: `verdict/test_score` is the mean, `verdict/test_scores` the histogram. TensorBoard sorts
            charts by their tags: these of one point each come after the losses.
        step: Optimizer step of the evaluated weights.
        scores: (n,) float, 0-100; NaN where there is no score.
        summary: With the names in `METRICS`, as `summarise` returns them.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder, suffix = run / "tensorboard", f".{split}-evaluation"
    if not os.access(folder, os.W_OK):
        logger.warning("%s is not writable: TensorBoard will not show the scores", folder)
        return
    for earlier in folder.glob(f"*{suffix}"):
        earlier.unlink()
    with SummaryWriter(folder, filename_suffix=suffix) as writer:
        if (scores := scores[~np.isnan(scores)]).size:
            writer.add_histogram(f"verdict/{split}_scores", scores, step, bins=np.linspace(0, 100, 21))
            writer.add_scalar(f"verdict/{split}_score", scores.mean(), step)
        for name in METRICS:
            writer.add_scalar(f"verdict/{split}_{name}", summary[name], step)
