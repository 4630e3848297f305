"""Answer instructions with a run or an untuned model, and score the answers: `python evaluate.py --help`."""

import logging
from contextlib import closing, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

from instruct_lm.commands import launch
from instruct_lm.commands.fetch import fetch_sources
from instruct_lm.commands.hydra_app import hydra_command
from instruct_lm.commands.origins import check_origin, local_contents
from instruct_lm.commands.runs import checkpoint_path
from instruct_lm.config import EvaluateConfig, JudgeConfig
from instruct_lm.errors import RunError, StoppedError
from instruct_lm.io import processes
from instruct_lm.io.files import content_hash, shown
from instruct_lm.io.records import write_record
from instruct_lm.io.run_files import RESPONSES, SCORES, SUMMARY, UNTUNED

log = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> int:
    """Respond, score, summarise; 1 if an entry has no score."""
    launch.be_quiet()
    if config.responses is not None:
        return score(config, Path(config.responses), {"responses": config.responses})

    from instruct_lm.commands import build, precision
    from instruct_lm.evaluation.responses import find_responses

    config = precision.for_answers(config, build.choose_accelerator(config.device))
    config = build.resolve(config, build.build_fetcher(config))
    run = config.run if config.checkpoint != UNTUNED else None
    checkpoint = checkpoint_path(run, config.checkpoint) if run is not None else None
    made_by = config.model_dump(include={"model", "data", "prompt", "lora", "generation", "seed", "split"})
    base = config.model.weights if checkpoint is None or config.lora.rank > 0 else None
    made_by["files"] = local_contents(
        checkpoint=checkpoint, data=config.data.source, weights=base, tokenizer=config.model.tokenizer
    )
    if config.device.precision != "32-true":
        made_by["precision"] = config.device.precision
    if folder := find_responses(config.folder, made_by):
        log.info("responses: made before, in %s", shown(folder))
    else:
        respond(config, checkpoint, made_by)
    if processes.is_launched():
        return 0  # the process that started this one puts the answers together
    subject = {"model": config.model.name, "run": run, "precision": config.device.precision}
    return score(config, (folder or config.folder) / RESPONSES, subject)


def respond(config: EvaluateConfig, checkpoint: Path | None, made_by: dict[str, Any]) -> None:
    """Answer the split and save the answers; one of several processes answers its share."""
    launch.check_answering(config.device)
    weights = checkpoint is None or config.lora.rank > 0
    fetch_sources(config, weights=weights)
    from tqdm import tqdm

    from instruct_lm.commands import build
    from instruct_lm.evaluation.answers import answer_entries, forget_answers
    from instruct_lm.evaluation.responses import save_responses

    number = launch.processes_to_start(config.device, build.choose_accelerator(config.device))
    if number > 1:
        try:
            status = launch.run_processes(number, config.folder, config.device.precision)
        except launch.ProcessError as error:
            raise RunError(f"{error}\nThe answers so far are kept: repeat the command to go on.") from error
        if status:
            raise StoppedError("Repeat the command to go on.", status - 128) if status > 128 else SystemExit(status)
    launch.watch_parent()
    fetcher = build.build_fetcher(config)
    if config.run is not None:
        check_origin(Path(config.run), config, fetcher, weights=weights)
    responder = build.load_responder(config, checkpoint, fetcher)
    examples = getattr(build.build_datamodule(config, responder.tokenizer, fetcher).splits, config.split)
    if cut := sum(responder.cut_tokens(example) > 0 for example in examples):
        log.warning("%d of %d prompts are cut to fit model.block_size=%d", cut, len(examples), config.model.block_size)
    rank, world_size = processes.rank(), processes.world_size()
    settings = {"desc": "answering", "unit": "entry", "disable": rank > 0}
    with tqdm(total=-(-len(examples) // world_size), **settings) as bar:
        responses = answer_entries(responder, examples, config.folder, made_by, rank, world_size, bar.update)
    if world_size == 1 and responses is not None:
        save_responses(config.folder, examples, responses, made_by)
        forget_answers(config.folder)


def score(config: EvaluateConfig, responses: Path, subject: dict[str, Any]) -> int:
    """Score the answers, by a second judge too if there is one, and write the summaries."""
    from instruct_lm.evaluation.tensorboard import record_evaluation
    from instruct_lm.report.comparison import compare
    from instruct_lm.report.evaluations import load
    from instruct_lm.report.tables import agreement_table, markdown

    status = judge_responses(config, config.judge, responses, config.folder, subject)
    if subject.get("run") and config.checkpoint == "best":
        evaluated = load(config.folder)
        step, scores = evaluated.training.get("steps", 0), evaluated.values["score"]
        record_evaluation(Path(subject["run"]), config.split, step, scores, evaluated.summary)
    if config.second_judge.kind != "none":
        second = config.folder / "second"
        status |= judge_responses(config, config.second_judge, responses, second, subject)
        names = [judge.model or judge.kind for judge in (config.judge, config.second_judge)]
        agreement = agreement_table(compare([load(config.folder, names[0]), load(second, names[1])]))
        if agreement.rows:
            log.info("%s\n\n%s", agreement.title, markdown(agreement))
    return status


def judge_responses(config: EvaluateConfig, settings: JudgeConfig, responses: Path, folder: Path, subject: Any) -> int:
    """Score the answers by one judge and write the summary; 1 if an entry has no score."""
    from instruct_lm.commands import build
    from instruct_lm.evaluation.responses import answer_statistics, copy_responses, load_responses, made_by_of
    from instruct_lm.evaluation.scoring import describe_judge, describe_summary, score_responses, summarise

    entries = load_responses(responses)
    if responses != folder / RESPONSES:
        copy_responses(responses, entries, folder)
    # By content: the report and a later call hold these against what is there then.
    made_from = {**made_by_of(responses).get("files", {}), "responses": content_hash(folder / RESPONSES)}
    judge = build.build_judge(settings, build.build_fetcher(config))
    with closing(judge) if judge is not None else nullcontext():
        scored = score_responses(entries, judge, folder / SCORES, settings.concurrency)
        summary = {**subject, **summarise(scored, describe_judge(judge)), **answer_statistics(responses)}
    write_record({**summary, "date": date.today().isoformat(), "made_from": made_from}, folder / SUMMARY)
    log.info("%s\nwritten to %s", describe_summary(summary), shown(folder))
    return int(summary["failed"] > 0)


if __name__ == "__main__":
    with hydra_command("evaluate", main) as run:
        run()
