"""Export of the adapter alone, in PEFT's layout (https://huggingface.co/docs/peft)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from instruct_lm.config import LoraConfig
from instruct_lm.errors import InputError, listing
from instruct_lm.export.huggingface import GENERATION_NAME, generation_settings, save_tokenizer
from instruct_lm.export.safetensors_files import SHARD_BYTES, write_safetensors
from instruct_lm.io.files import write_json
from instruct_lm.io.sources import hub_name
from instruct_lm.model.architectures import architecture_of
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import adapter_state, add_lora
from instruct_lm.model.pretrained import HUB_LAYOUTS, Layout, Piece, modules_of
from instruct_lm.model.shapes import shapes_only
from instruct_lm.respond import Responder

_IN_MODEL = {"gpt2": "transformer."}  # what transformers puts before a checkpoint's names


def write_adapter(
    responder: Responder,
    adapters: Mapping[str, Tensor],
    lora: LoraConfig,
    folder: Path,
    dtype: str,
    base: str | None = None,
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and the tokenizer's files.

    Our adapter of stacked matrices has one A for all and the rows of each matrix in its B. PEFT's have an A and a B for
    each: the same A, and its rows of B.

    Args:
        responder: The tokenizer, style and settings, and the sizes of the model; its weights are not used.
        adapters: As `adapter_state` names them.
        lora: What the adapters were made with.
        folder: Where to.
        dtype: Of the tensors: `f32`, `f16` or `bf16`.
        base: The base model's source, as in `model.weights`; PEFT can fetch one from the hub alone.

    Raises:
        InputError: The adapters are not those of such a model, or a number does not fit the dtype.
    """
    config = responder.model.config
    kind = architecture_of(config)
    _check(adapters, config, lora)
    tensors = list(_tensors(adapters, config, HUB_LAYOUTS[kind], _IN_MODEL.get(kind, "")))
    write_safetensors(tensors, folder, dtype, SHARD_BYTES, name="adapter_model.safetensors")
    write_json(adapter_config(config, lora, base), folder / "adapter_config.json")
    save_tokenizer(responder.tokenizer, responder.style, config.block_size, folder)
    write_json(generation_settings(responder), folder / GENERATION_NAME)


def adapter_config(config: GPTConfig, lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    kind = architecture_of(config)
    hub = hub_name(base)
    whole = hub if hub and not hub.file else None  # PEFT fetches no single files
    targets = [name for target in lora.targets for name in HUB_LAYOUTS[kind].names[target].split()]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": whole.repository if whole else None,
        "revision": whole.revision if whole else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "fan_in_fan_out": HUB_LAYOUTS[kind].transposed,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _check(adapters: Mapping[str, Tensor], config: GPTConfig, lora: LoraConfig) -> None:
    with shapes_only():
        expected = adapter_state(add_lora(GPT(config), lora.rank, lora.alpha, targets=lora.targets))
    found, wanted = ({name: tuple(x.shape) for name, x in state.items()} for state in (adapters, expected))
    differing = [
        f"{name}: the checkpoint has {found.get(name, 'none')}, the configuration {wanted.get(name, 'none')}"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        fault = f"the checkpoint does not fit the run's configuration: {len(differing)} tensors differ:"
        raise InputError("\n".join([fault, *listing(differing)]))


def _tensors(adapters: Mapping[str, Tensor], config: GPTConfig, layout: Layout, prefix: str) -> Iterator[Piece]:
    """The adapters under PEFT's names."""
    for name, a in adapters.items():
        if not name.endswith(".lora_a"):
            continue
        b = adapters[name.removesuffix("lora_a") + "lora_b"]
        _, block, module = name.removesuffix(".lora_a").split(".", 2)  # h.3.attn.qkv
        theirs, heights = modules_of(module, len(b), config, layout)
        for their_module, rows in zip(theirs, b.split(heights), strict=True):
            start = f"base_model.model.{prefix}{layout.block.format(block)}{their_module}"
            yield Piece(f"{start}.lora_A.weight", tuple(a.shape), a)
            yield Piece(f"{start}.lora_B.weight", tuple(rows.shape), rows)
