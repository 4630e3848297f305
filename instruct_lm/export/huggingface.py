"""Export to Hugging Face's layout, which transformers and this project (`model.weights=FOLDER`) read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.io.files import replacing, write_json
from instruct_lm.model.gpt import GPT
from instruct_lm.model.hub_config import CONFIG_NAME, hub_config
from instruct_lm.model.pretrained import HUB_LAYOUTS, pieces_of
from instruct_lm.model.weight_files import SINGLE


def save_pretrained(model: GPT, tokenizer: Tokenizer, folder: Path, rope: dict[str, Any] | None = None) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer's files, each atomically.

    Args:
        model: A model without adapters; its weights are written as float32.
        tokenizer: The model's; its stop tokens end an answer in transformers' `generate` too.
        folder: The destination, which is created if it does not exist.
        rope: As for `hub_config`.

    Raises:
        InputError: As for `hub_config`.
    """
    config = hub_config(model.config, rope)
    pieces = pieces_of(model, HUB_LAYOUTS[config["model_type"]])
    tensors = {piece.name: piece.values.to(torch.float32).reshape(piece.shape).contiguous() for piece in pieces}
    with replacing(folder / SINGLE) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    files = tokenizer.hub_files()
    files[CONFIG_NAME] = config | files["generation_config.json"]
    for name, content in files.items():
        write_json(content, folder / name)
