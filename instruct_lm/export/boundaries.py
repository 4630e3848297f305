"""Where a prompt style's own texts begin and end, as part of an exported tokenizer.

Training encodes the style's texts and what people wrote separately. Other programs encode a whole prompt at once, where
a word may reach across: Qwen2 and Llama 3 have the token `.⏎⏎`, which takes the end of an instruction and the beginning
of `⏎⏎### Response:⏎`. So the exported `tokenizer.json` splits a text around the style's own texts before anything else.
"""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Turn
from instruct_lm.data.encoding import encode_pieces
from instruct_lm.data.pieces import PromptStyle, prompt_pieces
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.data.tokenizer_definition import with_boundaries
from instruct_lm.errors import InputError

log = logging.getLogger(__name__)

_ROLES = ("user assistant user assistant", "system user assistant", "user assistant")


def own_pieces(style: PromptStyle) -> Iterator[tuple[str, bool, bool]]:
    """The texts that a style writes itself, and whether what people wrote stands right before and right after each."""
    for roles in _ROLES:
        try:
            pieces = style.pieces([Turn(role, "x") for role in roles.split()])
        except InputError:  # a chat template may refuse system turns
            continue
        said = [False, *(not piece.own for piece in pieces), False]
        for piece, before, after in zip(pieces, said, said[2:], strict=False):
            if piece.own and piece.text:
                yield piece.text, before, after


def with_style(definition: dict[str, Any], style: PromptStyle, tokenizer: Tokenizer) -> dict[str, Any]:
    r"""The content of a `tokenizer.json` that splits a text around the style's own texts first.

    A control token is a boundary already. Beside one, only the text from it on, or up to it, is split off; so
    `user\n` of `<|im_start|>user\n` is nothing special elsewhere.
    """
    pattern = "|".join(sorted(set(_patterns(style, tokenizer)), key=len, reverse=True))
    return with_boundaries(definition, pattern) if pattern else definition


def check_prompt(definition: dict[str, Any], template: str, style: PromptStyle, tokenizer: Tokenizer) -> None:
    """Warn if the exported template and tokenizer make other tokens of a prompt than training does."""
    said, exported = Turn("user", "Name a colour."), tokenizers.Tokenizer.from_str(json.dumps(definition))
    pieces = prompt_pieces(style.pieces([said, Turn("assistant", "x")]))
    trained = [i for _, ids in encode_pieces(pieces, tokenizer) for i in ids]
    written = TemplateStyle(template, tokenizer.template_variables, tokenizer.control_tokens).prompt([said])
    ids = exported.encode(written, add_special_tokens=False).ids
    if ids != trained:
        first = next((i for i, pair in enumerate(zip(ids, trained, strict=False)) if len(set(pair)) > 1), 0)
        parts = " instead of ".join(repr(tokenizer.decode(each[first : first + 3])) for each in (ids, trained))
        log.warning("In other programs a prompt has other tokens than in training: %s. Answers may be worse.", parts)


def _patterns(style: PromptStyle, tokenizer: Tokenizer) -> Iterator[str]:
    """A regular expression of each text; control tokens are taken out before it is applied."""
    control = "|".join(map(re.escape, sorted(tokenizer.control_tokens, key=len, reverse=True)))
    for text, before, after in own_pieces(style):
        first, *rest = re.split(control, text) if control else [text]
        last = rest[-1] if rest else ""
        # A line break alone is no mark.
        if first.strip() and (before or (after and not rest)):
            yield re.escape(first) + (r"\z" if rest else "")
        if last.strip() and after:
            yield r"\A" + re.escape(last)
