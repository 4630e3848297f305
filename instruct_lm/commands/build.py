"""What `train.py` and `evaluate.py` build alike, from the plain values of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from instruct_lm.data.datamodule import InstructionDataModule
from instruct_lm.data.encoding import resolve_prompt_loss_weight
from instruct_lm.data.prompts import ALPACA, Example, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge
from instruct_lm.evaluation.judges.factory import make_judge
from instruct_lm.io.sources import Fetcher
from instruct_lm.model.generation import Sampling
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import adapter_state, add_lora, merge_lora
from instruct_lm.model.pretrained import load_pretrained
from instruct_lm.respond import Responder

log = logging.getLogger(__name__)

Config = Mapping[str, Any]


def build_fetcher(config: Config) -> Fetcher:
    """The downloader of a run's sources."""
    cache_dir = config["cache_dir"]
    return Fetcher(
        Path(cache_dir).expanduser() if cache_dir else None, offline=config["offline"], mirror=config["mirror"]
    )


def build_tokenizer(model: Config, fetcher: Fetcher) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        InputError: it has more ids than the model has embeddings.
    """
    source = model["tokenizer"]
    tokenizer = load_tokenizer(source if source == "bytes" else fetcher.fetch(source, sha256=model["tokenizer_sha256"]))
    if tokenizer.vocab_size > model["vocab_size"]:
        raise InputError(
            f"model.tokenizer={source} has {tokenizer.vocab_size} ids, model.vocab_size={model['vocab_size']} has room "
            "for fewer: give the model's own tokenizer"
        )
    return tokenizer


def gpt_config(model: Config) -> GPTConfig:
    """The sizes and choices of a model."""
    return GPTConfig(**{field.name: model[field.name] for field in fields(GPTConfig)})


def build_model(model: Config, lora: Config, seed: int, fetcher: Fetcher) -> GPT:
    """The model, pretrained or random, with adapters if asked for."""
    sizes, base_dtype = gpt_config(model), getattr(torch, lora["base_dtype"]) if lora["rank"] else torch.float32
    if model["weights"] is None:
        gpt = GPT(sizes).init_weights(seed)
    else:
        gpt = load_pretrained(sizes, fetcher.fetch(model["weights"], sha256=model["weights_sha256"]), base_dtype)
    if lora["rank"]:
        torch.manual_seed(seed)  # of the adapters' start
        add_lora(gpt, lora["rank"], lora["alpha"], lora["dropout"], lora["targets"], base_dtype)
    return gpt


def load_trained(config: Config, checkpoint: Path, fetcher: Fetcher) -> GPT:
    """The model of a run's checkpoint; with adapters, the base model is loaded too and they are merged into it.

    Raises:
        InputError: the file is no checkpoint of such a model.
    """
    try:
        stored = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        state = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    except Exception as error:  # torch, zip and pickle raise a dozen kinds
        raise InputError(
            f"{checkpoint} is no readable checkpoint ({error}); evaluate the other one or train anew"
        ) from error
    try:
        if config["lora"]["rank"]:
            gpt = build_model(config["model"], config["lora"], config["seed"], fetcher)
            unknown = gpt.load_state_dict(state, strict=False).unexpected_keys
            if unknown or set(state) != set(adapter_state(gpt)):
                raise RuntimeError(f"its adapters are not the configured ones: {unknown or sorted(state)[:3]}")
            return merge_lora(gpt)
        with torch.device("meta"):
            gpt = GPT(gpt_config(config["model"]))
        gpt.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"{checkpoint} does not fit the run's configuration: {error}") from error
    return gpt


def build_datamodule(config: Config, tokenizer: Tokenizer, fetcher: Fetcher, **training: Any) -> InstructionDataModule:
    """The data of a run; ``training`` passes on what only training needs."""
    data = config["data"]
    source = data["source"]
    return InstructionDataModule(
        source if source == "sample" else fetcher.fetch(source, sha256=data["sha256"]),
        tokenizer,
        get_style(config["prompt"]["style"]),
        config["model"]["block_size"],
        train_fraction=data["train_fraction"],
        test_fraction=data["test_fraction"],
        shuffle=data["shuffle"],
        seed=config["seed"],
        batch_size=data["batch_size"],
        group_by_length=data["group_by_length"],
        max_length=data["max_length"],
        overlong=data["overlong"],
        layout=data["layout"],
        num_workers=data["num_workers"],
        limit=data["limit"],
        cache_dir=fetcher.cache_dir / "tokens" if fetcher.cache_dir else None,
        **training,
    )


def prompt_loss_weight(config: Config) -> float:
    """The weight of prompt tokens that a training configuration asks for."""
    return resolve_prompt_loss_weight(config["mask_instructions"], config["prompt_loss_weight"])


def build_responder(config: Config, model: GPT, tokenizer: Tokenizer) -> Responder:
    """The model with a run's prompt style and generation settings."""
    generation = config["generation"]
    sampling = Sampling(generation["temperature"], generation["top_k"], generation["top_p"], generation["seed"])
    return Responder(
        model,
        tokenizer,
        get_style(config["prompt"]["style"]),
        generation["max_new_tokens"],
        sampling,
        generation["batch_size"],
    )


def build_judge(settings: Config, fetcher: Fetcher) -> Judge | None:
    """The judge of an evaluation; it sees the instructions in the book's prompt style, whatever the model's own is."""
    model = settings["model"]
    if settings["kind"] == "llamacpp":
        model = fetcher.fetch(settings["weights"], sha256=settings["weights_sha256"])
    return make_judge(
        settings["kind"],
        format_prompt=lambda entry: ALPACA.prompt(Example(entry["instruction"], entry["input"], entry["output"])),
        model=model,
        base_url=settings["base_url"],
        timeout=settings["timeout"],
        api_key_env=settings["api_key_env"],
        temperature=settings["temperature"],
        seed=settings["seed"],
    )
