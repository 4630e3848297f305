"""Every configuration key: type, range and one line of help. The values live in `conf/`.

`commands/check_config.py` makes these objects of composed values and explains what is wrong with them. Importing this
module imports no torch.
"""

import contextlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from instruct_lm.errors import without_secrets

BUILT_IN = ("sample", "bytes")
"""Sources that come with the package: the embedded entries, and the tokenizer of one token per byte."""


def _like(pattern: str, words: str) -> AfterValidator:
    """A validator of values whose text matches a pattern; the message is pydantic's own with `words`."""

    def check(value: int | str) -> int | str:
        if not re.fullmatch(pattern, str(value)):
            raise PydanticCustomError("pattern", "Input should be {words}", {"words": words})
        return value

    return AfterValidator(check)


def _public(address: str) -> str:
    if without_secrets(address) != address:  # a run writes its configuration down
        raise PydanticCustomError("secret", "Input should be free of passwords and keys: use ~/.netrc or a file")
    return address


def _absolute(source: str) -> str:
    """The absolute path of a local file or folder; other sources as they are."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # not there, a name too long, with "\0", "~nobody"
        return source if source in BUILT_IN else str(Path(source).expanduser().resolve(strict=True))
    return source


Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]  # output_dir=2024 is a name
Source = Annotated[Text, AfterValidator(_public), AfterValidator(_absolute)]
Sha256 = Annotated[str, _like("[0-9a-f]{64}", "64 hexadecimal digits")]
Web = _like("https?://.+", "an address that begins with http:// or https://")
Url = Annotated[str, Web, AfterValidator(_public)]
Devices = Annotated[int | str, _like(r"[1-9]\d*|auto|\d+(,\d+)+", 'a number of devices, auto, or ids such as "0,1"')]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Scale = Annotated[list[float], Field(min_length=2, max_length=2)]
PromptWeight = Annotated[float, Field(ge=0, le=1)]
Similarity = Annotated[float, Field(gt=0, le=1)]
# fmt: off
DataField = Literal[
    "instruction", "input", "output", "prompt", "completion", "response",
    "messages", "conversations", "system", "history",
]
# fmt: on
Target = Literal["attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"]


class Group(BaseModel):
    """Keys that belong together; strict types, finite numbers, no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


OPEN = (
    *("name", "tokenizer", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "norm", "norm_eps"),
    *("position", "rope_base", "activation", "bias", "qkv_bias", "qk_norm", "tied"),
)
"""Keys of `ModelConfig` that null leaves to the base's own files."""


class ModelConfig(Group):
    """A transformer, its weights and its tokenizer; null in `OPEN` keys: as the base's own files say (model=auto)."""

    name: Text | None = Field(description="the name in summaries and reports; null: the base's")
    weights: Source | None = Field(description="a source: a folder, repository or file; null: random weights")
    weights_sha256: Sha256 | None = Field(description="its hash; null: no check")
    tokenizer: Source | None = Field(description="a source: a folder, repository, merges.txt or GGUF file; or bytes")
    tokenizer_sha256: Sha256 | None = Field(description="its hash; null: no check")
    vocab_size: Count | None = Field(description="rows of the embedding; null, here and below: the base's own")
    block_size: Length | None = Field(description="longest sequence, tokens")
    n_layer: Count | None = Field(description="blocks")
    n_head: Count | None = Field(description="attention heads")
    n_kv_head: Count | None = Field(description="heads of keys and values; null: n_head")
    head_dim: Count | None = Field(description="width of a head; null: n_embd / n_head")
    n_embd: Count | None = Field(description="width of the hidden states")
    n_inner: Count | None = Field(description="width inside the MLP; null: 4 n_embd")
    norm: Literal["layernorm", "rmsnorm"] | None = Field(description="normalisation")
    norm_eps: Positive | None = Field(description="its epsilon")
    position: Literal["learned", "rotary"] | None = Field(description="position embedding")
    rope_base: Positive | None = Field(description="rotary only")
    rope_factors: list[Positive] | None = Field(description="divisors of the rotary frequencies; null: none")
    activation: Literal["gelu", "swiglu"] | None = Field(description="of the MLP; gelu in its tanh form")
    bias: bool | None = Field(description="whether linear layers have one")
    qkv_bias: bool | None = Field(description="whether those of queries, keys and values alone have one")
    qk_norm: bool | None = Field(description="whether queries and keys are normalised")
    tied: bool | None = Field(description="whether the output head is the token embedding")
    dropout: BelowOne = Field(description="over 0 needs data.layout=padded")

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to the base's own files."""
        return all(getattr(self, key) is not None for key in OPEN)


class DataConfig(Group):
    """The entries, their splits and their batches."""

    name: Text = Field(description="the name in summaries and reports; with another source: its file's")
    source: Source = Field(description="a source, or sample: the entries that come with the package")
    sha256: Sha256 | None = Field(description="its hash; null: no check")
    columns: dict[DataField, Text] | None = Field(description="our key: the file's, as {instruction: question}")
    unusable: Literal["drop", "error"] = Field(description="for entries with a blank request or response")
    clean: bool = Field(description='true: an input such as <noinput> or "N/A" counts as none')
    train_fraction: Fraction = Field(description="the first entries")
    test_fraction: Fraction = Field(description="the next; the rest is the validation split")
    shuffle: bool = Field(description="true: shuffle by seed before the split")
    deduplicate: Similarity | None = Field(description="entries so similar to a held-out one are not trained on")
    batch_size: Count = Field(description="examples of a process; of a step: times accumulate, times processes")
    max_length: Length | None = Field(description="tokens of an example; null: model.block_size")
    overlong: Literal["drop", "truncate_prompt", "truncate", "error"] = Field(description="for longer examples")
    layout: Literal["packed", "padded"] = Field(description="packed: the shared prefix once, no padding")
    num_workers: Annotated[int, Field(ge=0)] = Field(description="processes that make batches; 0: none")
    limit: Count | None = Field(description="use only the first entries of the file")
    group_by_length: bool = Field(description="true: examples of similar length share a training step")


class PromptConfig(Group):
    """The text around an instruction."""

    style: Literal["alpaca", "phi3", "chatml", "template"] = Field(
        description="template: the model's own chat template"
    )


class DeviceConfig(Group):
    """Where the model runs and in which precision; names as in Lightning's Trainer."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = Field(description="auto: CUDA, then MPS, then CPU")
    devices: Devices = Field(description='a number, auto for all, or ids such as "0,1"')
    precision: Precision | None = Field(description="null: the faster one; answers: as trained")
    strategy: Literal["auto", "ddp", "fsdp2"] = Field(
        description="of several processes; fsdp2: each holds a part of the model"
    )
    num_nodes: Count = Field(description="machines, by torchrun or srun")


class OptimizerConfig(Group):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor"] = Field(description="adafactor keeps small states")
    lr: Positive = Field(description="learning rate")
    weight_decay: NotNegative = Field(description="on matrices only")
    beta1: BelowOne = Field(description="AdamW only")
    beta2: BelowOne = Field(description="AdamW only")
    eps: Positive = Field(description="AdamW only")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(description="optimizer steps from 0 to lr")
    schedule: Literal["constant", "cosine"] = Field(description="cosine: to 0 at the last step")
    in_backward: bool = Field(description="true: less memory; no clipping and no accumulation")


class TrainerConfig(Group):
    """How long to train and how often to validate."""

    max_epochs: Count | None = Field(description="null: until max_steps")
    max_steps: Count | None = Field(description="optimizer steps; null: until max_epochs")
    accumulate: Count = Field(description="batches of an optimizer step")
    clip_norm: Positive | None = Field(description="largest global gradient norm; null: no clipping")
    val_interval: Positive = Field(description="epochs between validations")
    log_interval: Count = Field(description="optimizer steps between logged values")
    activation_checkpointing: bool = Field(description="true: less memory, slower")
    patience: Count | None = Field(description="stop after so many validations without a better one; null: never")
    checkpoint_steps: Count | None = Field(description="optimizer steps between checkpoints; null: by the clock alone")
    checkpoint_minutes: Positive = Field(description="at most so far apart, between optimizer steps")
    progress: bool = Field(description="the progress bar")
    keep_last: bool | None = Field(
        description="false: a complete run keeps best.ckpt alone; null: false in a multirun, else true"
    )


class LoraConfig(Group):
    """Low-rank adapters."""

    rank: Annotated[int, Field(ge=0)] = Field(description="0: full fine-tuning")
    alpha: NotNegative = Field(description="adapters are scaled by alpha / rank (the book's appendix E: by alpha)")
    dropout: BelowOne = Field(description="over 0 needs data.layout=padded")
    targets: list[Target] = Field(description="linear layers of each block; [] with rank 0")
    base_dtype: Literal["float32", "bfloat16"] = Field(description="bfloat16: half the memory of frozen matrices")


class GenerationConfig(Group):
    """How responses are decoded."""

    max_new_tokens: Count = Field(description="longest response")
    temperature: NotNegative = Field(description="0: greedy")
    top_k: Count | None = Field(description="sample among the k likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(description="sample among those of this probability")
    batch_size: Count = Field(description="prompts answered at once")
    seed: Seed = Field(description="of sampling")


class JudgeConfig(Group):
    """Who scores the responses."""

    kind: Literal["reference", "ollama", "openai", "llamacpp", "none"] = Field(description="set by the choice")
    model: Text | None = Field(description="its name on the server")
    base_url: Url | None = Field(description="the server's address")
    api_key_env: Text | None = Field(description="name of the environment variable that holds the key")
    concurrency: Count = Field(description="requests at a time")
    timeout: Positive = Field(description="seconds a request")
    temperature: NotNegative | None = Field(description="0: the likeliest score; null: the server's default")
    seed: Seed | None = Field(description="of sampling; null: the server's choice")
    max_tokens: Count = Field(description="longest reply, with what a thinking model thinks")
    reasoning_effort: Text | None = Field(description="of a thinking model: none, low, medium, …; null: its default")
    prompt: Text | None = Field(description="score (as null), rubric, a text with {response}, or a file with one")
    scale: Scale | None = Field(description="of a prompt of your own, [lowest,highest]; null: [0,100]")
    weights: Source | None = Field(description="llamacpp: a source of a GGUF file")
    weights_sha256: Sha256 | None = Field(description="its hash; null: no check")


class CommonConfig(Group):
    """What all commands share."""

    model: ModelConfig
    prompt: PromptConfig
    lora: LoraConfig
    generation: GenerationConfig
    seed: Seed = Field(description="of the shuffle, random weights and dropout")
    output_dir: Source | None = Field(description="where results go; null: outputs/<date>_<time> or the run's folder")
    cache_dir: Source | None = Field(description="downloads and encoded data; null: a folder in the user's cache")
    offline: bool = Field(description="true: no downloads")
    mirror: Url | None = Field(description="https://<host>/<path> is fetched from <mirror>/<host>/<path>")

    @property
    def folder(self) -> Path:
        """`output_dir`, which a started command has always set."""
        return Path(self.output_dir or ".")


class DataCommandConfig(CommonConfig):
    """What `train.py` and `evaluate.py` share: entries, and a device to compute on."""

    data: DataConfig
    device: DeviceConfig
    fast: bool = Field(description="false: the plain core, same numbers, slower")


class TrainConfig(DataCommandConfig):
    """The configuration of `train.py`."""

    optimizer: OptimizerConfig
    trainer: TrainerConfig
    mask_instructions: bool = Field(description="false: the loss covers prompt and response; true: the response alone")
    prompt_loss_weight: PromptWeight | None = Field(description="of a prompt token; null: 1 unmasked, 0 masked")
    mask_header: bool = Field(description='false: "### Response:" stays in the loss even when the prompt is masked')
    evaluate: bool = Field(description="true: then score the run; after a multirun a report on all runs")
    fail_fast: bool = Field(description="true: a multirun ends at its first job that fails")
    resume: Source | None = Field(description="a run folder to continue, with its own configuration")


class EvaluateConfig(DataCommandConfig):
    """The configuration of `evaluate.py`."""

    judge: JudgeConfig
    second_judge: JudgeConfig
    run: Source | None = Field(description="a run folder; its model, data, prompt, generation and seed are used")
    responses: Source | None = Field(description="a JSON list of entries with model_response; needs no model")
    split: Literal["train", "validation", "test"] = Field(description="the entries to answer")
    checkpoint: Literal["best", "last", "untuned"] = Field(description="untuned: what the run started from")


class ExportConfig(CommonConfig):
    """The configuration of `python -m instruct_lm.export`."""

    run: Source | None = Field(description="a run folder; null: the base model that model= names")
    checkpoint: Literal["best", "last"] = Field(description="of the run")
    format: Literal["hf", "gguf", "ollama", "peft"] = Field(description="peft: the adapter alone")
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        description="of the matrices; null: f32, for ollama f16; q8_0: for gguf and ollama"
    )
    num_ctx: Length | None = Field(description="ollama: longest context, tokens; null: model.block_size, at most 8192")
    output_dir: Source | None = Field(
        description="a new folder; null: <run>/export/<format>, or outputs/<model>-<format>"
    )
    overwrite: bool = Field(description="true: replace an earlier export there")


COMMANDS: dict[str, type[CommonConfig]] = {"train": TrainConfig, "evaluate": EvaluateConfig, "export": ExportConfig}
PROGRAMS = {"train": "train.py", "evaluate": "evaluate.py", "export": "instruct_lm.export"}
"""What a user calls each command."""
