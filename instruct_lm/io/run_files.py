"""Names of the files and folders in a run folder."""

from pathlib import Path

CONFIG_FILE = Path(".hydra", "config.yaml")
BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"  # the one before last, used where last is damaged
UNTUNED = "untuned"  # given instead of a checkpoint: the weights before training
SUMMARY = "summary.json"  # written last, so a run that has it is complete
MADE_FROM = "made_from.json"  # hashes of the files that the run was made from

# An evaluation has a summary too, and:
RESPONSES = "responses.json"  # the entries with the answers
MADE_BY = "responses.made.json"  # what determined the answers
SCORES = "scores.jsonl"  # a line for each entry
JOB = "job.json"  # in the folder of a multirun's job: how its last try ended
JOBS = "jobs.json"  # in the multirun's folder: its jobs


def evaluation_dir(run: Path, split: str = "test", checkpoint: str = "best") -> Path:
    """Where a run's evaluation lies: `evaluation/test`, `evaluation/test-untuned`."""
    return run / "evaluation" / (split if checkpoint == "best" else f"{split}-{checkpoint}")
