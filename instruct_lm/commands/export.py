"""A run's model in Hugging Face's layout, adapters merged: `python -m instruct_lm.export RUN FOLDER`.

Transformers and this project (`model.weights=FOLDER`) read it, the base model's tokenizer included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instruct_lm.commands.exit_status import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the run named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m instruct_lm.export", description=__doc__)
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("folder", type=Path, help="where to write model.safetensors, config.json and the tokenizer")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
    return exit_status(_export, parser.parse_args(arguments))


def _export(options: argparse.Namespace) -> None:
    from instruct_lm.commands import build, runs
    from instruct_lm.export.huggingface import save_pretrained
    from instruct_lm.model.description import config_file
    from instruct_lm.model.gpt import GPTConfig
    from instruct_lm.model.hub_config import hub_config, read_rope_parameters

    checkpoint = runs.checkpoint_path(options.run, options.checkpoint)
    config = runs.load_run_config(options.run)
    fetcher, rope = build.build_fetcher(config), None
    if config.model.rope_factors is not None and config.model.weights is not None:
        base = fetcher.fetch(config.model.weights, sha256=config.model.weights_sha256)
        rope = read_rope_parameters(config_file(base))
    hub_config(GPTConfig.of(config.model), rope)  # refuses what the layout cannot hold before anything is loaded
    tokenizer = build.build_tokenizer(config.model, fetcher)
    save_pretrained(build.load_trained(config, checkpoint, fetcher), tokenizer, options.folder, rope)
    names = ", ".join(sorted(path.name for path in options.folder.iterdir()))
    print(f"written to {options.folder}: {names}")
