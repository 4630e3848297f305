"""The prompt style as a chat template: transformers writes, token for token, what training encodes."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instruct_lm.data.conversation import Turn
from instruct_lm.data.encoding import encode_pieces
from instruct_lm.data.pieces import PromptStyle, prompt_pieces, said
from instruct_lm.data.prompts import STYLES, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.export.chat_templates import check_prompt, jinja_template
from instruct_lm.export.huggingface import save_tokenizer
from tests.data.hub_tokenizers import ALPHABET, HOSTILE, train, write_folder
from tests.data.test_chat_template import CHATML, ENDS, LLAMA3, SPACED, THINKING

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA = LLAMA3.replace("<|header|>", "<|start_header_id|>").replace("<|eot|>", "<|eot_id|>")
# Tokenizer, template, and the named tokens of its settings.
BASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "bytes": ("bytes", None, {}),
    "gpt-2": ("gpt-2", None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "smollm": ("smollm", CHATML, IM),
    "llama-bpe": ("llama-bpe", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama-bpe, a template without bos": (
        "llama-bpe",
        SPACED.replace("</s>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen2": ("qwen2", CHATML, IM),
    "qwen2, thinking": ("qwen2", THINKING, IM),
    "qwen2, marked": ("qwen2", MARKED, IM),
    "qwen2, a blank last": (
        "qwen2",
        SPACED.replace("</s>", "<|im_end|>\n") + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        IM,
    ),
    "qwen2, ends": ("qwen2", ENDS.replace("<|header|>", "<|im_start|>").replace("<|eot|>", "<|im_end|>"), IM),
}
CASES = [
    (base, style)
    for base, (_, template, _) in BASES.items()
    for style in (*STYLES, *(["template"] if template else []))
    if style == "template" or "," not in base
]
TEXTS = [
    "Add them.",
    "What is it?\n",
    "\n\nList:\n",
    " - a\n",
    "x",
    "Sure!",
    "user\nassistant\n",
    "a\n\n\n",
    "e\u0301.",
]
ROLES = [
    "user assistant",
    "system user assistant",
    "system" + " user assistant" * 3,
    "user assistant" + " user" * 2 + " assistant",
]


def greedy(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With tokens as in Qwen2's and Llama 3's vocabularies, which reach from a sentence into the line breaks after it."""
    parts = json.loads(made.to_str())
    vocabulary, merges = parts["model"]["vocab"], parts["model"]["merges"]
    # Ċ is the line break, Ġ the blank.
    for pair in (["Ċ", "Ċ"], [".", "ĊĊ"], [".", "Ċ"], ["?", "ĊĊ"], ["!", "ĊĊ"], ["Ċ", "Ġ"], ["ĊĊ", "Ċ"], [":", "Ċ"]):
        if "".join(pair) not in vocabulary:
            vocabulary["".join(pair)] = len(vocabulary)
            merges.append(pair)
    control = [token for token in parts["added_tokens"] if token["content"] not in vocabulary]
    ids = {token["content"]: len(vocabulary) + i for i, token in enumerate(control)}  # still after the others
    for token in control:
        token["id"] = ids[token["content"]]
    for text, token in parts["post_processor"].get("special_tokens", {}).items():
        token["ids"] = [ids[text]]
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


@lru_cache
def loaded(base: str, style: str, tmp: Path) -> tuple[Tokenizer, PromptStyle, Any]:
    """Our tokenizer and style, and transformers' tokenizer of the export."""
    name, template, named = BASES[base]
    folder = tmp / base / style
    if name == "bytes":
        tokenizer = load_tokenizer("bytes")
    else:
        tokenizer = load_tokenizer(
            write_folder(folder / "base", greedy(train(name)), tokenizer_config=named | {"chat_template": template})
        )
    ours = get_style(style, tokenizer)
    save_tokenizer(tokenizer, ours, 512, folder)
    return tokenizer, ours, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def messages(turns: list[Turn], style: PromptStyle) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": said(turn, getattr(style, "input_lead", "\n"))} for turn in turns]


def check(base: str, style_name: str, folder: Path, turns: list[Turn]) -> None:
    tokenizer, style, theirs = loaded(base, style_name, folder)
    # A response begins with a token of its own in training; elsewhere, a line break there may join the header's.
    turns = [turn._replace(text=turn.text.lstrip() or "x") if turn.role == "assistant" else turn for turn in turns]
    if getattr(style, "between", "") and any(turn.role == after.role for turn, after in pairwise(turns)):
        return  # phi3's line break before a user turn is missing after a user turn: a text's last could be that
    try:
        pieces = style.pieces(turns)
    except InputError:
        return  # the template refuses these roles
    row = [i for _, ids in encode_pieces(pieces, tokenizer) for i in ids]
    prompt = [i for _, ids in encode_pieces(prompt_pieces(pieces), tokenizer) for i in ids]
    given = messages(turns, style)
    assert theirs.apply_chat_template(given[:-1], add_generation_prompt=True, return_dict=False) == prompt
    assert theirs.apply_chat_template(given, return_dict=False) == row


@pytest.mark.parametrize(("base", "style"), CASES)
def test_it_is_what_training_encodes(base: str, style: str, folder: Path) -> None:
    for roles in ROLES:
        for text in TEXTS:
            turns = [Turn(role, text, TEXTS[i] if role == "user" else "") for i, role in enumerate(roles.split())]
            check(base, style, folder, turns)
            check(base, style, folder, [turn._replace(input="") for turn in turns])


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(case=st.sampled_from(CASES), roles=st.sampled_from(ROLES), data=st.data())
def test_it_is_so_for_any_text(case: tuple[str, str], roles: str, folder: Path, data: st.DataObject) -> None:
    text = st.text(ALPHABET, min_size=1, max_size=12)
    turns = [Turn(role, data.draw(text), data.draw(text) if role == "user" else "") for role in roles.split()]
    check(*case, folder, turns)


@pytest.mark.parametrize("base", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("style", STYLES)
def test_other_texts_keep_their_ids(base: str, style: str, folder: Path) -> None:
    tokenizer, _, theirs = loaded(base, style, folder)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    again = load_tokenizer(folder / base / style)
    for text in (*HOSTILE, *TEXTS):
        assert theirs(text)["input_ids"] == bos + tokenizer.encode_special(text)
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(("base", "style"), CASES)
def test_as_a_base_it_goes_on_in_the_same_style(base: str, style: str, folder: Path) -> None:
    tokenizer, ours, _ = loaded(base, style, folder)
    again = load_tokenizer(folder / base / style)
    turns = [Turn("user", "Add them."), Turn("assistant", "3"), Turn("user", "And?"), Turn("assistant", "4")]
    rows = [
        [i for _, ids in encode_pieces(each.pieces(turns), by) for i in ids]
        for each, by in ((ours, tokenizer), (get_style("template", again), again))
    ]
    assert rows[0] == rows[1]
    words = [each.definition()["pre_tokenizer"] for each in (tokenizer, again)]
    assert words[0] == words[1]


def test_an_unknown_role_is_refused(folder: Path) -> None:
    _, _, theirs = loaded("gpt-2", "alpaca", folder)
    with pytest.raises(Exception, match="no such role in prompt=alpaca: tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_prompts_with_other_tokens_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer("bytes")
    style = get_style("alpaca", tokenizer)
    check_prompt(jinja_template(style, tokenizer), style, tokenizer)
    assert not caplog.text
    check_prompt("{% for m in messages %}{{ m.content + ';' }}{% endfor %}", style, tokenizer)
    assert "In other programs a prompt has other tokens than in training: 'Nam' instead of 'Bel'" in caplog.text


def test_a_tokenizer_in_the_manner_of_sentencepiece_has_the_same_tokens(tmp_path: Path) -> None:
    made = json.loads(train("smollm").to_str())
    made["normalizer"] = {"type": "Prepend", "prepend": "a"}  # before every text
    folder = write_folder(tmp_path / "base", tokenizers.Tokenizer.from_str(json.dumps(made)), tokenizer_config=IM)
    tokenizer = load_tokenizer(folder)
    for name in ("alpaca", "chatml"):
        style = get_style(name, tokenizer)
        save_tokenizer(tokenizer, style, 512, tmp_path / name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        turns = [Turn("user", "Add them.", "1, 2"), Turn("assistant", "x")]
        prompt = [i for _, ids in encode_pieces(prompt_pieces(style.pieces(turns)), tokenizer) for i in ids]
        given = messages(turns, style)[:1]
        assert theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False) == prompt


def test_a_style_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="no Jinja template for a object"):
        jinja_template(object(), load_tokenizer("bytes"))  # type: ignore[arg-type]
