"""From the typed configuration to the objects that the commands work with."""

from pathlib import Path
from typing import Any

import torch

from instruct_lm.commands.check_config import AnyConfig, make_config
from instruct_lm.commands.fetch import build_fetcher as build_fetcher
from instruct_lm.commands.launch import own_device
from instruct_lm.commands.precision import DTYPES
from instruct_lm.commands.runs import run_id
from instruct_lm.config import CommonConfig, DataCommandConfig, DeviceConfig, JudgeConfig, ModelConfig, TrainConfig
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.encoded import resolve_prompt_loss_weight
from instruct_lm.data.pieces import prompt_text
from instruct_lm.data.prompts import ALPACA, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge
from instruct_lm.evaluation.judges.factory import make_judge
from instruct_lm.evaluation.judges.questions import read_question
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.model.description import complete
from instruct_lm.model.generation import Sampling
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import adapter_state, add_lora, merge_lora
from instruct_lm.model.pretrained import load_pretrained
from instruct_lm.model.shapes import shapes_only
from instruct_lm.respond import Responder
from instruct_lm.training.checkpoints import load_checkpoint
from instruct_lm.training.memory import TrainingMemory, largest_batch
from instruct_lm.training.module import InstructionTuner
from instruct_lm.training.optimizers import OptimizerSettings


def choose_accelerator(device: DeviceConfig) -> str:
    """Resolve `device` to `gpu`, `mps` or `cpu` on this machine.

    Raises:
        InputError: This machine lacks the accelerator or so many devices, or the accelerator lacks the precision.
    """
    counts = {"gpu": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    here = [name for name, count in counts.items() if count]
    accelerator = here[0] if device.accelerator == "auto" else device.accelerator
    if accelerator not in here:
        found = f"torch {torch.__version__} finds only {' and '.join(here)}"
        raise InputError(f"device.accelerator={accelerator}: {found}. Use device=auto or device={here[0]}.")
    wanted = str(device.devices)
    if accelerator != "cpu" and wanted != "auto":
        last = max(map(int, wanted.split(","))) if "," in wanted else int(wanted) - 1
        if last >= counts[accelerator]:
            here_are = f"this machine has {counts[accelerator]} ({accelerator})"
            raise InputError(f"device.devices={wanted}: {here_are}. Use device.devices=auto for all.")
    if accelerator == "cpu" and device.precision == "16-mixed":
        raise InputError("device.precision=16-mixed needs a GPU: use 32-true or bf16-mixed.")
    return accelerator


def resolve(config: AnyConfig, fetcher: Fetcher) -> AnyConfig:
    """The configuration with nothing left to the base's own files; those are fetched if something is.

    Raises:
        InputError: The base does not describe itself, or not as stated; or the sizes go with no other setting.
    """
    if config.model.is_complete:
        return config
    values = config.model_dump() | {"model": resolve_model(config.model, fetcher).model_dump()}
    return make_config(type(config), values)


def resolve_model(model: ModelConfig, fetcher: Fetcher) -> ModelConfig:
    """A model's sizes, tokenizer and name from its base's own files, where the configuration leaves them open."""
    if model.is_complete:
        return model
    if model.weights is None:
        raise InputError("model.weights=null: without a base, all sizes must be given.")
    return complete(model, fetcher.fetch(model.weights, sha256=model.weights_sha256))


def build_tokenizer(model: ModelConfig, fetcher: Fetcher) -> Tokenizer:
    """The tokenizer of a resolved model.

    Raises:
        InputError: It has more ids than the model has embeddings.
    """
    tokenizer = load_tokenizer(fetcher.fetch(str(model.tokenizer), sha256=model.tokenizer_sha256))
    if tokenizer.vocab_size > GPTConfig.of(model).vocab_size:
        sizes = f"has {tokenizer.vocab_size} ids, model.vocab_size={model.vocab_size}"
        raise InputError(f"model.tokenizer={model.tokenizer} {sizes} is too small: give the model's own tokenizer.")
    return tokenizer


def build_model(config: CommonConfig, fetcher: Fetcher) -> GPT:
    """The plain model, pretrained or random, with adapters if asked for."""
    if isinstance(config, DataCommandConfig) and config.fast:
        from instruct_lm.fast.allocator import keep_freed_memory

        keep_freed_memory()  # reading the weights makes and frees an array for each tensor
    model, lora = config.model, config.lora
    base_dtype = getattr(torch, lora.base_dtype) if lora.rank else torch.float32
    if model.weights is None:
        gpt = GPT(GPTConfig.of(model)).init_weights(config.seed)
    else:
        weights = fetcher.fetch(model.weights, sha256=model.weights_sha256)
        gpt = load_pretrained(GPTConfig.of(model), weights, base_dtype)
    if lora.rank:
        torch.manual_seed(config.seed)  # of the adapters' start
        add_lora(gpt, lora.rank, lora.alpha, lora.dropout, lora.targets, base_dtype)
    return gpt


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint, mapped from the file; with adapters, those alone.

    Raises:
        InputError: The file is damaged or no checkpoint, or belongs to another run than its folder.
    """
    stored = load_checkpoint(path, run_id(path.parents[1]))["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in stored.items()}


def load_trained(config: CommonConfig, checkpoint: Path, fetcher: Fetcher) -> GPT:
    """The model of a run's checkpoint; with adapters, the base model is loaded too and they are merged into it.

    Raises:
        InputError: The file is no checkpoint of such a model.
    """
    state = read_checkpoint(checkpoint)
    try:
        if config.lora.rank:
            gpt = build_model(config, fetcher)
            unknown = gpt.load_state_dict(state, strict=False).unexpected_keys
            if unknown or set(state) != set(adapter_state(gpt)):
                raise RuntimeError(f"its adapters are not the configured ones: {unknown or sorted(state)[:3]}")
            merge_lora(gpt)
        else:
            with shapes_only():
                gpt = GPT(GPTConfig.of(config.model))
            gpt.load_state_dict(state, assign=True)
    except RuntimeError as error:
        remedy = "It is of another run, or the configuration was changed: put the run's own back, or train anew"
        raise InputError(f"{checkpoint} does not fit the run's configuration: {_short(error)}. {remedy}.") from error
    return gpt


def _short(error: Exception) -> str:
    """The first lines of a message; torch lists every tensor that does not fit."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    cut = [line if len(line) <= 160 else f"{line[:160]}…" for line in lines[:3]]
    more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
    return "; ".join([*cut, *more]).rstrip(".") or type(error).__name__


def _accelerate(module: torch.nn.Module, device: DeviceConfig, **options: Any) -> None:
    from instruct_lm.fast import accelerate
    from instruct_lm.fast.allocator import keep_freed_memory

    keep_freed_memory()
    in_bf16 = device.precision == "bf16-mixed" and choose_accelerator(device) == "cpu"
    accelerate(module, rounds_frozen=in_bf16, **options)


def build_datamodule(config: DataCommandConfig, tokenizer: Tokenizer, fetcher: Fetcher) -> InstructionDataModule:
    """The data of a run."""
    training: dict[str, Any] = {}
    if isinstance(config, TrainConfig):
        weight = resolve_prompt_loss_weight(config.mask_instructions, config.prompt_loss_weight)
        training = {"prompt_loss_weight": weight, "mask_header": config.mask_header}
    return InstructionDataModule(
        config.data.source,
        tokenizer,
        config.prompt.style,
        block_size=GPTConfig.of(config.model).block_size,
        fetcher=fetcher,
        seed=config.seed,
        cache_dir=fetcher.cache_dir / "tokens" if fetcher.cache_dir else None,
        **config.data.model_dump(exclude={"name", "source", "layout"}),
        **training,
    )


def build_tuner(config: TrainConfig, model: GPT, tokenizer: Tokenizer) -> InstructionTuner:
    """The LightningModule of a training run; with `fast`, model and loss are the faster ones."""
    model.activation_checkpointing = config.trainer.activation_checkpointing
    optimizer = OptimizerSettings(**config.optimizer.model_dump())
    responder = build_responder(config, model, tokenizer, config.device.precision)
    tuner = InstructionTuner(model, responder, optimizer, config.seed)
    if config.fast:
        packed, keeps = config.data.layout == "packed", config.trainer.accumulate > 1
        _accelerate(tuner, config.device, packed=packed, keeps_rounded=keeps)
    return tuner


def estimate_memory(config: TrainConfig, data: InstructionDataModule) -> TrainingMemory:
    """What a training run will need, for a batch of its longest rows."""
    prefix, head_targets, dtype = 0, None, DTYPES[config.device.precision or "32-true"]
    on_cpu, half = choose_accelerator(config.device) == "cpu", dtype != torch.float32
    rounds_frozen = config.fast and on_cpu and half
    if config.fast:
        from instruct_lm.fast.loss import targets_at_once

        head_targets = targets_at_once("cpu" if on_cpu else "cuda", dtype, GPTConfig.of(config.model).vocab_size)
        prefix = data.shared_prefix if config.data.layout == "packed" else 0
    return TrainingMemory(
        GPTConfig.of(config.model),
        *largest_batch(data.encoded["train"].encoded.lengths, config.data.batch_size, prefix),
        lora_rank=config.lora.rank,
        base_bytes=2 if config.lora.base_dtype == "bfloat16" or rounds_frozen else 4,
        optimizer=config.optimizer.name,
        in_backward=config.optimizer.in_backward,
        activation_checkpointing=config.trainer.activation_checkpointing,
        head_targets=head_targets,
        half=half,
        accumulates=config.trainer.accumulate > 1,
    )


def build_responder(config: CommonConfig, model: GPT, tokenizer: Tokenizer, precision: str | None = None) -> Responder:
    """The model with a run's prompt style and generation settings, answering in a precision; None: in fp32."""
    settings, style = config.generation, get_style(config.prompt.style, tokenizer)
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    dtype = DTYPES[precision or "32-true"]
    return Responder(model, tokenizer, style, settings.max_new_tokens, sampling, settings.batch_size, dtype)


def load_responder(config: DataCommandConfig, checkpoint: Path | None, fetcher: Fetcher) -> Responder:
    """The model of a checkpoint, or the untuned one for None, on its device, with what it needs to answer.

    Raises:
        InputError: The device is missing, or tokenizer or checkpoint do not fit the model.
    """
    accelerator = choose_accelerator(config.device)
    tokenizer = build_tokenizer(config.model, fetcher)
    model = load_trained(config, checkpoint, fetcher) if checkpoint else build_model(config, fetcher)
    model = model.eval().requires_grad_(False).to(own_device(config.device, accelerator))
    if config.fast:
        _accelerate(model, config.device)
    return build_responder(config, model, tokenizer, config.device.precision)


def build_judge(judge: JudgeConfig, fetcher: Fetcher) -> Judge | None:
    """The judge of an evaluation; it sees the instructions in the book's prompt style, whatever the model's own is."""
    options = judge.model_dump(exclude={"kind", "concurrency", "weights", "weights_sha256", "prompt", "scale"})
    options["question"] = read_question(judge.prompt, judge.scale)
    if judge.kind == "llamacpp" and judge.weights is not None:
        options["model"] = fetcher.fetch(judge.weights, sha256=judge.weights_sha256)

    def prompt(entry: Any) -> str:
        return prompt_text(ALPACA, Conversation.from_entry(entry).turns)

    return make_judge(judge.kind, format_prompt=prompt, **options)
