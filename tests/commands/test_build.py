"""What both commands build from a configuration, and what is said where a file does not fit it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from instruct_lm.commands import build
from instruct_lm.config import TrainConfig
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import adapter_state
from tests.model.conftest import CONFIGS
from tests.model.references import reference
from tests.run_commands import typed

FETCHER = Fetcher(None, offline=True)


def config(*overrides: str) -> TrainConfig:
    return typed("train", "model=gpt2-tiny", *overrides)


def model(config: TrainConfig) -> GPT:
    return build.build_model(config, FETCHER)


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.tokenizer=bytes has 257 ids, model\.vocab_size=256"):
        build.build_tokenizer(config("model.vocab_size=256").model, FETCHER)
    assert build.build_tokenizer(config("model.vocab_size=257").model, FETCHER).vocab_size == 257


def test_without_a_tokenizer_of_its_own_a_model_has_that_of_its_weights(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    values = config("model.vocab_size=257")
    save_pretrained(model(values), tokenizer, tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        own = values.model.model_copy(update={"tokenizer": None, "weights": str(weights)})
        assert build.build_tokenizer(build.resolve_model(own, FETCHER), FETCHER).encode("é") == tokenizer.encode("é")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose head is narrower than GPT-2's would be, without a tokenizer of its own."""
    folder = tmp_path / "my-base"
    reference("llama3").save_pretrained(folder)
    return folder


def test_what_is_open_is_taken_from_the_base(base: Path) -> None:
    values = typed("train", "model=auto", f"model.weights={base}", "model.tokenizer=bytes", "data.max_length=40")
    resolved = build.resolve(values, FETCHER)
    assert build.resolve(resolved, FETCHER) is resolved
    assert resolved.model.name == "my-base"
    assert GPTConfig.of(resolved.model) == CONFIGS["llama3"]
    assert resolved.model_copy(update={"model": values.model}) == values
    assert build.build_model(resolved, FETCHER).config == CONFIGS["llama3"]


def test_settings_are_checked_against_the_sizes_of_the_base(base: Path) -> None:
    values = typed("train", "model=auto", f"model.weights={base}", "data.max_length=49")
    with pytest.raises(InputError, match=r"data\.max_length=49 is over model\.block_size=48"):
        build.resolve(values, FETCHER)


def test_a_named_model_must_fit_its_weights(base: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json describes another model: model\.vocab_size=257, there 101"):
        build.build_model(config(f"model.weights={base}"), FETCHER)


def test_a_seed_decides_random_weights_and_adapters() -> None:
    first, same, other = (model(config("lora=r16", f"seed={seed}")).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in ("wte.weight", "h.0.attn.qkv.lora_a"):
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("given", "rounds"), [([], False), (["device.precision=bf16-mixed", "trainer.accumulate=2"], True)]
)
def test_what_trains_and_answers_is_accelerated_unless_fast_is_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, given: list[str], rounds: bool
) -> None:
    accelerated: list[tuple[torch.nn.Module, dict[str, bool]]] = []
    monkeypatch.setattr("instruct_lm.fast.accelerate", lambda module, **options: accelerated.append((module, options)))
    values = config(f"fast={str(fast).lower()}", "data.layout=padded", *given)
    untuned = build.load_responder(values, None, FETCHER)
    tuned = build.load_responder(values, save(tmp_path / "best.ckpt", untuned.model.state_dict()), FETCHER)
    tuner = build.build_tuner(values, model(values), tuned.tokenizer)
    answers, training = {"rounds_frozen": rounds}, {"packed": False, "keeps_rounded": rounds, "rounds_frozen": rounds}
    expected = [(untuned.model, answers), (tuned.model, answers), (tuner, training)]
    assert accelerated == (expected if fast else [])
    assert untuned.dtype == tuner.responder.dtype == (torch.bfloat16 if rounds else torch.float32)


def test_a_checkpoint_of_the_model_is_loaded(tmp_path: Path) -> None:
    values = config()
    trained = model(values.model_copy(update={"seed": 7}))
    loaded = build.load_trained(values, save(tmp_path / "best.ckpt", trained.state_dict()), FETCHER)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_adapters_are_merged_into_the_base(tmp_path: Path) -> None:
    values = config("lora=r16")
    trained = model(values)
    for tensor in adapter_state(trained).values():
        tensor.copy_(torch.randn(tensor.shape) * 0.1)
    loaded = build.load_trained(values, save(tmp_path / "best.ckpt", adapter_state(trained)), FETCHER)
    assert loaded.state_dict().keys() == model(config()).state_dict().keys()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids), trained(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.n_layer=3"], r"Missing key.*h\.2\.attn\.qkv\.weight"),
        (["model.n_layer=1"], r"Unexpected key.*h\.1\.attn\.qkv\.weight"),
        (["model.n_embd=64"], "size mismatch for wte.weight"),
        (["lora=r16"], "adapters are not the configured ones"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, overrides: list[str], part: str) -> None:
    path = save(tmp_path / "best.ckpt", model(config()).state_dict())
    with pytest.raises(InputError, match=rf"(?s)best\.ckpt does not fit the run's configuration: .*{part}"):
        build.load_trained(config(*overrides), path, FETCHER)


def test_adapters_of_other_sizes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "best.ckpt", adapter_state(model(config("lora=r16"))))
    for overrides in (["lora.rank=4"], ["lora.targets=[attn.qkv]"]):
        with pytest.raises(InputError, match="does not fit the run's configuration"):
            build.load_trained(config("lora=r16", *overrides), path, FETCHER)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 torn", {"epoch": 1}, [1, 2], {"state_dict": 5}])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "best.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"best\.ckpt is no readable checkpoint"):
        build.load_trained(config(), path, FETCHER)


def test_a_checkpoint_torn_off_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "best.ckpt", model(config()).state_dict())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"best\.ckpt is no readable checkpoint"):
        build.load_trained(config(), path, FETCHER)
