"""A run for the tests of the chat."""

from pathlib import Path

import pytest

from tests.run_commands import call


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, one token a byte: its answers go on until they may not, for seconds."""
    folder = tmp_path_factory.mktemp("chat")
    settings = ["model=gpt2-tiny", "data=sample", "trainer=debug", "model.block_size=8000", "prompt=phi3"]
    call("train.py", *settings, "output_dir=run", "generation.max_new_tokens=20", cwd=folder)
    return folder / "run"
