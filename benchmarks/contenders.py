"""One training loop and one generation for each tool, as its own documentation has it, on random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks.tasks import Row, model_conf
from instruct_lm.config import Precision
from instruct_lm.io.conf_files import model_config

Losses = list[float]
Seconds = list[float]
END = 0  # fills padded rows; nothing depends on it
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
"""Precision → the dtype of the products with weights; weights and optimizer states are fp32 in both."""


def autocast(precision: str) -> AbstractContextManager[None]:
    """torch's own mixed precision."""
    return torch.autocast("cpu", DTYPES[precision], enabled=precision != "32-true")


def train_ours(
    size: str, batches: list[list[Row]], masked: bool, lora: int, precision: Precision, options: dict[str, Any]
) -> tuple[Seconds, Losses]:
    """This project: `InstructionTuner` under Lightning's trainer, as `train.py` sets it up."""
    import logging
    import warnings

    import lightning.pytorch as pl
    import numpy as np
    from torch.utils.data import DataLoader

    from instruct_lm.data.batching import collate
    from instruct_lm.fast import accelerate
    from instruct_lm.model.gpt import GPT, GPTConfig
    from instruct_lm.model.lora import add_lora, store_matrices
    from instruct_lm.training.module import InstructionTuner
    from instruct_lm.training.optimizers import OptimizerSettings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    made = [
        collate(
            [np.array(row.ids) for row in batch],
            [(np.arange(len(row.ids)) >= (row.prompt_length if masked else 0)).astype(np.float32) for row in batch],
            [np.arange(len(row.ids)) >= row.response_start for row in batch],
        )
        for batch in batches
    ]
    base_dtype = getattr(torch, options.get("base_dtype", "float32"))
    with torch.device("meta"):
        model = GPT(GPTConfig.of(model_config(size)))
    store_matrices(model, base_dtype)  # as `load_pretrained` does
    model.to_empty(device="cpu").init_weights(0)
    model.activation_checkpointing = bool(options.get("activation_checkpointing"))
    if lora:
        add_lora(model, lora, 2 * lora, base_dtype=base_dtype)
    optimizer = OptimizerSettings(options.get("optimizer", "adamw"), in_backward=bool(options.get("in_backward")))

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: Seconds = []
            self.losses: Losses = []
            self.since = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.since = now

        def on_train_start(self, *_: Any) -> None:
            self.since = time.perf_counter()

    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
        use_distributed_sampler=False, log_every_n_steps=1000,
    )  # fmt: skip
    tuner = InstructionTuner(model, optimizer=optimizer)
    if options.get("fast", True):
        accelerate(tuner, rounds_frozen=precision == "bf16-mixed")
    trainer.fit(tuner, train_dataloaders=DataLoader(made, batch_size=None))  # type: ignore[arg-type]  # a list will do
    return clock.seconds, clock.losses


def train_book(
    size: str, batches: list[list[Row]], masked: bool, lora: int, precision: str, options: dict[str, Any]
) -> tuple[Seconds, Losses]:
    """The book's model, collate function, loss and loop (chapters 4, 5 and 7), which are in fp32."""
    from llms_from_scratch.ch07 import custom_collate_fn

    c = model_conf(size)
    torch.manual_seed(0)
    model = _book_model(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    model.train()

    def step(batch: list[Row]) -> float:
        inputs, targets = custom_collate_fn([row.ids[:-1] for row in batch], pad_token_id=batch[0].ids[-1])
        if masked:  # exercise 7.2
            for target, row in zip(targets, batch, strict=True):
                target[: row.prompt_length - 1] = -100
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())  # calc_loss_batch
        loss.backward()
        optimizer.step()
        return loss.item()

    return _timed(step, batches)


def train_transformers(
    size: str, batches: list[list[Row]], masked: bool, lora: int, precision: str, options: dict[str, Any]
) -> tuple[Seconds, Losses]:
    """Transformers' model in a plain loop: right-padded rows, SDPA attention, fused AdamW; peft for LoRA."""
    model = _transformers_model(size)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, _lora_config(size, lora))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.1, fused=True
    )
    model.train()

    def step(batch: list[Row]) -> float:
        longest = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), longest), END)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            mask[i, : len(row.ids)] = 1
            start = row.prompt_length if masked else 0
            labels[i, start : len(row.ids)] = ids[i, start : len(row.ids)]
        with autocast(precision):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return _timed(step, batches)


def train_trl(
    size: str, batches: list[list[Row]], masked: bool, lora: int, precision: str, options: dict[str, Any]
) -> tuple[Seconds, Losses]:
    """TRL's SFTTrainer with its defaults (activation checkpointing among them) on a CPU."""
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>")),
        pad_token="<end>",
        eos_token="<end>",
    )
    flat = [row for batch in batches for row in batch]
    data: dict[str, list[Any]] = {"input_ids": [row.ids for row in flat]}
    if masked:
        data["completion_mask"] = [[int(i >= row.prompt_length) for i in range(len(row.ids))] for row in flat]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: Seconds = []
            self.since = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.since)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=len(batches[0]), learning_rate=5e-5, weight_decay=0.1,
            num_train_epochs=1, max_length=1024, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            bf16=precision == "bf16-mixed", logging_strategy="no", completion_only_loss=masked,
            **options.get("sft", {}),
        )  # fmt: skip
        trainer: Any = SFTTrainer(
            model=_transformers_model(size).to(torch.float32), args=settings, train_dataset=Dataset.from_dict(data),
            processing_class=words, callbacks=[clock], peft_config=_lora_config(size, lora) if lora else None,
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
    return clock.seconds, []


def _timed(step: Callable[[list[Row]], float], batches: list[list[Row]]) -> tuple[Seconds, Losses]:
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def _book_model(c: dict[str, Any]) -> Any:
    from llms_from_scratch.ch04 import GPTModel

    sizes = {"vocab_size": "vocab_size", "context_length": "block_size", "emb_dim": "n_embd", "n_heads": "n_head"}
    return GPTModel(
        {ours: c[theirs] for ours, theirs in sizes.items()}
        | {"n_layers": c["n_layer"], "drop_rate": 0.0, "qkv_bias": True}
    )


def _lora_config(size: str, rank: int) -> Any:
    from peft import LoraConfig

    gpt2 = ["c_attn", "c_proj", "c_fc"]
    llama = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=gpt2 if size.startswith("gpt2") else llama,
        fan_in_fan_out=size.startswith("gpt2"), task_type="CAUSAL_LM",
    )  # fmt: skip


def _transformers_model(size: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c: dict[str, Any] = model_conf(size)
    torch.manual_seed(0)
    if c["position"] == "learned":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=c["vocab_size"], n_positions=c["block_size"], n_layer=c["n_layer"],
                       n_head=c["n_head"], n_embd=c["n_embd"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=c["vocab_size"], max_position_embeddings=c["block_size"], num_hidden_layers=c["n_layer"],
                    num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"], hidden_size=c["n_embd"],
                    intermediate_size=c["n_inner"], rms_norm_eps=c["norm_eps"], tie_word_embeddings=True)
    )  # fmt: skip


def generate_ours(size: str, prompts: list[list[int]], new_tokens: int, precision: str) -> tuple[float, int]:
    """This project's batched generation, all prompts at once."""
    from instruct_lm.fast import accelerate
    from instruct_lm.model.generation import generate
    from instruct_lm.model.gpt import GPT, GPTConfig

    model = GPT(GPTConfig.of(model_config(size))).init_weights(0).eval().requires_grad_(False)
    accelerate(model, rounds_frozen=precision == "bf16-mixed")
    with autocast(precision):
        generate(model, prompts[:2], max_new_tokens=2)
        start = time.perf_counter()
        made = generate(model, prompts, max_new_tokens=new_tokens, batch_size=len(prompts))
    return time.perf_counter() - start, sum(map(len, made))


def generate_book(size: str, prompts: list[list[int]], new_tokens: int, precision: str) -> tuple[float, int]:
    """The book's `generate_text_simple`: one prompt at a time, all of it anew for each token; two prompts will do."""
    from llms_from_scratch.ch04 import generate_text_simple

    c = model_conf(size)
    model = _book_model(c).eval()
    generate_text_simple(model, torch.tensor([prompts[0]]), 1, c["block_size"])
    start = time.perf_counter()
    for prompt in prompts[:2]:
        generate_text_simple(model, torch.tensor([prompt]), new_tokens, c["block_size"])
    return time.perf_counter() - start, 2 * new_tokens


def generate_transformers(size: str, prompts: list[list[int]], new_tokens: int, precision: str) -> tuple[float, int]:
    """Transformers' batched greedy `generate`: left-padded, with its cache, weights in the precision's dtype."""
    model = _transformers_model(size).to(DTYPES[precision]).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": END}
    with torch.inference_mode():
        model.generate(ids[:2], attention_mask=mask[:2], max_new_tokens=2, **settings)
        start = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)
    return time.perf_counter() - start, len(prompts) * new_tokens


TRAIN = {"ours": train_ours, "book": train_book, "transformers": train_transformers, "trl": train_trl}
GENERATE = {"ours": generate_ours, "book": generate_book, "transformers": generate_transformers}
