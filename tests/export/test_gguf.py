"""GGUF files as they are read here, and by llama.cpp."""

import json
import logging
import re
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.encoding import encode_pieces
from instruct_lm.data.pieces import prompt_pieces
from instruct_lm.data.prompts import STYLES, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError, RunError
from instruct_lm.export.gguf import save_gguf
from instruct_lm.export.gguf_tokenizer import tokenizer_metadata
from instruct_lm.io.files import new_folder
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.generation import Sampling, generate
from instruct_lm.model.gguf_config import read_gguf_config
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import load_pretrained
from instruct_lm.respond import Responder
from tests.conftest import ROOT
from tests.data.hub_tokenizers import HOSTILE, KINDS, train, write_folder
from tests.export.llama_server import served
from tests.model.conftest import CONFIGS, LLAMA, random_model

BYTES = load_tokenizer("bytes")
SMALL = GPTConfig(vocab_size=300, block_size=400, n_layer=1, n_head=2, n_embd=32)
TURNS = {
    "input": (Turn("user", "Name it.", "2 + 2, café"), Turn("assistant", "4")),
    "no input": (Turn("user", "Name a colour."), Turn("assistant", "Red.")),
    "system": (Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "I.")),
    "several": (
        *(Turn("system", "Be kind."), Turn("user", "Hi 12345.", "語"), Turn("assistant", "Hello, it's me.")),
        *(Turn("user", "And?"), Turn("assistant", "So."), Turn("user", "Why?"), Turn("assistant", "Because.")),
    ),
}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""Of Llama 3.2, with a date and stripped messages."""

GPT2 = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
"""Ends with a blank, which belongs to the response; names a token that this tokenizer lacks, and that llama.cpp would make up."""

TEMPLATES = {"gpt-2": GPT2, "smollm": SMOLLM2, "llama-bpe": LLAMA3, "qwen2": SMOLLM2}


def texts() -> list[str]:
    entries = json.loads((ROOT / "instruct_lm" / "data" / "sample.json").read_text(encoding="utf-8"))
    return [text for entry in entries for text in entry.values() if text]


def prompts(n: int = 50) -> list[str]:
    return texts()[:n]


def hub_tokenizer(name: str, folder: Path) -> Tokenizer:
    """One of each kind, with a chat template; `merges`: GPT-2's merges alone."""
    if name == "bytes":
        return BYTES
    made = train("gpt-2" if name == "merges" else name)
    if name == "merges":
        merges = [" ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        return load_tokenizer(folder / "merges.txt")
    config = KINDS[name].settings | {"chat_template": TEMPLATES[name]}
    return load_tokenizer(write_folder(folder / "base", made, tokenizer_config=config))


def small_responder(tokenizer: Tokenizer, style: str = "alpaca", **options: Any) -> Responder:
    model = random_model(replace(SMALL, vocab_size=tokenizer.vocab_size + 3))
    return Responder(model, tokenizer, get_style(style, tokenizer), **options)


def messages(turns: tuple[Turn, ...], style: str) -> list[dict[str, str]]:
    """A prompt's turns as a client sends them, the input in the user's message."""
    lead = STYLES[style].input_lead if style in STYLES else "\n"
    contents = [turn.text + (lead + turn.input if turn.input else "") for turn in turns]
    return [{"role": turn.role, "content": text} for turn, text in zip(turns, contents, strict=True)][:-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same_and_so_do_we(name: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], vocab_size=300, block_size=256)
    model = random_model(config)
    path = save_gguf(Responder(model, BYTES, get_style("alpaca", BYTES), 8), tmp_path, "f32", name)

    read = read_gguf_config(read_gguf(path))
    expected = replace(config, n_inner=config.inner)
    if config.rope_factors:
        expected = replace(expected, rope_factors=tuple(np.float32(config.rope_factors).tolist()))
    assert read == expected
    for mine, theirs in zip(model.parameters(), load_pretrained(read, path).parameters(), strict=True):
        assert torch.equal(mine, theirs)

    # llama.cpp looks GELU up in a table of float16.
    tolerance = 1e-2 if name.startswith("gpt2") else 1e-3
    asked = [BYTES.encode(text) for text in prompts()]
    ours = generate(model, asked, max_new_tokens=8, end_tokens=BYTES.stop_tokens)
    printable = [[i, False] for i in range(300) if not 32 <= i < 127]  # others come without logprobs
    with served(path) as server:
        for ids, expected_ids in zip(asked, ours, strict=True):
            made = server.post("/completion", prompt=ids, n_predict=8, temperature=0, return_tokens=True)["tokens"]
            assert_greedy(model, ids, made, expected_ids, tolerance)
        for ids in asked[:5]:
            body = {"n_predict": 1, "temperature": 0, "n_probs": 300, "logit_bias": printable}
            [made] = server.post("/completion", prompt=ids, **body)["completion_probabilities"]
            with torch.no_grad():
                expected_probs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            theirs = {item["id"]: item["logprob"] for item in made["top_logprobs"]}
            assert len(theirs) == 300
            assert max(abs(expected_probs[i].item() - value) for i, value in theirs.items()) < tolerance


def assert_greedy(model: GPT, prompt: list[int], made: list[int], expected: list[int], tolerance: float) -> None:
    """The same tokens, but for where our two best logits are within the tolerance."""
    made = made[: len(expected)]
    if made == expected or expected[: len(made)] == made == expected[:-1]:  # the server leaves the end token out
        return
    place = next(i for i, pair in enumerate(zip(made, expected, strict=False)) if pair[0] != pair[1])
    with torch.no_grad():
        best = model(torch.tensor([prompt + expected[:place]]))[0, -1].topk(2)
    assert best.values[0] - best.values[1] < tolerance
    assert made[place] in best.indices


@pytest.mark.parametrize(("dtype", "kind", "error"), [("f16", 1, 1e-3), ("bf16", 30, 8e-3), ("q8_0", 8, 1e-2)])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_matrices_are_rounded_and_nothing_else(name: str, dtype: str, kind: int, error: float, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], vocab_size=300, block_size=128)
    model = random_model(config)
    path = save_gguf(Responder(model, BYTES, get_style("alpaca", BYTES)), tmp_path, dtype, name)
    assert path.name == f"{name}-{dtype}.gguf"
    header = read_gguf(path)
    assert header.metadata["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[dtype]
    for tensor_name, tensor in header.tensors.items():
        if len(tensor.shape) == 1 or tensor_name == "position_embd.weight":
            assert tensor.kind == 0, tensor_name
        else:
            odd = dtype == "q8_0" and tensor.shape[-1] % 32
            assert tensor.kind == (1 if odd else kind), tensor_name
    again = load_pretrained(read_gguf_config(header), path)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= error * mine.abs().max()
    ids = BYTES.encode(prompts()[0])
    printable = [[i, False] for i in range(300) if not 32 <= i < 127]
    with served(path, 128) as server, torch.no_grad():
        made = server.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=300, logit_bias=printable)
        expected = again(torch.tensor([ids]))[0, -1].log_softmax(-1)
        theirs = {item["id"]: item["logprob"] for item in made["completion_probabilities"][0]["top_logprobs"]}
        # llama.cpp rounds what it multiplies with these matrices too.
        assert max(abs(expected[i].item() - value) for i, value in theirs.items()) < 0.25


@pytest.mark.parametrize("name", ["bytes", "merges", *KINDS])
def test_llama_cpp_has_the_same_words(name: str, tmp_path: Path) -> None:
    tokenizer = hub_tokenizer(name, tmp_path)
    path = save_gguf(small_responder(tokenizer), tmp_path, "f32", name)
    added = KINDS.get(name, KINDS["gpt-2"]).ordinary  # those are found in any text there
    cases = [text for text in [*texts()[:150], *HOSTILE] if not any(token in text for token in added)]
    if name == "qwen2":  # which composes characters, and llama.cpp does not
        import unicodedata

        cases = [text for text in cases if unicodedata.is_normalized("NFC", text)]
    with served(path) as server:
        for text in cases:
            if "\0" not in text:
                made = server.post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
                assert made == tokenizer.encode(text), repr(text)


STYLE_CASES = [(name, style) for name in ("bytes", "merges", *KINDS) for style in (*STYLES, "template")
               if style != "template" or name in KINDS]  # fmt: skip


@pytest.mark.parametrize(("name", "style"), STYLE_CASES)
def test_the_prompt_is_that_of_training(name: str, style: str, tmp_path: Path) -> None:
    tokenizer = hub_tokenizer(name, tmp_path)
    responder = small_responder(tokenizer, style)
    path = save_gguf(responder, tmp_path, "f32", name)
    with served(path) as server:
        for case, turns in TURNS.items():
            encoded = encode_pieces(prompt_pieces(responder.style.pieces(turns)), tokenizer)
            assert server.prompt_ids(messages(turns, style)) == [i for _, ids in encoded for i in ids], case

    again = load_tokenizer(path)
    for attribute in ("vocab_size", "end_of_text", "bos", "control_tokens"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute), attribute
    assert again.stop_tokens == responder.stop_tokens
    for text in [*texts()[:100], *HOSTILE]:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template is not None
    if style == "template" and name == "smollm":
        assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("style", ["alpaca", "chatml", "template"])
@pytest.mark.parametrize("name", ["smollm", "llama-bpe"])
def test_every_end_token_ends_a_response(name: str, style: str, tmp_path: Path) -> None:
    made = train(name)
    ids = {"smollm": [0, 3], "llama-bpe": [made.token_to_id("<|end_of_text|>"), made.token_to_id("<|begin_of_text|>")]}
    config = KINDS[name].settings | {"chat_template": TEMPLATES[name]}
    folder = write_folder(
        tmp_path / "base", made, tokenizer_config=config, generation_config={"eos_token_id": ids[name]}
    )
    tokenizer = load_tokenizer(folder)  # ids that llama.cpp does not know by their texts among them
    responder = small_responder(tokenizer, style)
    assert len(responder.stop_tokens) >= 3
    path = save_gguf(responder, tmp_path, "f32", name)
    assert read_gguf(path).metadata["tokenizer.ggml.eos_token_id"] == tokenizer.control_tokens.get(
        responder.style.end, tokenizer.end_of_text
    )
    with served(path) as server:
        for end in responder.stop_tokens:
            body = {"prompt": [5, 6], "n_predict": 4, "temperature": 0, "logit_bias": [[end, 1000]]}
            assert server.post("/completion", **body)["stop_type"] == "eos"
        ordinary = {"prompt": [5, 6], "n_predict": 4, "temperature": 0, "logit_bias": [[300, 1000]]}
        assert server.post("/completion", **ordinary)["stop_type"] == "limit"


@pytest.mark.parametrize(
    ("others", "named"), [(["<a>", "<b>", "<c>"], ["<c>"]), (["<|end_of_text|>", "<a>", "<b>"], [])]
)
def test_end_tokens_that_llama_cpp_does_not_know_take_the_places_and_one_without_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: list[str], named: list[str]
) -> None:
    made = train("llama-bpe")
    made.add_special_tokens(["<a>", "<b>", "<c>"])
    ids = {text: made.token_to_id(text) for text in ("<|eot_id|>", *others)}
    config = {"tokenizer_config": KINDS["llama-bpe"].settings, "generation_config": {"eos_token_id": [*ids.values()]}}
    tokenizer = load_tokenizer(write_folder(tmp_path / "base", made, **config))
    with caplog.at_level(logging.WARNING):
        file = save_gguf(small_responder(tokenizer), tmp_path, "f32", "model")
    places = [read_gguf(file).metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert places == [ids[text] for text in ("<|eot_id|>", "<a>", "<b>")]
    assert re.findall("llama.cpp does not end at (.+?)[.]", caplog.text) == named


def test_no_text_is_there_twice_where_the_model_has_more_rows_than_tokens(tmp_path: Path) -> None:
    made = train("smollm")
    n = made.get_vocab_size()
    made.add_tokens([f"[PAD{n + 1}]"])  # as the converter would name the row after it
    tokenizer = load_tokenizer(write_folder(tmp_path, made, tokenizer_config=KINDS["smollm"].settings))
    metadata = tokenizer_metadata(tokenizer, STYLES["alpaca"], tokenizer.stop_tokens, n + 3)
    texts, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert texts[n:] == [f"[PAD{n + 1}]", f"[UNUSED{n + 1}]", f"[PAD{n + 2}]"]
    assert kinds[n:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]


def test_llama_cpp_samples_as_the_run_does(tmp_path: Path) -> None:
    for sampling, expected in (
        (Sampling(), {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}),
        (Sampling(0.5, top_k=7, top_p=0.25), {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0}),
    ):
        path = save_gguf(small_responder(BYTES, sampling=sampling), tmp_path, "f32", f"t{sampling.temperature}")
        with served(path) as server:
            params = server.get("/props")["default_generation_settings"]["params"]
        assert {key: params[key] for key in expected} == expected


@pytest.mark.parametrize("style", ["alpaca", "phi3", "chatml", "template"])
def test_tokens_that_reach_into_the_style_are_those_of_training(style: str, tmp_path: Path) -> None:
    made = json.loads(train("llama-bpe").to_str())
    breaks = "ĊĊ" if style == "alpaca" else "Ċ"
    vocabulary = made["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in made["added_tokens"]}  # else `tokenizers` counts anew
    for token in ("ĊĊ", f".{breaks}"):  # as Llama 3 and Qwen2 have
        vocabulary.setdefault(token, max(vocabulary.values()) + 1)
    made["model"]["merges"] += [["Ċ", "Ċ"], [".", breaks]]
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(made))
    settings = KINDS["llama-bpe"].settings | {"chat_template": TEMPLATES["llama-bpe"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    responder = small_responder(tokenizer, style)
    path = save_gguf(responder, tmp_path, "f32", "model")
    turns = (Turn("user", "Name it."), Turn("assistant", "x"))
    reaches = vocabulary[f".{breaks}"] in responder.prompt_ids(Conversation(turns))
    assert reaches == (style in ("alpaca", "phi3"))
    with served(path) as server:
        assert server.prompt_ids(messages(turns, style)) == responder.prompt_ids(Conversation(turns))


def test_a_splitting_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    made = json.loads(train("gpt-2").to_str())
    sentencepiece = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for change in (
        {"pre_tokenizer": sentencepiece},
        {"pre_tokenizer": None},
        {"pre_tokenizer": made["pre_tokenizer"] | {"add_prefix_space": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": made["model"] | {"ignore_merges": True}},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(made | change))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        tokenizer = load_tokenizer(folder)
        with pytest.raises(InputError, match=r"splits texts into words in a way that .* Use format=hf"):
            save_gguf(small_responder(tokenizer), folder, "f32", "model")
        assert not list(folder.glob("*.gguf"))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "f16", r"blk\.0\.ffn_up\.weight holds 1e\+05, which f16 does not\. Use dtype=f32"),
        (float("nan"), "f32", r"blk\.0\.ffn_up\.weight holds nan, which f32 does not\. Export an earlier checkpoint"),
        (float("-inf"), "bf16", r"ffn_up\.weight holds inf"),
        (3.4e38, "bf16", r"ffn_up\.weight holds 3.4e\+38"),
        (1e7, "q8_0", r"ffn_up\.weight holds 1e\+07"),
    ],
)
def test_what_does_not_fit_is_refused(value: float, dtype: str, message: str, tmp_path: Path) -> None:
    responder = small_responder(BYTES)
    responder.model.h[0].mlp.fc.weight.data[3, 5] = value
    with pytest.raises(InputError, match=message), new_folder(tmp_path / "out") as part:
        save_gguf(responder, part, dtype, "model")
    assert list(tmp_path.iterdir()) == []


def test_rope_factors_of_another_architecture_are_refused(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=300, n_layer=1, **(LLAMA | {"qkv_bias": True}), n_head=4, n_embd=32,
                       rope_factors=(1.0,) * 4)  # fmt: skip
    with pytest.raises(InputError, match=r"rope_factors: llama\.cpp computes them for llama, not for qwen2"):
        save_gguf(Responder(GPT(config), BYTES, get_style("alpaca", BYTES)), tmp_path, "f32", "model")


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [1000, 40_000, 100_000])  # in the metadata, in a tensor, in a later one
def test_a_full_disk_leaves_nothing(room: int, tmp_path: Path) -> None:
    responder = small_responder(BYTES)
    with pytest.raises(RunError, match=r"model-f32\.gguf cannot be written .* nothing is kept"):  # noqa: SIM117
        with new_folder(tmp_path / "out") as part, largest_file(room):
            save_gguf(responder, part, "f32", "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_it_needs_little_more_than_the_largest_tensor(dtype: str, tmp_path: Path) -> None:
    config = replace(SMALL, n_layer=12, n_embd=256, n_head=4)
    responder = Responder(GPT(config).init_weights(0), BYTES, get_style("alpaca", BYTES))
    size = sum(parameter.nbytes for parameter in responder.model.parameters())
    largest = max(parameter.nbytes for parameter in responder.model.parameters())
    tracemalloc.start()
    save_gguf(responder, tmp_path, dtype, "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + 2**20 < size / 4


def test_names_of_files_are_safe(tmp_path: Path) -> None:
    path = save_gguf(small_responder(BYTES), tmp_path, "f32", '../a "b"/\nモデル v1.0')
    assert path == tmp_path / "a-b-v1.0-f32.gguf"
    assert re.search("モデル", read_gguf(path).metadata["general.name"])
    for number, name in enumerate(("x" * 250, "run\udce9")):  # the longest folder; one whose name is not UTF-8
        (tmp_path / str(number)).mkdir()
        path = save_gguf(small_responder(BYTES), tmp_path / str(number), "f32", name)
        assert read_gguf(path).metadata["general.name"] == name.replace("\udce9", "\ufffd")


def test_answers_are_those_of_the_responder(tmp_path: Path) -> None:
    tokenizer = hub_tokenizer("smollm", tmp_path)
    responder = small_responder(tokenizer, "chatml", max_new_tokens=6)
    path = save_gguf(responder, tmp_path, "f32", "model")
    entries = [Conversation.of(text) for text in prompts(10)]
    with served(path) as server:
        made = [server.post("/completion", prompt=responder.prompt_ids(entry), n_predict=6) for entry in entries]
    assert [item["content"].strip() for item in made] == [answer.text for answer in responder.answer(entries)]
