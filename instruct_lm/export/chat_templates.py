"""A run's prompt style as the chat template of other programs."""

import json
import logging

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Turn
from instruct_lm.data.encoding import encode_pieces
from instruct_lm.data.pieces import PromptStyle, prompt_pieces
from instruct_lm.data.prompts import PlainStyle
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError

log = logging.getLogger(__name__)

_ROLES = ("user assistant user assistant", "system user assistant", "user assistant")


def end_text(style: PromptStyle | None, tokenizer: Tokenizer) -> str:
    """The text of the token that ends a response in training; of the tokenizer's own without a style."""
    return tokenizer.decode([tokenizer.end_token(style.end if style else "")])


def jinja_template(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """The prompt style as a Jinja template of `messages`, which transformers, vLLM and llama.cpp render.

    With `add_generation_prompt` it writes what `Responder.prompt_ids` encodes, without it what training sees. The input
    of an Alpaca entry is part of the user's message: instruction, `input_lead`, input.

    Raises:
        TypeError: A style that is neither constant texts nor a template.
    """
    bos = "" if tokenizer.bos is None else tokenizer.decode([tokenizer.bos])
    if isinstance(style, TemplateStyle):
        return _completed(style, bos)
    if not isinstance(style, PlainStyle):
        raise TypeError(f"no Jinja template for a {type(style).__name__}")
    role = "message['role']"
    # Text outside the tags would be subject to Jinja's rules for whitespace, so expressions write everything.
    lines = [
        _write(bos),
        _if("not messages or messages[0]['role'] != 'system'", style.default_system),
        "{%- for message in messages %}",
        _if("not loop.first and messages[loop.index0 - 1]['role'] == 'assistant'", style.between),
        f"{{%- if {role} == 'assistant' %}}",
        _around(style.header, end_text(style, tokenizer) + style.after),
        f"{{%- elif {role} == 'system' %}}",
        _around(style.system, style.system_end),
        f"{{%- elif {role} == 'user' %}}",
        _around(style.user, style.user_end),
        "{%- else %}",
        f"{{{{- raise_exception('no such role in prompt={style.name}: ' + {role}) }}}}",
        "{%- endif %}",
        "{%- endfor %}",
        _if("add_generation_prompt", style.header),
    ]
    return "\n".join(filter(None, lines))


def own_text(style: PromptStyle) -> str:
    """All that a style writes itself, in all orders of roles that it takes."""
    text = ""
    for roles in _ROLES:
        try:
            text += "".join(piece.text for piece in style.pieces([Turn(r, "x") for r in roles.split()]) if piece.own)
        except InputError:  # a chat template may refuse system turns
            continue
    return text


def check_prompt(template: str, style: PromptStyle, tokenizer: Tokenizer) -> None:
    """Warn if the exported template makes other tokens of a prompt than training does."""
    asked = Turn("user", "Name a colour.")
    pieces = prompt_pieces(style.pieces([asked, Turn("assistant", "x")]))
    trained = [i for _, ids in encode_pieces(pieces, tokenizer) for i in ids]
    written = TemplateStyle(template, tokenizer.template_variables, tokenizer.control_tokens).prompt([asked])
    ids = tokenizer.encode_special(written)
    if ids != trained:
        first = next((i for i, pair in enumerate(zip(ids, trained, strict=False)) if len(set(pair)) > 1), 0)
        parts = " instead of ".join(repr(tokenizer.decode(each[first : first + 3])) for each in (ids, trained))
        log.warning("In other programs a prompt has other tokens than in training: %s. Answers may be worse.", parts)


def _completed(style: TemplateStyle, bos: str) -> str:
    """A model's own template, with what training adds to what it writes."""
    pieces = style.pieces([Turn("user", "x"), Turn("assistant", "x")])
    before = "" if pieces[0].own and pieces[0].text.startswith(bos) else _write(bos)
    # Qwen 3's puts an empty thought before a response that is there, but asks for one without it.
    condition = "add_generation_prompt"
    if "enable_thinking" in style.template:  # it then writes the empty thought itself
        condition += " and not (enable_thinking is defined and enable_thinking is false)"
    template = before + style.template + _if(condition, style.unasked)
    if pieces[len(prompt_pieces(pieces))].text == " x":  # a blank that the template writes last begins the response
        cut = "prompt[:-1] if add_generation_prompt and prompt[-1:] == ' ' else prompt"
        template = f"{{%- set prompt %}}{template}{{%- endset %}}{{{{- {cut} }}}}"
    return template


def _around(before: str, after: str) -> str:
    """Jinja that writes a message between two texts."""
    parts = (before and _quoted(before), "message['content']", after and _quoted(after))
    return f"{{{{- {' + '.join(filter(None, parts))} }}}}"


def _write(text: str) -> str:
    """Jinja that writes a text."""
    return f"{{{{- {_quoted(text)} }}}}" if text else ""


def _if(condition: str, text: str) -> str:
    """Jinja that writes a text under a condition."""
    return f"{{%- if {condition} %}}{_write(text)}{{%- endif %}}" if text else ""


def _quoted(text: str) -> str:
    """A text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)
