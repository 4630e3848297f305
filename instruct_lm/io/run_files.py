"""Names of the files in a run folder."""

from pathlib import Path

CONFIG_FILE = Path(".hydra", "config.yaml")
BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"  # the one before last, used where last is damaged
UNTUNED = "untuned"  # given instead of a checkpoint: the weights before training
SUMMARY = "summary.json"  # written last, so a run that has it is complete
BEFORE = "before.json"  # validation losses before the first step
MADE_FROM = "made_from.json"  # hashes of the files that the run was made from
JOB = "job.json"  # in the folder of a multirun's job: how its last try ended
JOBS = "jobs.json"  # in the multirun's folder: its jobs
