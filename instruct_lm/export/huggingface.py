"""Export to Hugging Face's layout, which transformers and this project (`model.weights=FOLDER`) read.

The tokenizer is the base model's.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from instruct_lm.io.files import replacing, write_json
from instruct_lm.model.gpt import GPT
from instruct_lm.model.hub_config import CONFIG_NAME, hub_config
from instruct_lm.model.pretrained import HUB_LAYOUTS, pieces_of
from instruct_lm.model.weight_files import SINGLE


def save_pretrained(model: GPT, folder: Path, rope: dict[str, Any] | None = None) -> None:
    """Write `model.safetensors` and `config.json`, each atomically.

    Args:
        model: A model without adapters; its weights are written as float32.
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
    write_json(config, folder / CONFIG_NAME)
