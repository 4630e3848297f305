"""Fixtures that more than one test file needs."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the 1100 real entries and GPT-2's vocabulary; not part of a clone."""
    if not (SHARED / "data" / "instruction-data.json").is_file():
        pytest.skip("no ../shared folder with the real data beside this clone")
    return SHARED
