"""A tokenizer, its end tokens and a prompt style as the metadata of a GGUF file."""

import json
import logging
import re
from collections.abc import Collection
from typing import Any

from gguf import TokenType

from instruct_lm.data.pieces import PromptStyle
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.data.tokenizer_definition import PRE_TOKENIZERS, pre_tokenizer_of
from instruct_lm.errors import InputError
from instruct_lm.export.chat_templates import jinja_template

log = logging.getLogger(__name__)

# Texts that end a response in llama.cpp (llama-vocab.cpp), whatever the metadata say.
_LLAMA_CPP_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>"),
    "<|end_of_text|>",
)
_DATE = re.compile(r"\b(?:date_string|datetime|strftime_now)\s+is\s+(not\s+)?defined")
_MARK = re.compile(r"\{%[-+]?\s*(generation|endgeneration)\s*[-+]?%\}")


def tokenizer_metadata(
    tokenizer: Tokenizer, style: PromptStyle, stop_tokens: Collection[int], vocab_size: int
) -> dict[str, Any]:
    """The keys that begin with `tokenizer.`, as llama.cpp's converter writes them.

    Args:
        tokenizer: The tokenizer.
        style: The prompt style, written as a chat template; its end token is the file's `eos_token_id`.
        stop_tokens: Ids that end a response; those besides that one go to `eot_token_id` and `eom_token_id`.
        vocab_size: Rows of the embedding; those without a token become unused tokens.

    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    definition = tokenizer.definition()
    pre = pre_tokenizer_of(definition)
    if pre is None:
        remedy = "Use format=hf, which llama.cpp's convert_hf_to_gguf.py may be able to convert"
        known = f"none of {', '.join(PRE_TOKENIZERS)}, which are written here"
        raise InputError(f"the tokenizer {tokenizer.name} splits texts into words in a way that is {known}. {remedy}.")
    tokens, kinds = _tokens(definition, vocab_size)
    eos = tokenizer.end_token(style.end)
    ids: dict[str, int | None] = {"eos": eos, **_other_ends(set(stop_tokens) - {eos}, tokens)}
    named = {name: tokenizer.control_tokens.get(text) for name, text in tokenizer.template_variables.items()}
    ids |= {"padding": named.get("pad_token"), "unknown": named.get("unk_token")}
    ids["bos"] = named.get("bos_token") if tokenizer.bos is None else tokenizer.bos
    variables = {f"{name}_token": tokens[i] for name in ("bos", "eos") if (i := ids[name]) is not None}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in definition["model"]["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": _as_rendered_here(jinja_template(style, tokenizer), tokenizer, variables),
    }


def _tokens(definition: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id."""
    texts: dict[int, str] = {i: text for text, i in definition["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in definition["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    taken = set(texts.values())
    for i in range(vocab_size):
        if i not in texts:
            name = f"[PAD{i}]"  # the converter's; llama.cpp ends the process where a text is there twice
            texts[i], kinds[i] = name if name not in taken else f"[UNUSED{i}]", TokenType.UNUSED
    return [texts[i] for i in range(vocab_size)], [int(kinds[i]) for i in range(vocab_size)]


def _other_ends(others: set[int], tokens: list[str]) -> dict[str, int]:
    """The places of the end tokens besides `eos`: first those that llama.cpp does not know by their texts."""
    in_order = sorted(others, key=lambda i: (tokens[i] in _LLAMA_CPP_ENDS, i))
    for i in in_order[2:]:
        if tokens[i] not in _LLAMA_CPP_ENDS:
            log.warning(
                "GGUF has room for three end tokens: llama.cpp does not end at %s. Give it as `stop`.", tokens[i]
            )
    return dict(zip(("eot", "eom"), in_order, strict=False))


def _as_rendered_here(template: str, tokenizer: Tokenizer, given: dict[str, str]) -> str:
    """A chat template that llama.cpp renders as training did.

    llama.cpp gives it other variables than `template_variables` and today's date, which training does without; and
    `{% generation %}` is a tag of transformers alone.
    """
    template = _DATE.sub(lambda match: "true" if match[1] else "false", template)
    template = _MARK.sub(
        lambda match: match[0].replace(match[1], "endif" if match[1][0] == "e" else "if true"), template
    )
    wanted = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "") | tokenizer.template_variables
    lines = [
        f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} %}}"
        for name, text in wanted.items()
        if name in template and text != given.get(name)
    ]
    return "".join(lines) + template
