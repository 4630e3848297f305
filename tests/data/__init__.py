"""Helpers of the data tests."""

import hashlib
from pathlib import Path

import numpy as np


def gpt2_file(shared_dir: Path, name: str) -> Path:
    """`vocab.bpe` or `encoder.json` in the tiktoken cache folder, which names files by the SHA-1 of their URL."""
    url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    return shared_dir / "tiktoken" / hashlib.sha1(url.encode()).hexdigest()


def responses(rows, starts):
    """Whether each token belongs to the response, which begins at `starts` and ends the row."""
    return [np.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
