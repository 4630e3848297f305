"""Files of a checkpoint that are missing, damaged, or of a kind that is not read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instruct_lm.errors import InputError
from instruct_lm.model.weight_files import INDEX, open_tensors
from tests.model.references import reference


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with several shards and their index."""
    reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def test_a_missing_shard_is_named(shards: Path) -> None:
    first = sorted(shards.glob("model-*.safetensors"))[0]
    first.unlink()
    for path in (shards, shards / INDEX):
        with pytest.raises(InputError, match=rf"(?s)lacks 1 of the \d+ files.*{first.name}\nFetch them too"):
            open_tensors(path)


def test_a_tensor_that_is_not_in_its_shard_is_named(shards: Path) -> None:
    last = sorted(shards.glob("model-*.safetensors"))[-1].name
    change_index(shards, lambda places: places.update({"model.norm.bias": last}))
    with pytest.raises(
        InputError, match=rf"(?s)1 tensors that are not in their files:\nmodel.norm.bias: not in {last}"
    ):
        open_tensors(shards)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin"]
)
def test_an_index_names_nothing_outside_its_folder(shards: Path, name: str) -> None:
    change_index(shards, lambda places: places.update({"model.norm.weight": name}))
    with pytest.raises(InputError, match=r"which is no \.safetensors file beside it"):
        open_tensors(shards)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"weight_map": 5}', '{"weight_map": {"a": 5}}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match=r"index\.json is no index of shards"):
        open_tensors(tmp_path)


def test_one_shard_of_several_is_not_taken_for_all(shards: Path) -> None:
    with pytest.raises(InputError, match=f"one of several shards: give its folder, {shards}"):
        open_tensors(sorted(shards.glob("model-*.safetensors"))[0])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(
            InputError, match=rf"{name}: pickled weights are not read.*save_pretrained.*instruct_lm\.export"
        ):
            open_tensors(path)


def test_pickles_beside_safetensors_are_not_touched(shards: Path) -> None:
    torch.save({"x": torch.ones(2)}, shards / "training_args.bin")
    assert "model.norm.weight" in open_tensors(shards)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ([], "holds no weights that can be read: give a folder with model.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter alone: merge it into its base"),
        (["base.gguf"], "give one of them, such as .*base.gguf"),
        (["training_args.bin"], "holds no weights"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path, files: list[str], part: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match=part):
        open_tensors(tmp_path)
