"""Tokenizers from the hub's files and from GGUF, against the `tokenizers` library, transformers and llama.cpp."""

import json
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instruct_lm.data import tokenizer_files
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from tests.data.hub_tokenizers import ALPHABET, HOSTILE, KINDS, train, write_folder, write_gguf

CONTROL = [text for kind in KINDS.values() for text in (*kind.control, *kind.ordinary)]
TEXTS = st.lists(st.one_of(st.text(ALPHABET), st.text(), st.sampled_from(CONTROL + HOSTILE))).map("".join)


@pytest.fixture(scope="module")
def trained() -> dict[str, tokenizers.Tokenizer]:
    return {name: train(name) for name in KINDS}


@pytest.fixture(scope="module")
def folders(trained: dict[str, tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind → folder in the hub's layout."""
    root = tmp_path_factory.mktemp("hub")
    for name, made in trained.items():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **KINDS[name].settings}
        write_folder(root / name, made, tokenizer_config=config)
    return {name: root / name for name in trained}


@pytest.fixture(scope="module")
def ours(
    trained: dict[str, tokenizers.Tokenizer], folders: dict[str, Path]
) -> dict[str, tuple[tokenizers.Tokenizer, Tokenizer, Tokenizer]]:
    """Kind → upstream's tokenizer, ours from tokenizer.json, ours from GGUF."""
    ggufs = {name: write_gguf(folder / "model.gguf", trained[name], name) for name, folder in folders.items()}
    return {name: (trained[name], load_tokenizer(folders[name]), load_tokenizer(ggufs[name])) for name in folders}


def check(upstream: tokenizers.Tokenizer, from_json: Tokenizer, from_gguf: Tokenizer, text: str) -> None:
    expected = upstream.encode(text, add_special_tokens=False).ids
    assert from_json.encode_special(text) == from_gguf.encode_special(text) == expected
    ids = from_json.encode(text)
    assert from_gguf.encode(text) == ids
    assert not set(ids) & set(from_json.control_tokens.values())
    if not any(control in text for control in from_json.control_tokens):
        assert ids == expected
    assert from_json.decode(expected) == from_gguf.decode(expected) == upstream.decode(expected, False)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_ids_are_upstreams_on_any_text(ours: Any, name: str, text: str) -> None:
    check(*ours[name], text)


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_upstreams_on_hostile_strings_and_the_entries(ours: Any, name: str, shared_dir: Path) -> None:
    entries = json.loads((shared_dir / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    for text in [*HOSTILE, *(text for entry in entries for text in entry.values())]:
        check(*ours[name], text)


@pytest.mark.parametrize("name", KINDS)
def test_transformers_agrees(ours: Any, folders: dict[str, Path], name: str) -> None:
    _, from_json, from_gguf = ours[name]
    theirs = AutoTokenizer.from_pretrained(folders[name])
    assert theirs(HOSTILE, add_special_tokens=False)["input_ids"] == [from_json.encode_special(t) for t in HOSTILE]
    assert theirs("a")["input_ids"][:-1] == ([] if from_json.bos is None else [from_json.bos])
    assert from_gguf.bos == from_json.bos
    assert from_json.vocab_size == from_gguf.vocab_size == len(theirs)
    assert from_json.control_tokens == from_gguf.control_tokens == theirs.get_added_vocab()
    assert from_json.template_variables == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    ends = {theirs.eos_token_id, from_json.control_tokens.get("<|endoftext|>", theirs.eos_token_id)}
    assert from_json.stop_tokens == from_gguf.stop_tokens == ends
    assert from_json.end_of_text == from_gguf.end_of_text


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_agrees(trained: Any, tmp_path: Path, name: str) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    path = write_gguf(tmp_path / "model.gguf", trained[name], name, weights=True)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(path), 64, 1, 1
    params.warmup = False
    server, tokenizer = xllamacpp.Server(params), load_tokenizer(path)

    def ids(text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
        ) as answer:
            return json.load(answer)["tokens"]

    for text in HOSTILE[1:]:  # an empty text is refused
        # llama.cpp does not compose characters for Qwen2 and recognises added tokens that are not special anywhere.
        if name != "qwen2" or "\u0301" not in text:
            assert ids(text, special=True) == tokenizer.encode_special(text)
            if "<think>" not in text:
                assert ids(text, special=False) == tokenizer.encode(text)


def test_a_word_of_llama_3_that_is_in_the_vocabulary_is_not_merged(ours: Any) -> None:
    upstream, *tokenizers_ = ours["llama-bpe"]
    merged = {"".join(merge) for merge in json.loads(upstream.to_str())["model"]["merges"]}
    words = [token for token in upstream.get_vocab() if len(token) > 3 and token.isascii() and token.isalpha()]
    unmerged = [word for word in words if word not in merged]
    assert len(unmerged) > 3
    for word in unmerged:
        assert [tokenizer.encode(word) for tokenizer in tokenizers_] == [[upstream.token_to_id(word)]] * 2


def test_a_control_token_in_the_vocabulary_is_no_word_of_the_users(tmp_path: Path) -> None:
    """Neither as a whole word, which Llama 3 looks up, nor by merges."""
    made = train("llama-bpe")
    definition = json.loads(made.to_str())
    definition |= {"added_tokens": [], "post_processor": None}
    definition["model"]["vocab"] |= {"EN": 700, "END": 701}
    definition["model"]["merges"] += [["E", "N"], ["EN", "D"]]
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer = load_tokenizer(write_folder(tmp_path, made, tokenizer_config={"eos_token": "END"}))
    assert (
        tokenizer.encode_special("END") == [tokenizer.end_of_text] == made.encode("END", add_special_tokens=False).ids
    )
    assert tokenizer.encode("END") == [made.token_to_id("EN"), made.token_to_id("D")]
    assert tokenizer.decode(tokenizer.encode("END END")) == "END END"


def test_sentencepiece_like(tmp_path: Path) -> None:
    """TinyLlama's kind: blanks become ▁, one before the text; characters without a token become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁the<s>", "th", "the", "▁the", "s>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary["<s>"] = 1
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    merges = ["t h", "th e", "▁ the", "s >", "< s>"]  # the last makes <s> of the user's text
    definition: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, text in enumerate(pieces[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary,
                  "merges": merges},
    }  # fmt: skip
    upstream = tokenizers.Tokenizer.from_str(json.dumps(definition))
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = load_tokenizer(write_folder(tmp_path, upstream, tokenizer_config=settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the the", " 語\n the", "", "het<", *HOSTILE]:
        expected = upstream.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode_special(text) == expected
        assert tokenizer.decode(expected) == upstream.decode(expected)
    assert tokenizer.encode_special("the</s>") == [vocabulary["▁the"], 2]
    assert 1 not in tokenizer.encode("<s>")
    assert theirs("the")["input_ids"] == [tokenizer.bos, *tokenizer.encode("the")] == [1, vocabulary["▁the"]]


# End tokens, chat templates and layouts


@pytest.mark.parametrize(
    ("files", "end", "stops"),
    [
        ({}, 700, {700, 702}),
        ({"generation_config": {"eos_token_id": [5, 702]}, "config": {"eos_token_id": 6}}, 700, {700, 702, 5, 6}),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, 700, {700, 702}),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, 700, {700, 702}),
        ({"tokenizer_config": {}, "config": {"eos_token_id": None}}, 700, {700}),
    ],
)
def test_end_tokens_come_from_the_models_files(
    trained: Any, tmp_path: Path, files: dict[str, Any], end: int, stops: set[int]
) -> None:
    write_folder(tmp_path, trained["qwen2"], **{"tokenizer_config": KINDS["qwen2"].settings, **files})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.end_of_text, tokenizer.stop_tokens) == (end, stops)


def test_end_tokens_of_gguf(trained: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", trained["llama-bpe"], "llama-bpe", eot_token_id=701, eom_token_id=702)
    assert load_tokenizer(path).stop_tokens == {701, 702, 703}
    assert load_tokenizer(path).end_of_text == 703
    assert load_tokenizer(path).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"tokenizer\.json: no file names the model's end token; add eos_token to the tokenizer_config\.json"),
        ({"config": {"eos_token_id": 704}}, r"[/\\]config\.json names the end token 704, which is not among the 704"),
        ({"generation_config": {"eos_token_id": [703, -1]}}, r"generation_config\.json names the end token -1"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, r"tokenizer_config\.json names the end token '<end>'"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json holds a JSON list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "added_tokens_decoder is damaged"),
    ],
)
def test_settings_that_do_not_fit_are_named(trained: Any, tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_folder(tmp_path, trained["llama-bpe"], **files))


def test_a_default_id_in_config_json_gives_way_to_an_end_token_that_is_there(trained: Any, tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, trained["llama-bpe"], config={"eos_token_id": 50256}, generation_config={"eos_token_id": 700}
    )
    assert load_tokenizer(folder).stop_tokens == {700}


def test_chat_templates_in_transformers_order(trained: Any, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_folder(tmp_path, trained["gpt-2"], tokenizer_config={"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "D"
    write_folder(tmp_path, trained["gpt-2"], tokenizer_config={}, chat_template={"chat_template": "J"})
    assert load_tokenizer(tmp_path).chat_template == "J"
    write_folder(tmp_path, trained["gpt-2"], tokenizer_config={"chat_template": "S"})
    assert load_tokenizer(tmp_path).chat_template == "S"
    (tmp_path / "chat_template.jinja").write_text("F", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "F"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "F"


@pytest.mark.parametrize(
    ("name", "cls"), [("gpt-2", None), ("gpt-2", "GPT2TokenizerFast"), ("qwen2", "Qwen2Tokenizer")]
)
def test_vocab_json_and_merges(ours: Any, tmp_path: Path, name: str, cls: str | None) -> None:
    """The older layout, from a folder or from its merges.txt; added tokens are those of tokenizer_config.json."""
    upstream = ours[name][0]
    model = json.loads(upstream.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    added = {
        str(i): {"content": token.content, "special": token.special}
        for i, token in upstream.get_added_tokens_decoder().items()
    }
    config = KINDS[name].settings | {"added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({"tokenizer_class": cls} if cls else {})))
    for source in (tmp_path, tmp_path / "merges.txt"):
        for text in HOSTILE:
            check(upstream, ours[name][1], load_tokenizer(source), text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeGenTokenizer"}')
    with pytest.raises(InputError, match=r"of a CodeGenTokenizer: give its tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_weights_and_their_index_stand_for_their_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    (folder / "weights").write_bytes((64).to_bytes(8, "little") + b'{"wte": {}}')
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "b"}}')
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    expected = load_tokenizer(folders["qwen2"]).fingerprint
    (folder / "tokenizer").write_bytes(b"\xef\xbb\xbf" + (folder / "tokenizer.json").read_bytes())  # no name, a BOM
    for name in ("weights", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer", "tokenizer.json"):
        assert load_tokenizer(folder / name).fingerprint == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": "1.0"', "is not JSON"),
        ("[]", "is no tokenizer.json: it has no `model`. Give a folder"),
        ('{"architectures": ["LlamaForCausalLM"]}', "it has no `model`"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "a model of type 'Unigram'; supported is BPE"),
        ('{"model": {"type": "BPE"}}', "without vocab and merges"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "out of vocabulary"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "defines no tokenizer that `tokenizers` can"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "?"}}', "defines no tokeniz"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}}', "defines no tokenizer"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "post_processor": {"type": "TemplateProcessing",'
            ' "single": [{"SpecialToken": {"id": "b", "type_id": 0}}], "pair": [], "special_tokens": {}}}',
            "defines no tokenizer",  # here the library panics
        ),
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_sentencepiece_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(InputError, match=r"sentencepiece tokenizer\.model alone.*AutoTokenizer\.from_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges"])
@pytest.mark.parametrize("value", [5, 2.5, "text", ["x", 1.5]])
def test_a_gguf_whose_tokenizer_is_of_other_types_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    metadata: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "token_type": [1], "merges": []}
    metadata = {f"tokenizer.ggml.{name}": each for name, each in (metadata | {key: value}).items()}
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(tokenizer_files, "read_gguf", lambda path: SimpleNamespace(metadata=metadata))
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.{key} is no list of (int|str): fetch it anew"):
        load_tokenizer(path)


def test_a_gguf_whose_end_token_is_no_whole_number_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "token_type": [1], "merges": []}
    metadata = {f"tokenizer.ggml.{name}": each for name, each in (metadata | {"bos_token_id": 0.0}).items()}
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(tokenizer_files, "read_gguf", lambda path: SimpleNamespace(metadata=metadata))
    assert tokenizer_files.read_tokenizer(path).named == {}
