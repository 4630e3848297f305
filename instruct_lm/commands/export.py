"""Take a run's model, or a base, to other programs: `python -m instruct_lm.export`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.commands.fetch import build_fetcher, fetch_sources
from instruct_lm.commands.runs import checkpoint_path
from instruct_lm.config import ExportConfig
from instruct_lm.export import WRITTEN
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import new_folder, shown

if TYPE_CHECKING:
    from instruct_lm.respond import Responder

log = logging.getLogger(__name__)


def main(config: ExportConfig) -> None:
    """Load the model and write it in the format asked for."""
    checkpoint = checkpoint_path(config.run, config.checkpoint) if config.run is not None else None
    if not config.model.is_complete:
        from instruct_lm.commands import build

        config = build.resolve(config, build_fetcher(config))
    folder = destination(config)
    with new_folder(folder, config.overwrite, WRITTEN) as part:
        fetch_sources(config, weights=checkpoint is None or config.lora.rank > 0)
        from instruct_lm.commands import build
        from instruct_lm.model.gpt import GPTConfig
        from instruct_lm.model.hub_config import hub_config

        fetcher = build_fetcher(config)
        rope = base_rope(config, fetcher)
        if config.format == "hf":  # refuses what the layout cannot hold before anything is loaded
            hub_config(GPTConfig.of(config.model), rope)
        tokenizer = build.build_tokenizer(config.model, fetcher)
        model = build.load_trained(config, checkpoint, fetcher) if checkpoint else build.build_model(config, fetcher)
        responder = build.build_responder(config, model, tokenizer)
        _write(config, responder, part, rope)
    log.info("written to %s: %s", shown(folder), ", ".join(sorted(path.name for path in folder.iterdir())))


def _write(config: ExportConfig, responder: "Responder", part: Path, rope: dict[str, Any] | None) -> None:
    """Write the model in its format."""
    name = Path(config.run).resolve().name if config.run is not None else str(config.model.name)
    if config.format == "gguf":
        from instruct_lm.export.gguf import save_gguf

        save_gguf(responder, part, config.dtype or "f32", name)
    elif config.format == "ollama":
        from instruct_lm.export.ollama import save_ollama

        save_ollama(responder, part, config.dtype or "f16", name, num_ctx=config.num_ctx)
    else:
        from instruct_lm.export.huggingface import save_pretrained

        save_pretrained(responder.model, responder.tokenizer, part, rope)


def destination(config: ExportConfig) -> Path:
    """The folder to write, which may not exist yet."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    if config.run is not None:
        return Path(config.run, "export", config.format)
    return Path("outputs", f"{config.model.name}-{config.format}")


def base_rope(config: ExportConfig, fetcher: Fetcher) -> dict[str, Any] | None:
    """The rotary parameters in the base's own `config.json`, for a model with `rope_factors`."""
    if config.model.rope_factors is None or config.model.weights is None:
        return None
    from instruct_lm.model.description import config_file
    from instruct_lm.model.hub_config import read_rope_parameters

    return read_rope_parameters(config_file(fetcher.fetch(config.model.weights, sha256=config.model.weights_sha256)))
