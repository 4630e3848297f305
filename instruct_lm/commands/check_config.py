"""From composed values to one typed configuration; all faults are reported at once, each with its key and remedy."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from instruct_lm.commands.slips import suggestions, with_value
from instruct_lm.config import COMMANDS, OPEN, PROGRAMS, CommonConfig, Group
from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.questions import read_question
from instruct_lm.io.conf_files import flatten

AnyConfig = TypeVar("AnyConfig", bound=CommonConfig)
Values = Mapping[str, Any]


def make_config(kind: type[AnyConfig], values: Values, combinations: bool = True) -> AnyConfig:
    """Check types, ranges and combinations, and return the typed configuration.

    Args:
        kind: One of `COMMANDS`.
        values: Nested plain values, one for each key.
        combinations: False checks only each value by itself.

    Raises:
        InputError: One line or two for each fault, with key, value and remedy.
    """
    faults = find_faults(kind, values)
    messages = list(faults.values())
    if combinations:
        valid = {key: value for key, value in flatten(values).items() if key not in faults}
        for check in _COMBINATIONS:
            with contextlib.suppress(KeyError):  # a key that this command lacks, or one whose own fault is reported
                messages.extend(check(valid))
    if messages:
        raise InputError("\n".join(messages))
    return kind.model_validate(values)


def find_faults(kind: type[Group], values: Values) -> dict[str, str]:
    """Check each value by itself.

    Args:
        kind: The schema.
        values: Nested plain values.

    Returns:
        A message in pydantic's words for each dotted key at fault; one message for all missing keys, at the first.
    """
    known, faults, missing, details = all_keys(kind), {}, [], []
    try:
        kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        names, value = [str(name) for name in detail["loc"]], detail["input"]
        if detail["type"] == "missing":
            missing.append(".".join(names))
        elif detail["type"] in ("extra_forbidden", "invalid_key"):
            key = ".".join(names)
            faults[key] = f"{key}: {no_such_key(kind, key)}"
        else:
            while ".".join(names) not in known:
                names.pop()  # an index of a list, a branch of a union
            key = ".".join(names)
            or_null = ", or null" if NoneType in get_args(known[key].annotation) else ""
            if isinstance(value, (bool, dict, list)) or value is None:
                value = json.dumps(value, separators=(",", ":")).replace('"', "")  # as the user types it
            words = detail["msg"].replace("Input should be", "must be").replace("'", "")
            faults.setdefault(key, f"{key}={value} {words}{or_null}.")
    if missing:
        faults[missing[0]] = f"No value for {', '.join(missing)}."
    return faults


def all_keys(kind: type[Group], prefix: str = "") -> dict[str, FieldInfo]:
    """The dotted key of every group and field of a schema."""
    found = {}
    for name, field in kind.model_fields.items():
        found[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            found |= all_keys(field.annotation, f"{prefix}{name}.")
    return found


def no_such_key(kind: type[Group], key: str, value: str | None = None) -> str:
    """What to do about a key that a schema lacks: drop the other command's key, or use what there is for it.

    Args:
        kind: The schema.
        key: As it was given.
        value: As it was given, to be repeated in the remedy.
    """
    meant = suggestions(key, list(all_keys(kind)))
    for name, other in COMMANDS.items():
        known = list(all_keys(other))
        if other is not kind and (key in known or (not meant and suggestions(key, known))):
            called = "" if key in known else " (as {})".format(suggestions(key, known)[0].format("…"))
            return f"this command has no such key, {PROGRAMS[name]} has it{called}. Leave it out."
    remedy = (
        f"Did you mean {' or '.join(with_value(each, value) for each in meant)}?" if meant else "--help lists the keys."
    )
    return f"there is no such key. {remedy}"


def nest(flat: Values) -> dict[str, Any]:
    """`{"data.limit": 5}` → `{"data": {"limit": 5}}`."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return values


# Combinations. Each check gets the flat values without those at fault and yields a message for what cannot be combined.


def _heads(v: Values) -> Iterator[str]:
    width, heads, shared = v["model.n_embd"], v["model.n_head"], v["model.n_kv_head"]
    if width is None or heads is None:  # the base's own
        return
    if (head_dim := v["model.head_dim"]) is not None:
        if v["model.position"] == "rotary" and head_dim % 2:
            yield f"model.head_dim={head_dim}: model.position=rotary needs heads of even width."
    elif width % heads:
        yield f"model.n_embd={width} is not a multiple of model.n_head={heads}: change one."
    elif v["model.position"] == "rotary" and width // heads % 2:
        yield f"model.n_embd={width} over model.n_head={heads}: model.position=rotary needs heads of even width."
    if shared is not None and heads % shared:
        yield f"model.n_head={heads} is not a multiple of model.n_kv_head={shared}: change one."


def _base(v: Values) -> Iterator[str]:
    if v["model.weights"] is None and (unknown := [key for key in OPEN if v[f"model.{key}"] is None]):
        yield (
            f"model.{unknown[0]}=null takes it from the base's own files, and model.weights=null names none: give "
            "model.weights=<folder>, <file.gguf> or hf:<owner>/<repo>@<revision>."
        )


def _longest(v: Values) -> Iterator[str]:
    length, longest = v["data.max_length"], v["model.block_size"]
    if length is not None and longest is not None and length > longest:
        yield f"data.max_length={length} is over model.block_size={longest}: use at most that, or null for all of it."


def _fractions(v: Values) -> Iterator[str]:
    train, test = v["data.train_fraction"], v["data.test_fraction"]
    if train + test > 1 + 1e-9:  # 1e-9: 0.7 + 0.2 + 0.1 and the like
        yield f"data.train_fraction={train} and data.test_fraction={test} add up to {train + test:g}: lower one."


def _greedy(v: Values) -> Iterator[str]:
    for key in ("generation.top_k", "generation.top_p"):
        if v["generation.temperature"] == 0 and v[key] is not None:
            yield f"{key}={v[key]} has no effect with generation.temperature=0: choose generation=sample."


def _prompt_weight(v: Values) -> Iterator[str]:
    if v["mask_instructions"] and (weight := v["prompt_loss_weight"]):
        yield f"prompt_loss_weight={weight} with mask_instructions=true, which means weight 0: leave out one."


def _dropout(v: Values) -> Iterator[str]:
    packed = v["fast"] and v["data.layout"] == "packed" and "optimizer.name" in v  # only training drops
    for key in ("model.dropout", "lora.dropout"):
        if packed and v[key] > 0:
            yield f"{key}={v[key]} with data.layout=packed, whose examples share a prefix: use data.layout=padded."


def _adapters(v: Values) -> Iterator[str]:
    if v["lora.rank"] > 0 and (not v["lora.targets"] or v["lora.alpha"] == 0):
        yield f"lora.rank={v['lora.rank']} trains nothing without lora.targets and lora.alpha: choose lora=r16."


def _in_backward(v: Values) -> Iterator[str]:
    for key, needed in {"optimizer.name": "adamw", "trainer.accumulate": 1, "trainer.clip_norm": None}.items():
        if v["optimizer.in_backward"] and v[key] != needed:
            yield f"{key}={v[key]} with optimizer.in_backward=true, which frees gradients one by one: leave out one."
    if v["optimizer.in_backward"] and v["device.precision"] == "16-mixed":
        yield "device.precision=16-mixed with optimizer.in_backward=true: its scaled gradients are checked together."


def _limits(v: Values) -> Iterator[str]:
    steps, warmup = v["trainer.max_steps"], v["optimizer.warmup_steps"]
    if v["trainer.max_epochs"] is None and steps is None:
        yield "trainer.max_epochs=null and trainer.max_steps=null: training would never end. Give one of them."
    if steps is not None and warmup >= steps:
        yield f"optimizer.warmup_steps={warmup} reaches trainer.max_steps={steps}: give fewer warm-up steps."


def _answers(v: Values) -> Iterator[str]:
    run, responses = v["run"], v["responses"]
    if run is not None and responses is not None:
        yield f"run={run} and responses={responses}: give a run that answers or a file of answers, not both."
    if responses is not None and v["judge.kind"] == "none":
        yield "judge=none with responses=… leaves nothing to do: choose judge=reference or another judge."


def _judges(v: Values) -> Iterator[str]:
    needed = {"ollama": ("model", "base_url"), "openai": ("model", "base_url"), "llamacpp": ("weights",)}
    for group in ("judge", "second_judge"):
        kind = v[f"{group}.kind"]
        for key in (f"{group}.{name}" for name in needed.get(kind, ())):
            if v[key] is None:
                yield f"{key}=null: {kind} needs one, for example as in conf/judge/{kind}.yaml."
        try:
            if kind not in ("none", "reference"):
                read_question(v[f"{group}.prompt"], v[f"{group}.scale"])
        except InputError as error:
            yield str(error).replace("judge.", f"{group}.")


def _export(v: Values) -> Iterator[str]:
    format, dtype, run = v["format"], v["dtype"], v["run"]
    if dtype == "q8_0" and format not in ("gguf", "ollama"):
        yield f"dtype=q8_0 with format={format}: GGUF alone has it. Use f32, f16 or bf16, or format=gguf."
    if v["num_ctx"] is not None and format != "ollama":
        yield f"num_ctx={v['num_ctx']} with format={format}: a Modelfile alone states it. Use format=ollama."
    if format == "peft" and v["lora.rank"] == 0:
        name = "a base model" if run is None else f"run={run}"
        yield f"format=peft: {name} has no adapter. Give run=<a run trained with lora=r16>, or use format=hf."
    elif run is None and v["lora.rank"] > 0:
        yield f"lora.rank={v['lora.rank']}: a base model has no adapters. Give run=<run>, or leave it out."


_COMBINATIONS: tuple[Callable[[Values], Iterator[str]], ...] = (
    *(_heads, _base, _longest, _fractions, _greedy, _prompt_weight, _dropout),
    *(_adapters, _in_backward, _limits, _answers, _judges, _export),
)
