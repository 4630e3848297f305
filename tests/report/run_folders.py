"""Writes run and evaluation folders as `train.py` and `evaluate.py` do, without training anything."""

import json
from pathlib import Path

import numpy as np
import yaml

from instruct_lm.evaluation.score_file import ScoredEntry, score_line
from instruct_lm.io.files import sha256_of
from instruct_lm.io.records import write_record

REFERENCE = {"kind": "reference", "score": "mean of exact match x 100 and sentence chrF"}


def write_evaluation(folder, answers, scores, *, judge=REFERENCE, questions=None, run=None, config=None, failures=()):
    """An evaluation with these answers and scores (None: failed or no judge); chrF is the score, exact match is 100."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(answers)
    questions = questions or [(f"Question {i}?", "", f"Answer {i}.") for i in range(n)]
    entries = [
        {"instruction": q, "input": extra, "output": output, "model_response": answer}
        for (q, extra, output), answer in zip(questions, answers, strict=True)
    ]
    (folder / "responses.json").write_text(json.dumps(entries))
    lines = [
        {
            "index": i,
            "score": score,
            "reason": dict(failures).get(i),
            "exact_match": score == 100,
            "chrf": 0.0 if score is None else score,
            "rouge_l": 50.0,
            "raw": None,
        }
        for i, score in enumerate(scores)
    ]
    (folder / "scores.jsonl").write_text("".join(score_line("f", ScoredEntry(**line)) + "\n" for line in lines))
    numbers = [score for score in scores if score is not None]
    summary = {
        "model": "gpt2-tiny",
        "run": str(run) if run else None,
        "n": n,
        "scored": len(numbers),
        "failed": len(failures),
        "mean": float(np.mean(numbers)) if numbers else None,
        "judge": judge,
        "ended": 0.75,
        "mean_tokens": 12.5,
        "date": "2026-01-31",
        "made_from": {"responses": sha256_of(folder / "responses.json")},
    }
    write_record(summary, folder / "summary.json")
    made_by = {"split": "test", "generation": {"max_new_tokens": 64, "seed": 123}, **(config or {})}
    made = {"made_by": made_by, "responses": [], "responses_sha256": summary["made_from"]["responses"]}
    write_record(made, folder / "responses.made.json")
    return folder


def config_of(seed=1, weight=1.0, source="sample", **more):
    data = {"name": "sample", "source": source, "sha256": None, "train_fraction": 0.85, "test_fraction": 0.1}
    return {
        "model": {"name": "gpt2-tiny", "n_layer": 2},
        "data": {**data, "shuffle": False, "limit": None, "num_workers": 0},
        "generation": {"max_new_tokens": 256, "seed": 123},
        "seed": seed,
        "prompt_loss_weight": weight,
        "cache_dir": None,
        "mirror": None,
        "output_dir": None,
        **more,
    }


def write_run(folder: Path, answers=None, scores=None, *, curves=None, config=None, **options):
    """A training run, evaluated if there are answers."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config or config_of()))
    before, after = ({"val/loss": loss, "val/response_loss": loss / 2} for loss in (4.0, 1.0))
    summary = {"steps": 68, "train_seconds": 90.0, "tokens_per_second": 1234.5, "peak_memory_gb": 1.5}
    write_record({**summary, "before": before, "after": after}, folder / "summary.json")
    write_curves(folder / "tensorboard", curves or {})
    if answers is not None:
        write_evaluation(folder / "evaluation" / "test", answers, scores, run=folder, **options)
    return folder


def write_curves(folder: Path, curves):
    """TensorBoard events, name → [(step, value)]."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, points in curves.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
