"""The model card: what an export is, how to use it, what its run's folder says of its making. Nothing is guessed."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from instruct_lm.config import ExportConfig, TrainConfig
from instruct_lm.data.conversation import Turn
from instruct_lm.evaluation.metrics import METRICS
from instruct_lm.export.chat_templates import end_text
from instruct_lm.io.records import read_record
from instruct_lm.io.run_files import MADE_FROM, SUMMARY
from instruct_lm.io.sources import hub_name
from instruct_lm.model.description import source_name
from instruct_lm.respond import Responder

PROJECT = "Instruct-LM"
_LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf", "ollama": "gguf"}
_METRICS = {"mean": "judge, 0 to 100"} | {name: metric.label for name, metric in METRICS.items()}
_METRICS |= {"exact_match": "exact match, share"}
_MISSING = "not recorded"

Run = tuple[Path, TrainConfig]


def model_card(name: str, config: ExportConfig, dtype: str, responder: Responder, folder: Path, run: Run | None) -> str:
    """The content of the export's `README.md`, with the hub's metadata.

    Args:
        name: The model's name.
        config: The export's configuration.
        dtype: Of the weights.
        responder: Its prompt style and generation settings.
        folder: With the export's other files.
        run: The run's folder and configuration; None for a base model.
    """
    what = "The adapter of" if config.format == "peft" else "The weights of"
    base = public_source(config.model.weights)
    origin = f"{base}, fine-tuned" if run else f"{base}, as it was"
    parts = [
        f"---\n{yaml.safe_dump(metadata(name, config, run), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(name)}",
        f"{what} {origin}. Written by {PROJECT} (`python -m instruct_lm.export`) as {config.format}, {dtype}.",
        "## Use",
        *_use(config, folder),
        "## Prompt",
        f"The prompt style is `{responder.style.name}`. One exchange, with the token that ends it:",
        _block(_prompt(responder)),
    ]
    if run:
        parts += ["## Training", "\n".join(_training(*run, config)), "## Evaluation", *_evaluation(run[0], config)]
    parts += ["## Intended use and limits", _limits(run is not None)]
    return "\n\n".join(parts) + "\n"


def metadata(name: str, config: ExportConfig, run: Run | None) -> dict[str, Any]:
    """The card's metadata for the hub; what is not on the hub has no place in it."""
    values: dict[str, Any] = {
        "library_name": _LIBRARIES[config.format],
        "pipeline_tag": "text-generation",
        "tags": [PROJECT.lower(), *(["lora"] if config.format == "peft" else [])],
    }
    if base := hub_name(config.model.weights):
        values["base_model"] = base.repository
    if run and (data := hub_name(run[1].data.source)) and data.data:
        values["datasets"] = [data.repository]
    return values


def public_source(source: str | None) -> str:
    """A source as others may read it: no folders of this machine, no passwords and keys in addresses.

    Example:
        >>> public_source("hf:Qwen/Qwen3-0.6B@main"), public_source("/home/me/bases/tuned"), public_source(None)
        ('`hf:Qwen/Qwen3-0.6B@main`', '`tuned` (local)', 'random weights')
    """
    if source is None:
        return "random weights"
    if re.match(r"https?:", source):
        address = urlsplit(source)
        return _code(f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}")
    if re.match(r"(hf|pypi):", source) or source in ("sample", "bytes"):
        return _code(source)
    return f"{_code(source_name(source))} (local)"


def _use(config: ExportConfig, folder: Path) -> Iterator[str]:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if config.format == "gguf":
        yield _block("\n".join(f"llama-server -m {file}" for file in files), "sh")
    elif config.format == "ollama":
        yield _block("ollama create my-model -f Modelfile\nollama run my-model", "sh")
    elif config.format == "peft":
        yield (
            f"PEFT adds it to its base, {public_source(config.model.weights)}. A base that is no "
            f"repository on the hub can be written with `python -m instruct_lm.export model=… output_dir=base`."
        )
        yield _block(_PEFT.format(base=_base_arguments(config)), "python")
    else:
        yield _block(_TRANSFORMERS, "python")
    yield (
        "An answer ends at the end tokens in the files. Text of control tokens within a message becomes control tokens "
        "in these programs: remove it from what strangers write."
    )


_TRANSFORMERS = """\
from transformers import pipeline

folder = "."  # this folder, or its name on the hub
answer = pipeline("text-generation", model=folder)
messages = [{"role": "user", "content": "Name a colour."}]
print(answer(messages)[0]["generated_text"][-1]["content"])"""

_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."  # this folder
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "Name a colour."}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
made = model.generate(**ids, generation_config=GenerationConfig.from_pretrained(folder))
print(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _base_arguments(config: ExportConfig) -> str:
    """The base as Python's arguments of `from_pretrained`."""
    base = hub_name(config.model.weights)
    if base is None or base.file:  # a single file on the hub, such as a GGUF file, is exported first, too
        return '"base"'
    revision = f", revision={json.dumps(base.revision)}" if base.revision else ""
    return json.dumps(base.repository) + revision


def _prompt(responder: Responder) -> str:
    exchange = [Turn("user", "{instruction}", "{input}"), Turn("assistant", "{response}")]
    end = end_text(responder.style, responder.tokenizer)
    return "".join(end if piece.ends else piece.text for piece in responder.style.pieces(exchange))


def _training(folder: Path, run: TrainConfig, config: ExportConfig) -> Iterator[str]:
    """What the run was made of and came to, a line each."""
    summary, made_from = read_record(folder / SUMMARY) or {}, read_record(folder / MADE_FROM) or {}
    before, after, entries = (_object(summary.get(key)) for key in ("before", "after", "entries"))
    data, base = (_object(made_from.get(name)).get("sha256") for name in ("data", "weights"))
    yield f"- Base model: {public_source(run.model.weights)}, sha256 {_shown(run.model.weights_sha256 or base)}"
    own = f"the entries that come with {PROJECT}"
    yield f"- Data: {own if run.data.source == 'sample' else public_source(run.data.source)}, sha256 {_shown(data)}"
    counts = ", ".join(f"{_number(n)} {_plain(split)}" for split, n in entries.items()) or _MISSING
    yield f"- Entries: {counts}"
    how = "every weight" if run.lora.rank == 0 else f"adapters of rank {run.lora.rank}, alpha {run.lora.alpha:g}"
    yield f"- Trained: {how}; weight of a prompt token in the loss: {_number(summary.get('prompt_loss_weight'))}"
    optimizer = f"{run.optimizer.name}, learning rate {run.optimizer.lr:g}, {run.optimizer.schedule}"
    yield f"- Optimizer: {optimizer}; batches of {run.data.batch_size} × {run.trainer.accumulate}; seed {run.seed}"
    yield f"- Epochs: {_number(summary.get('epochs'))}, steps: {_number(summary.get('steps'))}"
    for words, key, unit in (("Time", "seconds", "s"), ("Peak memory", "peak_memory_gb", "GB")):
        found = _number(summary.get(key))
        yield f"- {words}: {found if found == _MISSING else f'{found} {unit}'}"
    for key, words in (("val/loss", "tokens as trained"), ("val/response_loss", "responses alone")):
        losses = f"{_number(before.get(key))} before training, {_number(after.get(key))} at its end"
        yield f"- Validation loss, {words}: {losses}"
    which = "the lowest validation loss of responses" if config.checkpoint == "best" else "the last step"
    yield f"- These weights: the checkpoint `{config.checkpoint}`, of {which}"


def _evaluation(folder: Path, config: ExportConfig) -> Iterator[str]:
    """A table of the scores of this checkpoint, and of the untuned model beside them."""
    rows = []
    for path in sorted(folder.glob("evaluation/*/summary.json")):
        split, _, which = path.parent.name.partition("-")
        if (which or "best") in (config.checkpoint, "untuned") and (scores := read_record(path)):
            label = f"{split}{', before training' if which == 'untuned' else ''}"
            rows.append([_plain(label), *_scores(scores)])
    if not rows:
        yield f"The run's folder has no evaluation of this checkpoint: quality is {_MISSING}."
        return
    head = ["split", "n", "judge", "score", "95% interval", *list(_METRICS.values())[1:]]
    lines = [head, ["---"] * len(head), *rows]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    yield "The interval is that of the mean score over the entries; scores of other judges cannot be compared with it."


def _scores(scores: Mapping[str, Any]) -> list[str]:
    judge = scores.get("judge")
    kind = judge.get("model") or judge.get("kind") if isinstance(judge, dict) else judge
    ci95 = scores.get("ci95")
    interval = " to ".join(map(_number, ci95)) if isinstance(ci95, list) and len(ci95) == 2 else _MISSING
    # Servers may call a model by its path.
    shown = _plain(re.sub(r"^([/~]|[A-Za-z]:\\).*[/\\]", "", str(kind))) if kind else _MISSING
    return [_count(scores), shown, _number(scores.get("mean")), interval, *_metrics(scores)]


def _count(scores: Mapping[str, Any]) -> str:
    """The number of entries, and of those with a score where some have none."""
    n, scored = scores.get("n"), scores.get("scored")
    return _number(n) if scored in (None, n) else f"{_number(n)}, {_number(scored)} scored"


def _metrics(scores: Mapping[str, Any]) -> list[str]:
    return [_number(scores.get(key)) for key in list(_METRICS)[1:]]


def _limits(tuned: bool) -> str:
    lines = [
        "For learning and research: to see what instruction fine-tuning does to a small model.",
        "Not for decisions about people, and not for facts: the model makes things up.",
    ]
    if tuned:
        lines.append("It knows the kind of requests that its data has, and their language; others may fail.")
    lines.append("Nobody has tested it for harmful, biased or unsafe answers, and nothing was done against them.")
    lines.append("Licence: that of the base model and of the data, if they state one. This export adds none.")
    return "\n".join(f"- {line}" for line in lines)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) if isinstance(value, int) else _MISSING


def _shown(value: object) -> str:
    return _code(value) if value else _MISSING


def _plain(text: object) -> str:
    """A text on one line, none of its characters Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """A text on one line as code, whatever it holds."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    blank = " " if "`" in line else ""
    return f"{ticks}{blank}{line}{blank}{ticks}"


def _block(text: str, language: str = "") -> str:
    """A code block, longer fences around longer ones."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
