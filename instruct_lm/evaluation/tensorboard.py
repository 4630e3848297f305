"""An evaluation in TensorBoard, beside the curves of its run."""

from __future__ import annotations

import logging
import os

import numpy as np

from instruct_lm.report.evaluations import Evaluation

log = logging.getLogger(__name__)


def record_evaluation(evaluation: Evaluation, split: str) -> None:
    """Write scores and means to the event files of the evaluated run, in place of an earlier evaluation of the split.

    Args:
        evaluation: Of a run.
        split: Begins the names: `test/score` is the mean, `test/scores` the histogram.
    """
    from torch.utils.tensorboard import SummaryWriter

    if evaluation.run is None:
        raise ValueError(f"{evaluation.folder} is no evaluation of a run")
    folder, suffix, step = evaluation.run / "tensorboard", f".{split}-evaluation", evaluation.training.get("steps", 0)
    if not os.access(folder, os.W_OK):
        log.warning("%s cannot be written: the scores are not in TensorBoard", folder)
        return
    for earlier in folder.glob(f"*{suffix}"):
        earlier.unlink()
    with SummaryWriter(folder, filename_suffix=suffix) as writer:
        scores = evaluation.values["score"]
        if (scores := scores[~np.isnan(scores)]).size:
            writer.add_histogram(f"{split}/scores", scores, step, bins=np.linspace(0, 100, 21))
            writer.add_scalar(f"{split}/score", scores.mean(), step)
        for name in ("exact_match", "chrf", "rouge_l"):
            writer.add_scalar(f"{split}/{name}", evaluation.summary[name], step)
