"""Loading against transformers' own checkpoints, and GGUF against the same weights written by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from instruct_lm.errors import InputError
from instruct_lm.fast import accelerate
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model import pretrained
from instruct_lm.model.description import describe
from instruct_lm.model.generation import generate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import GGUF_LAYOUTS, HUB_LAYOUTS, load_pretrained, pieces_of
from tests.model.conftest import CONFIGS, random_model
from tests.model.references import reference, write_gguf

Saved = tuple[GPTConfig, PreTrainedModel, Path]


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    """Configuration, transformers' model, and the folder that it saved itself to."""
    model = reference(request.param)
    model.save_pretrained(tmp_path)
    return CONFIGS[request.param], model, tmp_path


def load(path: Path) -> GPT:
    """The model that a base's own files describe."""
    config = describe(path)
    assert config is not None
    return load_pretrained(config, path)


@pytest.mark.parametrize("form", ["file", "shards", "gguf"])
def test_logits_equal_transformers(saved: Saved, form: str) -> None:
    config, theirs, folder = saved
    if form == "shards":
        (folder / "model.safetensors").unlink()
        theirs.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        assert torch.equal(load(folder / "model.safetensors.index.json").wte.weight, load(folder).wte.weight)
    path = write_gguf(folder / "model.gguf", theirs) if form == "gguf" else folder
    ids = torch.randint(0, config.vocab_size, (3, config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(load(path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(load_pretrained(config, path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_greedy_answers_equal_transformers(saved: Saved) -> None:
    _, theirs, folder = saved
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 101, (n,), generator=generator).tolist() for n in (1, 5, 28, 12)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(20):
            with torch.no_grad():
                ids = torch.cat((ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        expected.append(ids[0, len(prompt) :].tolist())
    model = load(folder)
    for fast in (False, True):
        if fast:
            accelerate(model)
        for batch_size in (1, len(prompts)):
            assert generate(model, prompts, max_new_tokens=20, batch_size=batch_size) == expected


def test_prefixed_names_buffers_and_shards_load_too(tmp_path: Path) -> None:
    theirs = reference("gpt2")
    state = {f"transformer.{k}": v.contiguous() for k, v in theirs.transformer.state_dict().items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    names = sorted(state)
    save_file({name: state[name] for name in names[:9]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[9:]}, tmp_path / "b.safetensors")
    index = {name: "a.safetensors" if i < 9 else "b.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(index).replace(chr(39), chr(34))}}}')
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(CONFIGS["gpt2"], tmp_path)(ids), theirs(ids).logits, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_map_that_reads_also_writes(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    pieces = list(pieces_of(model, HUB_LAYOUTS[name.removesuffix("-untied").replace("llama3", "llama")]))
    state = {piece.name: piece.values.reshape(piece.shape).clone().contiguous() for piece in pieces}
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in model.parameters())
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_pretrained(CONFIGS[name], tmp_path)
    for ours, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(ours)), ours


def test_gguf_pieces_are_in_the_order_of_llama_cpps_converter() -> None:
    model = random_model(CONFIGS["llama"])
    hub = {piece.name: piece.values for piece in pieces_of(model, HUB_LAYOUTS["llama"])}
    gguf = {piece.name: piece.values.reshape(piece.shape) for piece in pieces_of(model, GGUF_LAYOUTS["llama"])}
    for heads, part in ((model.config.n_head, "q"), (model.config.kv_heads, "k")):
        rows = hub[f"model.layers.1.self_attn.{part}_proj.weight"]
        # convert_hf_to_gguf.py, LlamaModel.permute
        permuted = rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        assert torch.equal(gguf[f"blk.1.attn_{part}.weight"], permuted)


def test_missing_extra_and_misshaped_tensors_are_all_listed(tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    prefix = "transformer." if "transformer.wte.weight" in state else ""
    del state[f"{prefix}h.1.ln_2.bias"]
    state[f"{prefix}h.2.ln_1.weight"] = torch.ones(32)
    state[f"{prefix}h.0.mlp.c_fc.weight"] = torch.ones(32, 64)
    save_file(state, path)
    with pytest.raises(InputError) as error:
        load_pretrained(CONFIGS["gpt2"], path)
    message = str(error.value)
    assert "vocab_size=101, block_size=48, n_layer=2, n_head=4, n_embd=32, tied=True. 3 tensors differ" in message
    assert "h.1.ln_2.bias: the file has none, the model (32,)" in message
    assert "h.2.ln_1.weight: the file has (32,), the model none" in message
    assert "h.0.mlp.c_fc.weight: the file has (32, 64), the model (32, 128)" in message


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_tied_head_may_be_a_copy_of_the_embedding_and_nothing_else(tmp_path: Path, name: str) -> None:
    model = reference(name)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "lm_head.weight": model.lm_head.weight.clone()}, tmp_path / "model.safetensors")
    assert load(tmp_path).lm_head is None
    save_file({**state, "lm_head.weight": torch.randn(101, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding.*tie_word_embeddings"):
        load(tmp_path)


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    reference("llama3").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: the file has none, the model \(101, 32\)"):
        load(tmp_path)


QUANTISED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", QUANTISED)
def test_tensors_are_dequantised_as_the_gguf_package_does(tmp_path: Path, kind: str) -> None:
    # Random blocks, with scales that are finite: every bit of a block is used.
    wanted = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[wanted]
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 256, (3 * 512 // block, size), dtype=np.uint8)
    scales = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}
    for start in scales.get(kind, []):
        stored[:, start : start + 2] = generator.normal(size=(len(stored), 1)).astype(np.float16).view(np.uint8)
    if kind in ("F32", "F16", "BF16"):
        numbers = generator.normal(size=len(stored)).astype(np.float32)
        halves = numbers.astype(np.float16) if kind == "F16" else numbers
        stored = halves.view(np.uint8).reshape(len(stored), -1)[:, -size:].copy()
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("first", np.ones(5, dtype=np.float32))
    writer.add_tensor("x", stored.reshape(3, -1), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = next(tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "x")
    expected = dequantize(theirs.data, theirs.tensor_type).reshape(3, 512)
    assert np.isfinite(expected).all()
    assert np.unique(expected).size > 100
    np.testing.assert_array_equal(read_gguf(tmp_path / "x.gguf").read("x"), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_quantised_gguf_gives_the_logits_of_its_rounded_weights(tmp_path: Path, kind: str) -> None:
    theirs, wanted = reference("qwen2"), GGMLQuantizationType[kind]

    def quantise(name: str, array: np.ndarray) -> GGMLQuantizationType | None:
        return wanted if array.ndim == 2 and array.shape[1] % 32 == 0 else None

    path = write_gguf(tmp_path / "model.gguf", theirs, quantise=quantise)
    for name, tensor in theirs.state_dict().items():
        if quantise(name, tensor.numpy()) and name != "lm_head.weight":  # the embedding
            rounded = dequantize(quantize(tensor.numpy(), wanted), wanted)
            assert not np.array_equal(rounded, tensor.numpy())
            tensor.copy_(torch.from_numpy(rounded.reshape(tensor.shape)))
    ids = torch.randint(0, 101, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(load(path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("described", [True, False])
def test_another_architecture_is_named(tmp_path: Path, described: bool) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    if not described:
        (tmp_path / "config.json").unlink()
    expected = (
        r"model\.position=rotary, there learned" if described else "another architecture than llama: no model.embed"
    )
    with pytest.raises(InputError, match=expected):
        load_pretrained(CONFIGS["llama"], tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(range(256)) * 8, b"GGUF" + bytes(40)])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_pretrained(CONFIGS["gpt2"], tmp_path / name)


def test_weights_in_integers_are_refused(tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"transformer.h.0.mlp.c_fc.weight": tensors["transformer.h.0.mlp.c_fc.weight"].char()}, file)
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc\.weight has torch\.int8 numbers: take the base that is not"):
        load_pretrained(CONFIGS["gpt2"], tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    theirs = reference("llama")
    with torch.no_grad():
        theirs.model.norm.weight[3] = value
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.norm\.weight has numbers that are not finite: it is damaged"):
        load_pretrained(CONFIGS["llama"], tmp_path)


def test_blocks_that_a_file_promises_and_does_not_hold_are_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    monkeypatch.setattr(pretrained, "GPT", lambda config: pytest.fail("built"))
    with pytest.raises(InputError, match=r"has 20 tensors, too few for model.n_layer=4096"):
        load_pretrained(replace(CONFIGS["llama"], n_layer=4096), tmp_path)
