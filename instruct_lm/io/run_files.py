"""Names of the files in a run folder."""

from pathlib import Path

CONFIG_FILE = Path(".hydra", "config.yaml")
BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
UNTUNED = "untuned"  # in place of a checkpoint: the weights that a run started from
SUMMARY = "summary.json"  # written last: a run that has one is complete
BEFORE = "before.json"  # the validation losses before the first step
