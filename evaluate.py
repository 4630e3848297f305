"""Answer instructions with a run or an untuned model, and score the answers: `python evaluate.py --help`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from instruct_lm.commands.hydra_app import run_command
from instruct_lm.commands.runs import checkpoint_path
from instruct_lm.fast.allocator import keep_freed_memory
from instruct_lm.io.run_files import SUMMARY, UNTUNED

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> int:
    """Respond, score, summarise; 1 if an entry has no score."""
    keep_freed_memory()  # before torch allocates
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    output_dir = Path(config["output_dir"])
    if config["responses"] is not None:
        return score(config, Path(config["responses"]), output_dir, {"responses": config["responses"]})

    from instruct_lm.evaluation.responses import RESPONSES, find_responses
    from instruct_lm.io.files import file_stamps, shown

    made_by = {key: config[key] for key in ("model", "data", "prompt", "lora", "generation", "seed", "split")}
    trained = config["run"] is not None and config["checkpoint"] != UNTUNED
    checkpoint = checkpoint_path(config["run"], config["checkpoint"]) if trained else None
    made_by["files"] = file_stamps(
        checkpoint, config["data"]["source"], config["model"]["weights"], config["model"]["tokenizer"]
    )
    folder = find_responses(output_dir, made_by)
    if folder is None:
        respond(config, cfg.device, output_dir, checkpoint, made_by)
        folder = output_dir
    else:
        log.info("responses: made before, in %s", shown(folder))
    run = config["run"] if trained else None
    return score(config, folder / RESPONSES, output_dir, {"model": config["model"]["name"], "run": run})


def respond(
    config: dict[str, Any], device: DictConfig, output_dir: Path, checkpoint: Path | None, made_by: dict[str, Any]
) -> None:
    """Answer the split and save the answers."""
    from tqdm import tqdm

    from instruct_lm.commands import build
    from instruct_lm.config import check_device
    from instruct_lm.evaluation.responses import save_responses

    accelerator = check_device(device)
    fetcher = build.build_fetcher(config)
    tokenizer = build.build_tokenizer(config["model"], fetcher)
    examples = getattr(build.build_datamodule(config, tokenizer, fetcher).splits, config["split"])
    if checkpoint is None:
        model = build.build_model(config["model"], config["lora"], config["seed"], fetcher)
    else:
        model = build.load_trained(config, checkpoint, fetcher)
    responder = build.build_responder(config, model.to("cuda" if accelerator == "gpu" else accelerator), tokenizer)
    if cut := sum(responder.cut_tokens(example) > 0 for example in examples):
        log.warning(
            "%d of %d prompts are too long for model.block_size=%d with room for an answer: their ends are left out",
            *(cut, len(examples), model.config.block_size),
        )
    with tqdm(total=len(examples), desc="answering", unit="entry") as bar:
        responses = responder.answer(examples, bar.update)
    save_responses(output_dir, examples, responses, made_by)


def score(config: dict[str, Any], responses: Path, output_dir: Path, subject: dict[str, Any]) -> int:
    """Score the answers, by a second judge too if there is one, and write the summaries."""
    from instruct_lm.evaluation.tensorboard import record_evaluation
    from instruct_lm.report.comparison import compare
    from instruct_lm.report.evaluations import load
    from instruct_lm.report.tables import agreement_table, markdown

    status = judge_responses(config, "judge", responses, output_dir, subject)
    if subject.get("run") and config["checkpoint"] == "best":
        evaluated = load(output_dir)
        step, scores = evaluated.training.get("steps", 0), evaluated.values["score"]
        record_evaluation(Path(subject["run"]), config["split"], step, scores, evaluated.summary)
    if config["second_judge"]["kind"] != "none":
        second = output_dir / "second"
        status |= judge_responses(config, "second_judge", responses, second, subject)
        names = [config[group]["model"] or config[group]["kind"] for group in ("judge", "second_judge")]
        agreement = agreement_table(compare([load(output_dir, names[0]), load(second, names[1])]))
        if agreement.rows:
            log.info("%s\n\n%s", agreement.title, markdown(agreement))
    return status


def judge_responses(
    config: dict[str, Any], group: str, responses: Path, output_dir: Path, subject: dict[str, Any]
) -> int:
    """Score the answers by one judge; 1 if an entry has no score."""
    from instruct_lm.commands import build
    from instruct_lm.commands.report import describe_summary
    from instruct_lm.evaluation.responses import RESPONSES, answer_statistics, copy_responses, load_responses
    from instruct_lm.evaluation.scoring import describe_judge, score_responses, summarise
    from instruct_lm.io.files import shown, write_json

    entries = load_responses(responses)
    if responses != output_dir / RESPONSES:
        copy_responses(responses, entries, output_dir)
    judge = build.build_judge(config[group], build.build_fetcher(config))
    try:
        scored = score_responses(entries, judge, output_dir / "scores.jsonl", config[group]["concurrency"])
        summary = {**subject, **summarise(scored, describe_judge(judge)), **answer_statistics(responses)}
    finally:
        if judge is not None:
            judge.close()
    write_json(summary, output_dir / SUMMARY)
    log.info("%s\nwritten to %s", describe_summary(summary), shown(output_dir))
    return int(summary["failed"] > 0)


if __name__ == "__main__":
    sys.exit(run_command("evaluate", main))
