"""Export for Ollama: a GGUF file and a `Modelfile`.

Format: https://docs.ollama.com/modelfile. How Ollama reads it: parser/parser.go; how it renders a template:
template/template.go, Go's text/template with `.Messages` (https://pkg.go.dev/text/template).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_lm.data.conversation import Turn
from instruct_lm.data.pieces import PromptStyle, prompt_pieces
from instruct_lm.data.tokenizer import Tokenizer, without_surrogates
from instruct_lm.errors import InputError
from instruct_lm.export.chat_templates import end_text
from instruct_lm.export.gguf import safe_name, save_gguf
from instruct_lm.io.files import write_text
from instruct_lm.respond import Responder

log = logging.getLogger(__name__)

MODELFILE = "Modelfile"
LONGEST_CONTEXT = 8192
"""Most tokens of `num_ctx` unless asked for more: Ollama reserves memory for all of them."""

# Role before a turn ("" before the first) and the turn's role → the text between them.
_Gaps = Mapping[tuple[str, str], str]
_ROLES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant"),
)


def save_ollama(responder: Responder, folder: Path, dtype: str, name: str, num_ctx: int | None = None) -> None:
    """Write `<name>-<dtype>.gguf` and the `Modelfile` that names it.

    Args:
        responder: As for `save_gguf`; its sampling settings and longest answer become parameters.
        folder: The destination, an empty folder.
        dtype: As for `save_gguf`.
        name: The model's.
        num_ctx: Longest context, tokens; None: the model's ``block_size``, at most `LONGEST_CONTEXT`.

    Raises:
        InputError: As for `save_gguf`, or ``num_ctx`` is longer than the model's, or the prompt style is a chat
            template that no Modelfile can say.
        RunError: A file cannot be written.
    """
    longest = responder.model.config.block_size
    if num_ctx is not None and num_ctx > longest:
        raise InputError(f"num_ctx={num_ctx}: the model has model.block_size={longest}. Give no more, or null.")
    template = go_template(responder.style, responder.tokenizer)  # may refuse, before anything is written
    gguf = save_gguf(responder, folder, dtype, name)
    lines = [
        f"# ollama create {safe_name(name).lower()} -f {MODELFILE}",
        f"FROM ./{gguf.name}",
        f'TEMPLATE """{template}"""',
        *(
            f"PARAMETER {key} {value}"
            for key, value in _parameters(responder, num_ctx or min(longest, LONGEST_CONTEXT))
        ),
    ]
    write_text("\n".join(lines) + "\n", folder / MODELFILE)


def _parameters(responder: Responder, num_ctx: int) -> list[tuple[str, Any]]:
    sampling, tokenizer = responder.sampling, responder.tokenizer
    texts = {i: text for text, i in tokenizer.control_tokens.items()}
    ends = [texts[i] for i in sorted(responder.stop_tokens) if i in texts]
    return [
        *(("stop", f'"{text}"') for text in ends if text.isprintable() and '"' not in text),
        ("num_ctx", num_ctx),
        ("num_predict", responder.max_new_tokens),
        ("temperature", sampling.temperature),
        # Ollama's own defaults are 40, 0.9 and, in older versions, 1.1.
        ("top_k", sampling.top_k or tokenizer.vocab_size),
        ("top_p", sampling.top_p or 1.0),
        ("min_p", 0.0),
        ("repeat_penalty", 1.0),
        ("seed", sampling.seed),
    ]


def go_template(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """The prompt style as a Go template of `.Messages`.

    It writes what `Responder.prompt_ids` encodes, but for the tokenizer's `bos`, which Ollama puts before it. Messages
    in an order that training never sees, such as two user turns, are joined by a blank line, as Ollama joins equals.

    Raises:
        InputError: The style is a chat template that refuses a system turn or several exchanges, or whose text around
            a turn depends on more than the turn before it.
    """
    texts = _gaps(style, tokenizer)
    gaps = {pair: _go_text(text) for pair, text in texts.items()}
    pieces = prompt_pieces(style.pieces([Turn("user", "x"), Turn("assistant", "x")]))
    blank = texts["user", "assistant"].endswith(" ") and not pieces[-1].text.endswith(
        " "
    )  # of the response's first word
    header, asked = gaps["user", "assistant"], _go_text(texts["user", "assistant"][: -blank or None])
    first = '{{ if eq $last "" }}'
    branches = (
        f'{{{{ if eq .Role "assistant" }}}}{header}{{{{ $last = "assistant" }}}}',
        f'{{{{ else if and (eq .Role "system") (eq $last "") }}}}{gaps["", "system"]}{{{{ $last = "system" }}}}',
        f'{{{{ else }}}}{first}{gaps["", "user"]}{{{{ else if eq $last "system" }}}}{gaps["system", "user"]}',
        f'{{{{ else if eq $last "assistant" }}}}{gaps["assistant", "user"]}{{{{ else }}}}\n\n{{{{ end }}}}',
        '{{ $last = "user" }}{{ end }}{{ .Content }}',
    )
    opening, closing = '{{ $last := "" }}{{ range .Messages }}', "{{ end }}"
    return f'{opening}{"".join(branches)}{closing}{{{{ if ne $last "assistant" }}}}{asked}{closing}'


def _gaps(style: PromptStyle, tokenizer: Tokenizer) -> _Gaps:
    """The texts between turns, which must be the same in all orders of roles."""
    gaps: dict[tuple[str, str], str] = {}
    for roles in _ROLES:
        texts = _texts_before_turns(style, tokenizer, roles)
        for pair, text in zip(zip(("", *roles), roles, strict=False), texts, strict=True):
            if gaps.setdefault(pair, text) != text:
                raise InputError(
                    f"format=ollama: the model's chat template writes {gaps[pair]!r} before a turn of the {pair[1]} in "
                    f"one place, {text!r} in another, which no Modelfile can say. Use format=gguf: llama.cpp's server "
                    "renders the template itself."
                )
    if tokenizer.bos is not None:
        bos = tokenizer.decode([tokenizer.bos])
        gaps |= {pair: text.removeprefix(bos) for pair, text in gaps.items() if pair[0] == ""}
    _warn_of_stripping(style)
    return gaps


def _texts_before_turns(style: PromptStyle, tokenizer: Tokenizer, roles: Sequence[str]) -> list[str]:
    """What the style writes before each turn."""
    try:
        pieces = style.pieces([Turn(role, "x") for role in roles])
    except InputError as error:
        raise InputError(f"format=ollama: {error} Or use format=gguf.") from error
    texts, end = [""], end_text(style, tokenizer)
    for piece in pieces:
        texts[-1] += end if piece.ends else piece.text
        if not piece.own:  # the turn itself, perhaps after a blank of the style's
            texts[-1] = texts[-1].removesuffix("x")
            texts.append("")
    return texts[:-1]


def _warn_of_stripping(style: PromptStyle) -> None:
    pieces = style.pieces([Turn("user", "\n x \n"), Turn("assistant", "y")])
    if next(piece.text for piece in pieces if not piece.own).lstrip(" ") != "\n x \n":
        fault = "takes away the blanks around a message, which Ollama's templates cannot"
        log.warning("The model's chat template %s: send messages without them.", fault)


def _go_text(text: str) -> str:
    """A text in a Go template in a Modelfile.

    The parser drops characters that are not printable, ends at three quotes, and the template at two braces: such a
    text becomes a Go string, with every character but plain ones escaped.
    """
    text = without_surrogates(text)
    if all(c == "\n" or (c.isprintable() and c not in '{}"') for c in text):
        return text
    plain = (c if c.isascii() and c.isprintable() and c not in '{}"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'{{{{ "{"".join(plain)}" }}}}'
