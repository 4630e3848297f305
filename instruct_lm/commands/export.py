"""Take a run's model, or a base, to other programs: `python -m instruct_lm.export`."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.commands.fetch import build_fetcher, fetch_sources
from instruct_lm.commands.origins import check_origin
from instruct_lm.commands.own_files import check_no_run
from instruct_lm.commands.runs import checkpoint_path, find_run, load_run_config
from instruct_lm.config import ExportConfig
from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import new_folder, room_for, shown, write_text

if TYPE_CHECKING:
    from instruct_lm.respond import Responder

log = logging.getLogger(__name__)

_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # of a number; q8_0: a scale for each 32
_OTHER_FILES = 50e6  # bytes; a tokenizer.json has up to 35 MB


def main(config: ExportConfig) -> None:
    """Load the model and write it in the format asked for."""
    checkpoint = checkpoint_path(config.run, config.checkpoint) if config.run is not None else None
    if not config.model.is_complete:
        from instruct_lm.commands import build

        config = build.resolve(config, build_fetcher(config))
    folder = destination(config)
    with new_folder(folder, config.overwrite) as part:
        weights = config.format != "peft" and (checkpoint is None or config.lora.rank > 0)
        fetch_sources(config, weights=weights)
        with room_for(folder, _needed(config)):
            _export(config, checkpoint, part)
    log.info("written to %s: %s", shown(folder), ", ".join(sorted(path.name for path in folder.iterdir())))


def destination(config: ExportConfig) -> Path:
    """The folder to write, which may not exist yet.

    Raises:
        InputError: The model is read from there, or it belongs to a run.
    """
    folder = Path("outputs", f"{config.model.name}-{config.format}")
    if config.run is not None:
        folder = Path(config.run, "export", config.format + ("-last" if config.checkpoint == "last" else ""))
    if config.output_dir is not None:
        folder = Path(config.output_dir).expanduser()
    check_no_run(folder)
    for key in ("weights", "tokenizer"):
        source = getattr(config.model, key)
        # The configuration has local sources as absolute paths.
        if source is not None and Path(source).is_absolute() and Path(source).is_relative_to(folder.absolute()):
            raise InputError(f"output_dir={folder} holds model.{key}={source}, which is read: give another folder.")
    return folder


def _dtype(config: ExportConfig) -> str:
    return config.dtype or ("f16" if config.format == "ollama" else "f32")


def _needed(config: ExportConfig) -> int:
    """About how many bytes the export will have."""
    from instruct_lm.model.gpt import GPT, GPTConfig
    from instruct_lm.model.lora import adapter_state, add_lora
    from instruct_lm.model.shapes import shapes_only

    with shapes_only():
        model = GPT(GPTConfig.of(config.model))
        if config.format == "peft":
            add_lora(model, config.lora.rank, config.lora.alpha, targets=config.lora.targets)
    tensors = adapter_state(model).values() if config.format == "peft" else model.parameters()
    return math.ceil(sum(tensor.numel() for tensor in tensors) * _BYTES[_dtype(config)] + _OTHER_FILES)


def _export(config: ExportConfig, checkpoint: Path | None, part: Path) -> None:
    from instruct_lm.commands import build
    from instruct_lm.export.card import model_card
    from instruct_lm.model.gpt import GPT, GPTConfig
    from instruct_lm.model.hub_config import hub_config
    from instruct_lm.model.shapes import shapes_only

    fetcher = build_fetcher(config)
    if config.run is not None:
        check_origin(Path(config.run), config, fetcher, weights=config.format != "peft" and config.lora.rank > 0)
    rope = None
    if config.format == "hf":
        rope = _base_rope(config, fetcher)
        hub_config(GPTConfig.of(config.model), rope)  # refuses what the layout cannot hold before anything is loaded
    tokenizer = build.build_tokenizer(config.model, fetcher)
    if config.format == "peft":  # the adapter's file is enough
        with shapes_only():
            model = GPT(GPTConfig.of(config.model))
    else:
        model = build.load_trained(config, checkpoint, fetcher) if checkpoint else build.build_model(config, fetcher)
    responder = build.build_responder(config, model, tokenizer)
    run = (find_run(config.run), load_run_config(config.run)) if config.run is not None else None
    name = run[0].name if run else str(config.model.name)
    _write(config, responder, part, name, rope=rope, checkpoint=checkpoint)
    write_text(model_card(name, config, _dtype(config), responder, part, run), part / "README.md")


def _write(
    config: ExportConfig,
    responder: "Responder",
    part: Path,
    name: str,
    *,
    rope: dict[str, Any] | None,
    checkpoint: Path | None,
) -> None:
    """Write the files of the format, each by its own writer."""
    dtype = _dtype(config)
    if config.format == "hf":
        from instruct_lm.export.huggingface import write_huggingface

        write_huggingface(responder, part, dtype, rope)
    elif config.format == "peft" and checkpoint is not None:
        from instruct_lm.commands.build import read_checkpoint
        from instruct_lm.export.peft import write_adapter

        write_adapter(responder, read_checkpoint(checkpoint), config.lora, part, dtype, config.model.weights)
    elif config.format == "gguf":
        from instruct_lm.export.gguf import save_gguf

        save_gguf(responder, part, dtype, name)
    elif config.format == "ollama":
        from instruct_lm.export.ollama import save_ollama

        save_ollama(responder, part, dtype, name, config.num_ctx)


def _base_rope(config: ExportConfig, fetcher: Fetcher) -> dict[str, Any] | None:
    """The rotary parameters in the base's own `config.json`, for a model with `rope_factors`, if it is there."""
    if config.model.rope_factors is None or config.model.weights is None:
        return None
    from instruct_lm.model.description import config_file
    from instruct_lm.model.hub_config import read_rope_parameters

    return read_rope_parameters(config_file(fetcher.fetch(config.model.weights, sha256=config.model.weights_sha256)))
