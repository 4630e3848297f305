"""What the server of the reading processes imports once, so that each of them starts at once."""

import os

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # Arrow's own pool reserves a gigabyte of addresses

from instruct_lm.commands import hydra_app, runs  # noqa: F401
from instruct_lm.data import dataset, encoding, prompts, tokenizer  # noqa: F401
from instruct_lm.evaluation.judges import parsing  # noqa: F401
from instruct_lm.model import description, pretrained  # noqa: F401
