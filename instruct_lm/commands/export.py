"""A run's model in Hugging Face's layout, adapters merged: `python -m instruct_lm.export RUN FOLDER`.

Transformers and this project (`model.weights=FOLDER`) read it. The tokenizer is the base model's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instruct_lm.errors import InputError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the run named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m instruct_lm.export", description=__doc__)
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("folder", type=Path, help="where to write model.safetensors and config.json")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
    options = parser.parse_args(arguments)
    try:
        _export(options.run, options.folder, options.checkpoint)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"written to {options.folder}: {json.dumps(sorted(path.name for path in options.folder.iterdir()))}")
    return 0


def _export(run: str, folder: Path, which: str) -> None:
    from omegaconf import OmegaConf

    from instruct_lm.commands import build, runs
    from instruct_lm.export.huggingface import hub_config, save_pretrained

    checkpoint = runs.checkpoint_path(run, which)
    config: dict[str, Any] = OmegaConf.to_container(runs.load_run_config(run), resolve=True)  # type: ignore[assignment]
    hub_config(build.gpt_config(config["model"]))  # before anything is loaded
    save_pretrained(build.load_trained(config, checkpoint, build.build_fetcher(config)), folder)


if __name__ == "__main__":
    sys.exit(main())
