"""A run's prompt style as the chat template of other programs."""

import json

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.pieces import PromptStyle
from instruct_lm.data.prompts import PlainStyle
from instruct_lm.data.tokenizer import Tokenizer


def end_text(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """The text of the control token that ends a response in training."""
    if style.end in tokenizer.control_tokens:
        return style.end
    return next(text for text, i in tokenizer.control_tokens.items() if i == tokenizer.end_of_text)


def jinja_template(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """The prompt style as a Jinja template of `messages`, which transformers, vLLM and llama.cpp render.

    With `add_generation_prompt` it writes what `Responder.prompt_ids` encodes, without it what training sees. The input
    of an Alpaca entry is part of the user's message: instruction, `input_lead`, input.

    Raises:
        TypeError: A style that is neither constant texts nor a template.
    """
    if isinstance(style, TemplateStyle):
        return style.template
    if not isinstance(style, PlainStyle):
        raise TypeError(f"no Jinja template for a {type(style).__name__}")
    bos = next((text for text, i in tokenizer.control_tokens.items() if i == tokenizer.bos), "")
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
        "{%- else %}",
        _around(style.user, style.user_end),
        "{%- endif %}",
        "{%- endfor %}",
        _if("add_generation_prompt", style.header),
    ]
    return "\n".join(filter(None, lines))


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
