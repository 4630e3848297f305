"""An exported model against transformers, which reads it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from instruct_lm.data.conversation import Conversation
from instruct_lm.data.prompts import ALPACA, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.export.huggingface import save_pretrained, write_huggingface
from instruct_lm.export.safetensors_files import DTYPES, write_safetensors
from instruct_lm.model.description import describe
from instruct_lm.model.generation import Sampling, generate
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora, merge_lora
from instruct_lm.model.pretrained import Piece, load_pretrained
from instruct_lm.model.rope import llama3_rope_factors
from instruct_lm.respond import Responder
from tests.data.hub_tokenizers import HOSTILE, KINDS, train, write_folder, write_gguf
from tests.model.conftest import CONFIGS, ROPE, random_model

BYTES = load_tokenizer("bytes")
SMALL = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}


FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_transformers_reads_it_and_so_do_we(model: GPT, tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    if dtype != "f32":  # what rounding keeps
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype]).float()
    save_pretrained(model, BYTES, tmp_path, ROPE, dtype=dtype, shard_bytes=shard_bytes)
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == DTYPES[dtype]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
        described = describe(tmp_path)
        assert described is not None
        torch.testing.assert_close(load_pretrained(described, tmp_path)(ids), model(ids), rtol=0, atol=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = [name for name in names if name.startswith("model-")]
    if shard_bytes == 10**9:
        assert names == FILES
        return
    assert len(shards) > 1
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    assert index["metadata"]["total_size"] == sum(x.numel() * x.itemsize for x in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert all(len(load_file(tmp_path / shard)) == 1 or (tmp_path / shard).stat().st_size < 35_000 for shard in shards)


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    model.h[1].mlp.proj.weight.data[3, 2] = -70_000.0
    save_pretrained(model, BYTES, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 70000, beyond the 65504 of dtype=f16: use"
    ):
        save_pretrained(model, BYTES, tmp_path / "f16", dtype="f16")
    assert not any((tmp_path / "f16").glob("*"))
    for number in (float("nan"), float("-inf")):
        model.ln_f.weight.data[1] = number
        with pytest.raises(InputError, match=r"model\.norm\.weight holds numbers that are not finite .* diverged"):
            save_pretrained(model, BYTES, tmp_path / "f32")


def test_tensors_begin_at_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    for n in range(1, 9):
        write_safetensors([Piece("x" * n, (2,), torch.ones(2))], tmp_path)
        assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(("limit", "held"), [(24, [3]), (23, [2, 1]), (16, [2, 1]), (15, [1, 1, 1]), (1, [1, 1, 1])])
def test_a_shard_holds_what_fits_and_at_least_one_tensor(tmp_path: Path, limit: int, held: list[int]) -> None:
    tensors = [Piece(name, (2,), torch.tensor([float(i), 0.5])) for i, name in enumerate("abc")]  # of 8 bytes each
    write_safetensors(tensors, tmp_path, shard_bytes=limit)
    shards = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [len(shard) for shard in shards] == held
    assert {name: x.tolist() for shard in shards for name, x in shard.items()} == {
        "a": [0, 0.5],
        "b": [1, 0.5],
        "c": [2, 0.5],
    }


@pytest.mark.parametrize("scaling", [(32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192), (4.0, 2.0, 9.0, 3000)])
def test_rotary_factors_of_a_gguf_file_are_stated_as_parameters(tmp_path: Path, scaling: tuple[float, ...]) -> None:
    factors = [float(np.float32(x)) for x in llama3_rope_factors(64, 500_000.0, *scaling)]  # GGUF has them in f32
    config = dataclasses.replace(CONFIGS["llama"], head_dim=64, rope_base=500_000.0, rope_factors=tuple(factors))
    model = random_model(config)
    save_pretrained(model, BYTES, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-5)
    odd = dataclasses.replace(config, rope_factors=tuple(1.0 + i % 3 for i in range(32)))
    with pytest.raises(InputError, match="no such parameters give them"):
        save_pretrained(random_model(odd), BYTES, tmp_path)


@pytest.fixture(params=["bytes", "gpt2", *KINDS])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """One of each kind: `bytes`, GPT-2's merges, tokenizer.json (also from GGUF: those of SmolLM2 and Qwen2)."""
    if request.param == "bytes":
        return BYTES
    made = train("gpt-2" if request.param == "gpt2" else request.param)
    if request.param == "gpt2":
        merges = [" ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
        (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        return load_tokenizer(tmp_path / "merges.txt")
    if request.param in ("smollm", "qwen2"):
        return load_tokenizer(write_gguf(tmp_path / "model.gguf", made, request.param))
    config = KINDS[request.param].settings | {"chat_template": "{{ messages }}"}
    return load_tokenizer(write_folder(tmp_path / "base", made, tokenizer_config=config))


def test_its_tokenizer_is_transformers_and_ours(tokenizer: Tokenizer, tmp_path: Path, shared_dir: Path) -> None:
    save_pretrained(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL)), tokenizer, tmp_path / "out")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    entries = json.loads((shared_dir / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    texts = [*HOSTILE, *(text for entry in entries for text in entry.values())]
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    assert theirs(texts)["input_ids"] == [bos + tokenizer.encode_special(text) for text in texts]
    plain = [tokenizer.encode(text) for text in texts]
    assert [again.encode(text) for text in texts] == plain
    assert [theirs.decode(ids) for ids in plain] == [tokenizer.decode(ids) for ids in plain]
    assert theirs.get_added_vocab() == tokenizer.control_tokens
    assert theirs.chat_template == tokenizer.chat_template
    for name in ("vocab_size", "end_of_text", "stop_tokens", "bos", "control_tokens", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)
    end, named = theirs.decode([tokenizer.end_of_text]), tokenizer.template_variables
    assert again.template_variables == {"eos_token": end, "pad_token": theirs.pad_token, **named}
    assert (theirs.padding_side, theirs.model_max_length) == ("left", SMALL["block_size"])


@pytest.mark.parametrize(("seed", "end"), [(3, 0), (1, 2)])
def test_generate_stops_where_ours_stops(tmp_path: Path, seed: int, end: int) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", train("smollm"), "smollm"))
    assert tokenizer.stop_tokens == {0, 2}
    model = random_model(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL), seed)
    model.wte.weight.data[[0, 2]] *= 4  # makes them likely; the seed decides which
    save_pretrained(model, tokenizer, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == [0, 2]
    prompts = [[first] for first in range(3, 23)]
    ours = generate(model, prompts, max_new_tokens=20, end_tokens=tokenizer.stop_tokens)
    made = [theirs.generate(torch.tensor([ids]), max_new_tokens=20, pad_token_id=1)[0, 1:].tolist() for ids in prompts]
    assert ours == made
    assert end in {ids[-1] for ids in ours}


def test_merged_adapters_are_in_it(model: GPT, tmp_path: Path) -> None:
    add_lora(model, rank=3, alpha=6.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    with torch.no_grad():
        adapted = model(ids)
        save_pretrained(merge_lora(model), BYTES, tmp_path, ROPE)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(ids).logits, adapted, rtol=1e-3, atol=1e-3)


SETTINGS = {
    "greedy": (Sampling(), {"do_sample": False}),
    "all": (Sampling(0.7), {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}),
    "limits": (Sampling(1.3, 7, 0.9), {"do_sample": True, "temperature": 1.3, "top_k": 7, "top_p": 0.9}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_runs_generation_settings_are_transformers(tmp_path: Path, name: str) -> None:
    sampling, expected = SETTINGS[name]
    model = random_model(GPTConfig(vocab_size=257, **SMALL))
    write_huggingface(Responder(model, BYTES, ALPACA, 17, sampling), tmp_path, "f32")
    config = GenerationConfig.from_pretrained(tmp_path)
    config.validate(strict=True)
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (17, 256, 256)


# The kind of vocabulary, the style → the tokens that end an answer, and the one for padding.
TOKENS = {
    ("smollm", "alpaca"): (["<|endoftext|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    ("smollm", "chatml"): (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
    ("llama-bpe", "alpaca"): (["<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
    ("qwen2", "chatml"): (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
    ("gpt-2", "alpaca"): (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
}


@pytest.mark.parametrize(("kind", "style"), TOKENS)
def test_its_end_and_padding_tokens_are_those_of_the_style(tmp_path: Path, kind: str, style: str) -> None:
    stops, end, pad = TOKENS[kind, style]
    tokenizer = load_tokenizer(write_folder(tmp_path / "base", train(kind), tokenizer_config=KINDS[kind].settings))
    model = random_model(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL))
    responder = Responder(model, tokenizer, get_style(style, tokenizer))
    write_huggingface(responder, tmp_path / "out", "f32")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert set(ids) == responder.stop_tokens
    assert sorted(theirs.convert_ids_to_tokens(ids)) == stops
    assert (theirs.eos_token, theirs.pad_token) == (end, pad)
    assert config.pad_token_id == theirs.pad_token_id
    assert load_tokenizer(tmp_path / "out").stop_tokens == tokenizer.stop_tokens


@pytest.mark.parametrize("style", ["alpaca", "chatml"])
def test_a_pipeline_gives_our_answers_alone_and_in_a_batch(tmp_path: Path, style: str) -> None:
    tokenizer = load_tokenizer(
        write_folder(tmp_path / "base", train("qwen2"), tokenizer_config=KINDS["qwen2"].settings)
    )
    # More rows than ids, as Qwen's: those beyond have no text.
    config = GPTConfig(vocab_size=tokenizer.vocab_size + 90, **SMALL | {"block_size": 256})
    entries = [("Name a colour.", ""), ("Add them.", "1, 2"), ("Why?\n", "x"), ("a b c", "")] * 3
    conversations, ours = [Conversation.of(*entry) for entry in entries], []
    for seed in itertools.count():  # until a random model has several things to say
        model = random_model(config, seed)
        model.wte.weight.data[tokenizer.vocab_size :] *= 0.1
        model.wpe.weight.data *= 3
        responder = Responder(model, tokenizer, get_style(style, tokenizer), 12)
        ours = responder.answer(conversations)
        if len({response.text for response in ours}) > 2:
            break
    write_huggingface(responder, tmp_path / "out", "f32")
    lead = getattr(responder.style, "input_lead", "")
    messages = [[{"role": "user", "content": text + (lead + given if given else "")}] for text, given in entries]
    answer = pipeline("text-generation", model=str(tmp_path / "out"))
    for batch_size in (1, 5):
        made = [each[0]["generated_text"][-1]["content"] for each in answer(messages, batch_size=batch_size)]
        assert [text.strip() for text in made] == [_without(response.text, tokenizer) for response in ours]


def _without(text: str, tokenizer: Tokenizer) -> str:
    """A text without control tokens, which a pipeline leaves out."""
    for token in tokenizer.control_tokens:
        text = text.replace(token, "")
    return text.strip()


def test_the_first_file_that_fails_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("instruct_lm.export.safetensors_files.converted", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(random_model(CONFIGS["gpt2"]), BYTES, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
