"""Loading against transformers' own checkpoints, and GGUF against the same weights written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from instruct_lm.errors import InputError
from instruct_lm.model.gpt import GPTConfig
from instruct_lm.model.pretrained import LAYOUTS, load_pretrained, pieces_of
from tests.model.conftest import CONFIGS, random_model


def reference(name: str) -> PreTrainedModel:
    """A random transformers model of the sizes of `CONFIGS`."""
    c = CONFIGS[name]
    if name == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                       bos_token_id=0, eos_token_id=0)
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=c.vocab_size, max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
                        num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, hidden_size=c.n_embd,
                        intermediate_size=c.inner, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
                        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base})
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(params=["gpt2", "llama"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GPTConfig, PreTrainedModel, Path]:
    """Configuration, transformers' model, and the folder that it saved itself to."""
    model = reference(request.param)
    model.save_pretrained(tmp_path)
    return CONFIGS[request.param], model, tmp_path


def test_logits_equal_transformers(saved: tuple[GPTConfig, PreTrainedModel, Path]) -> None:
    config, theirs, folder = saved
    ids = torch.randint(0, config.vocab_size, (3, config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(config, folder)(ids), theirs(ids).logits, rtol=0, atol=1e-4)


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


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """What llama.cpp's converter writes: its names, and q and k with each head's two halves interleaved."""
    from gguf import GGUFWriter

    config = model.config
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    }  # fmt: skip
    writer = GGUFWriter(path, "llama")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:  # convert_hf_to_gguf.py, LlamaModel.permute
                array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        for ours, gguf in names.items():
            name = name.replace(ours, gguf)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_safetensors(tmp_path: Path) -> None:
    theirs = reference("llama")
    write_gguf(tmp_path / "model.gguf", theirs)
    ids = torch.randint(0, 101, (2, 30))
    with torch.no_grad():
        ours = load_pretrained(CONFIGS["llama"], tmp_path / "model.gguf")(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("layout", "name"), [("gpt2", "gpt2"), ("llama", "llama"), ("gguf", "llama")])
def test_the_map_that_reads_also_writes(tmp_path: Path, layout: str, name: str) -> None:
    model = random_model(CONFIGS[name])
    pieces = list(pieces_of(model, LAYOUTS[layout]))
    state = {piece.name: piece.values.reshape(piece.shape).clone().contiguous() for piece in pieces}
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in model.parameters())
    save_file(state, tmp_path / "model.safetensors")  # the names decide the layout, not the container
    loaded = load_pretrained(CONFIGS[name], tmp_path)
    for ours, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(ours)), ours


def test_gguf_pieces_are_in_the_order_of_llama_cpps_converter() -> None:
    model = random_model(CONFIGS["llama"])
    hub = {piece.name: piece.values for piece in pieces_of(model, LAYOUTS["llama"])}
    gguf = {piece.name: piece.values.reshape(piece.shape) for piece in pieces_of(model, LAYOUTS["gguf"])}
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
    assert "h.1.ln_2.bias: the file has none, the model (32,)" in message
    assert "h.2.ln_1.weight: the file has (32,), the model none" in message
    assert "h.0.mlp.c_fc.weight: the file has (32, 64), the model (32, 128)" in message


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.randn(101, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tied"):
        load_pretrained(CONFIGS["gpt2"], tmp_path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="architecture"):
        load_pretrained(CONFIGS["llama"], tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(range(256)) * 8, b"GGUF" + bytes(40)])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_pretrained(CONFIGS["gpt2"], tmp_path / name)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        load_pretrained(CONFIGS["gpt2"], tmp_path)
