import json
import pickle
import shutil
import struct

import gguf
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.io.gguf import read_gguf
from tests.data import gpt2_file
from tests.data.hub_tokenizers import ALPHABET, HOSTILE

MERGES = ["t h", "Ġ Ġ", "th e", "Ġ the", "1 5", "! !", "' s", "Ã ©", "Ċ Ċ", "h e"]
SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())  # sorted by code point, they stand in the order of GPT-2's ids
MERGED = [merge.replace(" ", "") for merge in MERGES]
GPT2_VOCAB = {token: i for i, token in enumerate(SYMBOLS + MERGED)}
# Two control tokens first and bytes in another order, so that no id is right by accident; no token for 0x04 and 0x1D.
GGUF_TOKENS = ["<|start|>", "<|end|>", *(s for s in reversed(SYMBOLS) if s not in "Ąĝ"), *MERGED]


def reference(vocab, merges, digits):
    """The same BPE by the `tokenizers` library; `digits`: split them off one by one first, as SmolLM2 does."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    split_digits = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe


def write_gguf(path, tokens=GGUF_TOKENS, merges=MERGES, pre="smollm", model="gpt2", eos=1):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))  # 3: control, 1: normal
    writer.add_token_merges(merges)
    writer.add_eos_token_id(eos)
    writer.add_float32("a.number", 0.5)
    writer.add_array("a.list", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gpt2_small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2") / "merges.txt"
    path.write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def gguf_small(tmp_path_factory):
    """pre-tokenizer → tokenizer"""
    folder = tmp_path_factory.mktemp("gguf")
    return {pre: load_tokenizer(write_gguf(folder / f"{pre}.gguf", pre=pre)) for pre in ("gpt-2", "smollm")}


def test_gpt2_ids_are_gpt2s(gpt2_small):
    assert gpt2_small.encode("the the") == [258, 259]
    assert gpt2_small.encode("!a") == [0, ord("a") - ord("!")]
    assert gpt2_small.encode(" \n") == [220, 198]
    assert (gpt2_small.name, gpt2_small.vocab_size, gpt2_small.end_of_text) == ("gpt2", 267, 266)
    assert gpt2_small.encode_special("the<|endoftext|>") == [258, 266]
    assert gpt2_small.decode([258, 266]) == "the<|endoftext|>"


@given(text=st.text(ALPHABET))
def test_gpt2_equals_the_tokenizers_library(gpt2_small, text):
    assert gpt2_small.encode(text) == reference(GPT2_VOCAB, MERGES, digits=False).encode(text).ids


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
@settings(max_examples=300)
@given(text=st.text(ALPHABET))
def test_gguf_equals_the_tokenizers_library(gguf_small, pre, text):
    vocab = {token: i for i, token in enumerate(GGUF_TOKENS)}
    ids = gguf_small[pre].encode(text)
    assert ids == reference(vocab, MERGES, digits=pre == "smollm").encode(text).ids
    assert gguf_small[pre].decode(ids) == text.replace("\x04", "").replace("\x1d", "")


def test_smollm_splits_digits_where_gpt2_merges_them(gguf_small):
    fifteen, one, five, two_spaces = (GGUF_TOKENS.index(token) for token in ("15", "1", "5", "ĠĠ"))
    assert gguf_small["gpt-2"].encode("15") == [fifteen]
    assert gguf_small["smollm"].encode("15") == [one, five]
    assert gguf_small["smollm"].encode("  5") == [two_spaces, five]  # GPT-2's pattern would keep " 5" together


def test_a_byte_without_a_token_is_dropped_after_the_split_into_words(gguf_small):
    double, t, h = (GGUF_TOKENS.index(token) for token in ("!!", "t", "h"))
    assert gguf_small["smollm"].encode("!\x04!") == [double]
    assert gguf_small["smollm"].encode("t\x04h") == [t, h]  # three words: letters, a control byte, letters
    assert gguf_small["smollm"].encode("\x04\x1d") == []


@pytest.mark.parametrize("name", ["bytes", "gpt2", "smollm"])
@given(text=st.text())
def test_round_trip(gpt2_small, gguf_small, name, text):
    tokenizer = {"bytes": load_tokenizer("bytes"), "gpt2": gpt2_small, "smollm": gguf_small["smollm"]}[name]
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    if name == "smollm":
        text = text.encode().translate(None, b"\x04\x1d").decode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_control_tokens_are_recognised_only_in_the_styles_own_text(gguf_small):
    tokenizer = gguf_small["smollm"]
    text = "<|start|>the<|end|>\n"
    assert tokenizer.encode_special(text) == [0, *tokenizer.encode("the"), 1, *tokenizer.encode("\n")]
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text


def test_lone_surrogates_become_replacement_characters(gpt2_small, gguf_small):
    for tokenizer in (gpt2_small, gguf_small["smollm"], load_tokenizer("bytes")):
        text = json.loads('"a\\ud800b\\udc00"')
        assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("unit", ["a", " ", "!", "\n", "1", "th ", "語", "\x04"])
def test_text_of_100_000_characters(gpt2_small, gguf_small, unit):
    text = (unit * 100_000)[:100_000]
    assert gpt2_small.decode(gpt2_small.encode(text)) == text
    assert gguf_small["smollm"].decode(gguf_small["smollm"].encode(text)) == text.replace("\x04", "")


def test_ids_outside_the_vocabulary_are_an_error():
    for ids in ([257], [-1], [1 << 40]):
        with pytest.raises(InputError, match="outside the vocabulary of bytes"):
            load_tokenizer("bytes").decode(ids)


def test_fingerprint_depends_on_ids_and_not_on_the_file(tmp_path, gpt2_small, gguf_small):
    same = tmp_path / "other-name.bpe"
    same.write_bytes("\r\n".join(MERGES).encode())  # no version line, Windows line ends
    assert load_tokenizer(same).fingerprint == gpt2_small.fingerprint
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("\n".join(MERGES[:-1]), encoding="utf-8")
    other_end = load_tokenizer(write_gguf(tmp_path / "end.gguf", eos=0))
    tokenizers = [gpt2_small, load_tokenizer(fewer), *gguf_small.values(), other_end, load_tokenizer("bytes")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_a_tokenizer_can_be_pickled(gguf_small):
    tokenizer = gguf_small["smollm"]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the 15!\x04!") == tokenizer.encode("the 15!\x04!")
    assert copy.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no merges"),
        (b"#version: 0.2\n", "holds no merges"),
        (b'{"!": 0, "\\"": 1}', "is a vocab.json, which is half of a tokenizer: give its folder"),
        (b"t h\nxx y\n", r"line 2: 'xx y' is not a merge"),
        (b"t h\nt h\n", r"line 2: 't h' is not a merge"),
        (b"t h e\n", r"line 1: 't h e' is not a merge"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not a text file"),
    ],
)
def test_broken_merges(tmp_path, content, message):
    path = tmp_path / "merges.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: No such file"):
        load_tokenizer(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"has no tokenizer: neither tokenizer\.json nor merges\.txt"):
        load_tokenizer(tmp_path)


def test_gguf_metadata_equals_the_writers(tmp_path):
    metadata = read_gguf(write_gguf(tmp_path / "m.gguf")).metadata
    assert metadata["tokenizer.ggml.tokens"] == GGUF_TOKENS
    assert metadata["tokenizer.ggml.merges"] == MERGES
    assert (metadata["a.number"], metadata["a.list"], metadata["general.architecture"]) == (0.5, [1, -2, 3], "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'smollm' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"eos": len(GGUF_TOKENS)}, "names the end token 266, which is not among the 266 ids"),
        ({"merges": [*MERGES, "x y"]}, "out of vocabulary"),
        ({"merges": [*MERGES, "xy"]}, "defines no tokenizer"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_read(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **change))


def test_gguf_without_a_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"has no 'tokenizer\.ggml\.model'"):
        load_tokenizer(tmp_path / "m.gguf")


@given(data=st.data())
def test_a_cut_gguf_is_an_error(tmp_path_factory, data):
    path = write_gguf(tmp_path_factory.mktemp("cut") / "m.gguf", tokens=GGUF_TOKENS[:4], merges=[])
    size = data.draw(st.integers(4, path.stat().st_size - 1))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="not a complete GGUF file"):
        load_tokenizer(path)


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 1 << 33])
def test_gguf_with_an_absurd_length(tmp_path, length):
    key = struct.pack("<Q", 1) + b"k"
    for value in (struct.pack("<IQ", 8, length), struct.pack("<IIQ", 9, 4, length), struct.pack("<IIQ", 9, 8, length)):
        (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + value)
        with pytest.raises(InputError, match="not a complete GGUF file"):
            read_gguf(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def texts(shared_dir):
    """All texts of the 1100 entries, and the texts that training makes of them in the alpaca style."""
    from instruct_lm.data.dataset import load_conversations
    from instruct_lm.data.pieces import prompt_text
    from instruct_lm.data.prompts import ALPACA

    examples = load_conversations(shared_dir / "data" / "instruction-data.json")
    asked = [(e, *e.turns[0][1:]) for e in examples]
    return [text for e, *texts in asked for text in (*texts, e.reference, prompt_text(ALPACA, e.turns))]


def test_real_gpt2_equals_tiktokens_own(shared_dir, texts, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_dir / "tiktoken"))
    ours, own = load_tokenizer(gpt2_file(shared_dir, "vocab.bpe")), tiktoken.get_encoding("gpt2")
    assert (ours.vocab_size, ours.end_of_text) == (50257, 50256) == (own.n_vocab, own.eot_token)
    assert [ours.encode(text) for text in texts] == [own.encode_ordinary(text) for text in texts]


def test_real_gpt2_equals_transformers(shared_dir, texts, tmp_path):
    from transformers import GPT2TokenizerFast

    shutil.copy(gpt2_file(shared_dir, "vocab.bpe"), tmp_path / "merges.txt")
    shutil.copy(gpt2_file(shared_dir, "encoder.json"), tmp_path / "vocab.json")
    ours = load_tokenizer(tmp_path)
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").rename(tmp_path / "unused")
    merges_alone = load_tokenizer(tmp_path)
    for tokenizer in (ours, merges_alone):
        assert [tokenizer.encode_special(text) for text in texts + HOSTILE] == theirs(texts + HOSTILE)["input_ids"]
    assert merges_alone.end_of_text == ours.end_of_text == theirs.eos_token_id


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    """Our tokenizer and the `tokenizers` library's, the latter from metadata read by the `gguf` package."""
    fields = gguf.GGUFReader(smollm2_gguf).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    return load_tokenizer(smollm2_gguf), reference({t: i for i, t in enumerate(tokens)}, merges, digits=True)


def test_smollm2_sizes_and_control_tokens(smollm2):
    ours, _ = smollm2
    assert (ours.vocab_size, ours.end_of_text, ours.name) == (49152, 0, "gguf-smollm")
    assert ours.encode_special("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert ours.stop_tokens == {0, 2}


def test_smollm2_equals_the_tokenizers_library_on_the_entries(smollm2, texts):
    ours, theirs = smollm2
    assert [ours.encode(text) for text in texts] == [encoding.ids for encoding in theirs.encode_batch(texts)]


@settings(max_examples=1000, deadline=None)
@given(text=st.text(ALPHABET + "\U00050000"))  # its first byte, 0xF1, has no token
def test_smollm2_equals_the_tokenizers_library_on_any_text(smollm2, text):
    ours, theirs = smollm2
    assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.slow
def test_smollm2_equals_transformers_on_the_entries(smollm2, smollm2_gguf, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert [smollm2[0].encode(text) for text in texts] == theirs(texts)["input_ids"]
