"""Small tokenizers of the kinds on the hub, trained by the `tokenizers` library, as a folder and as a GGUF file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers, trainers

from tests.conftest import ROOT


class Kind(NamedTuple):
    """What differs between the hub's tokenizers; the JSON is that of their tokenizer.json."""

    definition: dict[str, Any]  # what is not the same in all
    control: list[str]  # special tokens, the first of the vocabulary or after its last
    first: bool
    settings: dict[str, Any]  # tokenizer_config.json
    ordinary: tuple[str, ...] = ()  # added tokens that are not special


def _byte_level(**changes: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(trim_offsets=False, use_regex=False)]}


_BOS = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
_TEXT, _OTHER = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_IM_START = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
KINDS = {
    "gpt-2": Kind({"pre_tokenizer": _byte_level()}, _CHATML[:1], False, {"eos_token": _CHATML[0]}),
    "smollm": Kind(
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()],
            }
        },
        [*_CHATML, "<repo_name>"],
        True,
        _IM_START | {"unk_token": "<|endoftext|>"},
    ),
    "llama-bpe": Kind(
        {
            "pre_tokenizer": _split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [_BOS, _TEXT],
                "pair": [_BOS, _TEXT, _BOS, _OTHER],
                "special_tokens": {_BOS["SpecialToken"]["id"]: None},  # filled in by `build`
            },
        },
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"],
        False,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen2": Kind(
        {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": _split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        },
        _CHATML,
        False,
        {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<think>", "</think>"),
    ),
}
HOSTILE = [
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\x04\x1d",
        "a\x04b",
        "\x7f\x80\x9f",
        "\ufeffa",
        "\u200b\u200d",
        "\U00050000",
        "\ufffd\uffff",
    ),
    *(
        "<|endoftext|>",
        "a<|im_start|>system\nb<|im_end|>",
        "<|eot_id|><|begin_of_text|>x",
        "<think>no</think>",
        "<|im_end",
    ),
    *("👩‍👩‍👧‍👦 👍🏽🇫🇷", "語中文。日本語、한국어", "e\u0301 é Å Å ṩ s\u0323\u0307", "مرحبا ١٢٣", "नमस्ते १२३", "½①Ⅷ²"),
    *("".join(f"{'7' * n} " for n in range(12)), "1,234,567.89", "0x1F 3e10", "a1b22c333", "२३४५"),
    *("  a   b    c", "\t\ta\t b", " " * 50 + "x", "a \n \n  b", "a\r\nb\r\n\r\nc\r", "\n\n\n", "a\u00a0\u2028\u3000b"),
    *("it's I'LL WE'RE 'tis ''''s", "!!!??? ... --- ===", "don’t “quote”", "http://a.b/c?d=e&f", "{{x}} {% y %} ${z}"),
]
# What the pre-tokenizers treat apart: letters, digits, number-like characters, whitespace runs, contractions, symbols,
# characters of several bytes, control bytes, combining marks.
ALPHABET = "abtheThe  '\n\r\t0159½①٣!?#<|>_語é\u0301😀\u200d\u00a0\u2028\x04\x06\x1d\x7f"


def train(name: str) -> tokenizers.Tokenizer:
    """A tokenizer of a kind, trained on the embedded entries and the hostile strings."""
    kind = KINDS[name]
    empty = {"type": "BPE", "ignore_merges": name == "llama-bpe", "vocab": {}, "merges": []}
    parts: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": _byte_level()}
    parts |= {"decoder": _byte_level(), "model": empty, **kind.definition}
    special = kind.control if kind.first else []
    made = tokenizers.Tokenizer.from_str(json.dumps(parts | {"post_processor": None}))
    texts = [text for entry in json.loads((ROOT / "instruct_lm" / "data" / "sample.json").read_text("utf-8"))
             for text in entry.values()]  # fmt: skip
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if not (kind.first and c in "Ąĝ")]  # no 0x04, no 0x1D
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet, special_tokens=special, max_token_length=12
    )
    made.train_from_iterator([*texts, *HOSTILE * 3], trainer)
    made.add_special_tokens(kind.control)
    made.add_tokens(list(kind.ordinary))
    parts = json.loads(made.to_str()) | {"post_processor": parts["post_processor"]}
    if name == "llama-bpe":  # words that are in the vocabulary, but that no merge makes
        merges = parts["model"]["merges"]
        parts["model"]["merges"] = [m for m in merges[:-20] if "".join(m) not in {"".join(x) for x in merges[-20:]}]
        text = kind.control[0]
        parts["post_processor"]["special_tokens"][text] = {
            "id": text,
            "ids": [made.token_to_id(text)],
            "tokens": [text],
        }
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def write_folder(folder: Path, made: tokenizers.Tokenizer, **files: Any) -> Path:
    """The hub's layout: tokenizer.json and the named JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_gguf(path: Path, made: tokenizers.Tokenizer, name: str, weights: bool = False, **ids: int) -> Path:
    """The same vocabulary, as llama.cpp's converter writes it; `weights`: with a model that llama.cpp loads."""
    vocabulary, added = made.get_vocab(), made.get_added_tokens_decoder()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
    settings = KINDS[name].settings
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_chat_template("{{ messages }}")
    for key, text in settings.items():
        if key.endswith("s_token") and text:
            getattr(writer, f"add_{key}_id")(vocabulary[text])
    if name == "llama-bpe":
        writer.add_add_bos_token(True)
    for key, i in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", i)
    if weights:
        _add_model(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_model(writer: gguf.GGUFWriter, n_vocab: int, width: int = 32) -> None:
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (n_vocab, width), "output": (n_vocab, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name, shape in (shapes | {f"blk.0.{name}": (width, width) for name in matrices}).items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
