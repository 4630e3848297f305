"""Typed schemas of every configuration group, and the checks that a type cannot express.

Values live in `conf/`; here are names, types and ranges. Importing this module imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from omegaconf import DictConfig, OmegaConf

from instruct_lm.errors import InputError


class Rule(NamedTuple):
    """What a field's value must satisfy, unless it is null, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


def _rule(holds: Callable[[Any], bool], words: str) -> dict[str, Rule]:
    """Metadata of a field."""
    return {"rule": Rule(holds, words)}


def _one_of(*choices: str) -> dict[str, Rule]:
    return _rule(lambda x: x in choices, f"one of {', '.join(choices)}")


POSITIVE = _rule(lambda x: x > 0, "a number greater than 0")
NOT_NEGATIVE = _rule(lambda x: x >= 0, "0 or more")
COUNT = _rule(lambda x: x >= 1, "a whole number, 1 or more")
LENGTH = _rule(lambda x: x >= 2, "a number of tokens, 2 or more")
FRACTION = _rule(lambda x: 0 < x < 1, "a number between 0 and 1")
SHARE = _rule(lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_ONE = _rule(lambda x: 0 <= x < 1, "0 or more, but less than 1")
TOP_P = _rule(lambda x: 0 < x <= 1, "a number greater than 0, at most 1")
SEED = _rule(lambda x: 0 <= x < 2**32, "a whole number from 0 to 4294967295")
SHA256 = _rule(lambda x: re.fullmatch("[0-9a-f]{64}", x) is not None, "64 hexadecimal digits, or null for no check")
URL = _rule(lambda x: re.match("https?://.", x) is not None, "an address that begins with http:// or https://")
DEVICES = _rule(
    lambda x: re.fullmatch(r"[1-9]\d*|auto|\d+(,\d+)+", str(x)) is not None,
    'a number of devices, auto, or ids such as "0,1"',
)

LORA_TARGETS = _rule(
    lambda x: set(x) <= {"attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"}, "some of attn.qkv, attn.proj, mlp.fc, mlp.proj"
)


@dataclass
class ModelConfig:
    """A transformer, where its weights come from (null: random), and its tokenizer."""

    name: str
    weights: str | None
    weights_sha256: str | None = field(metadata=SHA256)
    tokenizer: str
    tokenizer_sha256: str | None = field(metadata=SHA256)
    vocab_size: int = field(metadata=COUNT)
    block_size: int = field(metadata=LENGTH)
    n_layer: int = field(metadata=COUNT)
    n_head: int = field(metadata=COUNT)
    n_kv_head: int | None = field(metadata=COUNT)
    n_embd: int = field(metadata=COUNT)
    n_inner: int | None = field(metadata=COUNT)
    norm: str = field(metadata=_one_of("layernorm", "rmsnorm"))
    norm_eps: float = field(metadata=POSITIVE)
    position: str = field(metadata=_one_of("learned", "rotary"))
    rope_base: float = field(metadata=POSITIVE)
    activation: str = field(metadata=_one_of("gelu", "swiglu"))
    bias: bool
    dropout: float = field(metadata=BELOW_ONE)


@dataclass
class DataConfig:
    """The entries, their splits, and how they become batches."""

    name: str
    source: str
    sha256: str | None = field(metadata=SHA256)
    train_fraction: float = field(metadata=FRACTION)
    test_fraction: float = field(metadata=FRACTION)
    shuffle: bool
    batch_size: int = field(metadata=COUNT)
    max_length: int | None = field(metadata=LENGTH)
    overlong: str = field(metadata=_one_of("drop", "truncate_prompt", "truncate", "error"))
    layout: str = field(metadata=_one_of("packed", "padded"))
    num_workers: int = field(metadata=NOT_NEGATIVE)
    limit: int | None = field(metadata=COUNT)
    group_by_length: bool


@dataclass
class PromptConfig:
    """The text around an instruction."""

    style: str = field(metadata=_one_of("alpaca", "phi3", "chatml"))


@dataclass
class DeviceConfig:
    """Where and in which precision the model runs; names as Lightning's Trainer has them."""

    accelerator: str = field(metadata=_one_of("auto", "cpu", "gpu", "mps"))
    devices: Any = field(metadata=DEVICES)  # int or str, which OmegaConf cannot hold in a nested schema
    precision: str | None = field(metadata=_one_of("32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"))
    strategy: str
    num_nodes: int = field(metadata=COUNT)


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule, in optimizer steps."""

    name: str = field(metadata=_one_of("adamw", "adafactor"))
    lr: float = field(metadata=POSITIVE)
    weight_decay: float = field(metadata=NOT_NEGATIVE)
    beta1: float = field(metadata=BELOW_ONE)
    beta2: float = field(metadata=BELOW_ONE)
    eps: float = field(metadata=POSITIVE)
    warmup_steps: int = field(metadata=NOT_NEGATIVE)
    schedule: str = field(metadata=_one_of("constant", "cosine"))
    in_backward: bool


@dataclass
class TrainerConfig:
    """How long to train and how often to look."""

    max_epochs: int | None = field(metadata=COUNT)
    max_steps: int | None = field(metadata=COUNT)
    accumulate: int = field(metadata=COUNT)
    clip_norm: float | None = field(metadata=POSITIVE)
    val_interval: float = field(metadata=POSITIVE)
    log_interval: int = field(metadata=COUNT)
    activation_checkpointing: bool
    progress: bool
    keep_last: bool


@dataclass
class LoraConfig:
    """Low-rank adapters; rank 0: full fine-tuning."""

    rank: int = field(metadata=NOT_NEGATIVE)
    alpha: float = field(metadata=NOT_NEGATIVE)
    dropout: float = field(metadata=BELOW_ONE)
    targets: list[str] = field(metadata=LORA_TARGETS)
    base_dtype: str = field(metadata=_one_of("float32", "bfloat16"))


@dataclass
class GenerationConfig:
    """How responses are decoded."""

    max_new_tokens: int = field(metadata=COUNT)
    temperature: float = field(metadata=NOT_NEGATIVE)
    top_k: int | None = field(metadata=COUNT)
    top_p: float | None = field(metadata=TOP_P)
    batch_size: int = field(metadata=COUNT)
    seed: int = field(metadata=SEED)


@dataclass
class JudgeConfig:
    """Who scores the responses; `concurrency` in requests, `timeout` in seconds a request."""

    kind: str = field(metadata=_one_of("reference", "ollama", "openai", "llamacpp", "none"))
    model: str | None
    base_url: str | None = field(metadata=URL)
    api_key_env: str | None
    concurrency: int = field(metadata=COUNT)
    timeout: float = field(metadata=POSITIVE)
    temperature: float = field(metadata=NOT_NEGATIVE)
    seed: int = field(metadata=SEED)
    weights: str | None
    weights_sha256: str | None = field(metadata=SHA256)


@dataclass
class CommonConfig:
    """What `train.py` and `evaluate.py` share."""

    model: ModelConfig
    data: DataConfig
    prompt: PromptConfig
    device: DeviceConfig
    lora: LoraConfig
    generation: GenerationConfig
    seed: int = field(metadata=SEED)
    output_dir: str | None
    cache_dir: str | None
    offline: bool
    mirror: str | None = field(metadata=URL)


@dataclass
class TrainConfig(CommonConfig):
    """The configuration of `train.py`."""

    optimizer: OptimizerConfig
    trainer: TrainerConfig
    mask_instructions: bool
    prompt_loss_weight: float | None = field(metadata=SHARE)
    mask_header: bool
    evaluate: bool
    resume: str | None


@dataclass
class EvaluateConfig(CommonConfig):
    """The configuration of `evaluate.py`."""

    judge: JudgeConfig
    second_judge: JudgeConfig
    run: str | None
    responses: str | None
    split: str = field(metadata=_one_of("train", "validation", "test"))
    checkpoint: str = field(metadata=_one_of("best", "last", "untuned"))


SCHEMAS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}


def schema_types(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every group and field of a schema."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        if isinstance(kind, type) and is_dataclass(kind):
            yield from schema_types(kind, f"{prefix}{name}.")


def check_train_config(cfg: DictConfig) -> None:
    """Check the ranges and combinations of a composed `train` configuration.

    Raises:
        InputError: the first value that cannot be, with its key and the remedy.
    """
    _check_common(cfg, TrainConfig)
    weight = cfg.prompt_loss_weight
    if cfg.mask_instructions and weight:
        raise InputError(
            f"mask_instructions=true gives the prompt weight 0, but prompt_loss_weight={weight}: leave out one of them."
        )
    for key in ("model.dropout", "lora.dropout"):
        if OmegaConf.select(cfg, key) > 0 and cfg.data.layout == "packed":
            raise InputError(
                f"{key}={OmegaConf.select(cfg, key)} with data.layout=packed: the examples of a batch would share the "
                f"dropout of their common prefix. Use data.layout=padded, or {key}=0."
            )
    if cfg.lora.rank > 0 and (not cfg.lora.targets or cfg.lora.alpha == 0):
        raise InputError(
            f"lora.rank={cfg.lora.rank} with lora.targets={list(cfg.lora.targets)} and lora.alpha={cfg.lora.alpha} "
            "trains nothing: choose lora=r16, or give both."
        )
    if cfg.optimizer.in_backward:
        clashes = {
            "optimizer.name": cfg.optimizer.name != "adamw",
            "trainer.accumulate": cfg.trainer.accumulate != 1,
            "trainer.clip_norm": cfg.trainer.clip_norm is not None,
        }
        for key in (key for key, clash in clashes.items() if clash):
            raise InputError(
                f"{key}={OmegaConf.select(cfg, key)} with optimizer.in_backward=true: gradients are gone before they "
                f"could be summed or measured, and it is AdamW's. Use optimizer.in_backward=false, or leave out {key}."
            )
    max_steps, warmup = cfg.trainer.max_steps, cfg.optimizer.warmup_steps
    if cfg.trainer.max_epochs is None and max_steps is None:
        raise InputError(
            "trainer.max_epochs=null and trainer.max_steps=null: training would never end. Give one of them."
        )
    if max_steps is not None and warmup >= max_steps:
        raise InputError(
            f"optimizer.warmup_steps={warmup} is not below trainer.max_steps={max_steps}: the learning rate would "
            "never be reached. Give fewer warm-up steps or more steps."
        )


def check_evaluate_config(cfg: DictConfig) -> None:
    """Check the ranges and combinations of a composed `evaluate` configuration.

    Raises:
        InputError: the first value that cannot be, with its key and the remedy.
    """
    _check_common(cfg, EvaluateConfig)
    if cfg.run is not None and cfg.responses is not None:
        raise InputError(
            f"run={cfg.run} and responses={cfg.responses}: give a run that answers, or a file of answers, not both."
        )
    if cfg.responses is not None and cfg.judge.kind == "none":
        raise InputError("judge=none with responses=… leaves nothing to do: choose judge=reference or another judge.")
    needed = {"ollama": ("model", "base_url"), "openai": ("model", "base_url"), "llamacpp": ("weights",)}
    for group in ("judge", "second_judge"):
        kind = cfg[group].kind
        for name in needed.get(kind, ()):
            if cfg[group][name] is None:
                raise InputError(f"{group}.{name}=null: {kind} needs one, for example as in conf/judge/{kind}.yaml.")


def check_device(device: DictConfig) -> str:
    """Resolve `device` to `gpu`, `mps` or `cpu` on this machine; imports torch.

    Raises:
        InputError: the accelerator or a number of devices that is not here, or a precision that it does not have.
    """
    import torch

    counts = {"gpu": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    here = [name for name, count in counts.items() if count]
    accelerator = here[0] if device.accelerator == "auto" else device.accelerator
    if accelerator not in here:
        raise InputError(
            f"device.accelerator={accelerator}: torch {torch.__version__} finds none on this machine, only "
            f"{' and '.join(here)}. Use device=auto or device={here[0]}."
        )
    wanted = device.devices
    if accelerator != "cpu" and wanted != "auto":
        ids = [int(i) for i in str(wanted).split(",")] if "," in str(wanted) else range(int(wanted))
        if max(ids) >= counts[accelerator]:
            raise InputError(
                f"device.devices={wanted}: this machine has {counts[accelerator]} ({accelerator}). "
                "Use device.devices=auto for all of them."
            )
    if accelerator == "cpu" and device.precision == "16-mixed":
        raise InputError("device.precision=16-mixed needs a GPU: leave it null, or use bf16-mixed.")
    return accelerator


def _check_common(cfg: DictConfig, schema: type) -> None:
    _check_rules(cfg, schema)
    model, data, generation = cfg.model, cfg.data, cfg.generation
    if model.n_embd % model.n_head:
        raise InputError(f"model.n_embd={model.n_embd} is not a multiple of model.n_head={model.n_head}: change one.")
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        raise InputError(
            f"model.n_head={model.n_head} is not a multiple of model.n_kv_head={model.n_kv_head}: change one."
        )
    if model.position == "rotary" and model.n_embd // model.n_head % 2:
        raise InputError(
            f"model.n_embd={model.n_embd} over model.n_head={model.n_head} gives heads of odd width "
            f"{model.n_embd // model.n_head}: model.position=rotary turns pairs, choose sizes with an even width."
        )
    if data.max_length is not None and data.max_length > model.block_size:
        raise InputError(
            f"data.max_length={data.max_length} is over model.block_size={model.block_size}, the longest sequence of "
            f"{model.name}: use at most that, or null for all of it."
        )
    total = data.train_fraction + data.test_fraction
    if total > 1 + 1e-9:  # 1e-9: 0.7 + 0.2 + 0.1 and the like
        raise InputError(
            f"data.train_fraction={data.train_fraction} and data.test_fraction={data.test_fraction} add up to "
            f"{total:g}, over 1: lower one; what is left becomes the validation split."
        )
    for name in ("top_k", "top_p"):
        if generation.temperature == 0 and generation[name] is not None:
            raise InputError(
                f"generation.{name}={generation[name]} has no effect with generation.temperature=0 (greedy): "
                "choose generation=sample or a temperature."
            )


def _check_rules(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    types = get_type_hints(schema)
    for item in fields(schema):
        value, key, kind = cfg[item.name], prefix + item.name, types[item.name]
        if isinstance(value, DictConfig):
            _check_rules(value, kind, f"{key}.")
        elif value is not None and "rule" in item.metadata:
            rule: Rule = item.metadata["rule"]
            if (isinstance(value, float) and not math.isfinite(value)) or not rule.holds(value):
                raise InputError(f"{key}={value} is not possible: give {rule.words}.")
