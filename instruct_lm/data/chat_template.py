"""A model's own chat template (Jinja) as a prompt style.

The template is rendered with placeholders in place of what people wrote, once for each order of roles. So the template
cannot take their text for its own, and control tokens in it stay text. Whitespace that the template strips from a
turn is stripped here too.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import takewhile
from typing import NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from instruct_lm.data.conversation import Turn
from instruct_lm.data.pieces import Kind, Piece, prompt_pieces, said
from instruct_lm.errors import InputError

# Characters of the private use area, which templates do not contain.
_PLACES = re.compile("\ue000\\d+\ue001")
_START, _STOP = "\ue002", "\ue003"  # of what the template marks as the model's own with {% generation %}
# Whitespace on both sides of a placeholder; and what the template strips, by what it leaves of that whitespace.
_PADDING = "\n \n"
_STRIPS_LEFT = {_PADDING: "", " \n": "\n", "": None}
_STRIPS_RIGHT = {_PADDING: "", "\n ": "\n", "": None}


class _Gap(NamedTuple):
    """What the template writes between two turns (or before the first, or after the last)."""

    pieces: tuple[Piece, ...]
    strips_left: str | None  # characters that it strips from the beginning of the next turn; None: whitespace
    strips_right: str | None  # and from the end of the turn before


class TemplateStyle:
    r"""The chat template of a model as a prompt style.

    A response is the assistant's text with what the template writes to end it, such as `<|im_end|>\n`; where the
    template has `{% generation %}` marks, they decide. The header is what the template writes to ask for a response
    (`add_generation_prompt`), with all that follows up to the response. The template is given no tools and no date: one
    that writes the date writes its default.

    Args:
        template: The Jinja template. It runs in a sandbox.
        variables: What it is given beside the messages, such as `bos_token`.
        control_tokens: Texts of the vocabulary's control tokens.

    Attributes:
        unasked: What the prompt of a response to a user turn has after all that the template writes to ask for it, such
            as an empty thought.

    Raises:
        InputError: The template is not valid Jinja, or does not write one exchange.
    """

    name = "template"
    turns = True

    def __init__(self, template: str, variables: Mapping[str, str], control_tokens: Collection[str]) -> None:
        self.template, self.variables, self.control_tokens = template, dict(variables), frozenset(control_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        # {% generation %} is transformers' own tag: it becomes an `if` whose body stands between two marks.
        opening = rf'{{%\1 if true %}}{{{{"{_START}"}}}}{{% if true \2%}}'
        closing = rf'{{%\1 endif %}}{{{{"{_STOP}"}}}}{{% endif \2%}}'
        marked = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", opening, template)
        marked = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", closing, marked)
        try:
            self._compiled = environment.from_string(marked)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the model's chat template is not valid: {error}. Choose another prompt style."
            ) from error
        self._gaps = lru_cache(maxsize=256)(self._make_gaps)
        _, header, after = (gap.pieces for gap in self._gaps(("user", "assistant")))
        self.header = "".join(piece.text for piece in header if piece.kind == Kind.HEADER)
        self.end = self._control_token("".join(piece.text for piece in after if piece.kind == Kind.RESPONSE))
        self.unasked = self._unasked()

    def __repr__(self) -> str:
        return f"TemplateStyle({self.template!r}, {self.variables!r})"

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """As for `PromptStyle`.

        Raises:
            InputError: The template refuses these roles, or does not write each turn once and in order.
        """
        gaps = self._gaps(tuple(turn.role for turn in turns))
        pieces = list(gaps[0].pieces)
        for turn, before, after in zip(turns, gaps, gaps[1:], strict=False):
            text = said(turn, "\n").lstrip(before.strips_left).rstrip(after.strips_right)
            if pieces and pieces[-1].text.endswith(" "):
                # A byte-level vocabulary has tokens of a space and the word that follows.
                pieces[-1] = pieces[-1]._replace(text=pieces[-1].text[:-1])
                text = " " + text
            kind = Kind.RESPONSE if turn.role == "assistant" else Kind.PROMPT
            pieces += [Piece(text, kind, own=False), *after.pieces]
        return pieces

    def _make_gaps(self, roles: tuple[str, ...]) -> list[_Gap]:
        plain, padded = self._between(roles), self._between(roles, padding=_PADDING)
        gaps = []
        for i, (text, wide) in enumerate(zip(plain, padded, strict=True)):
            rights = _STRIPS_RIGHT if i else {"": ""}
            lefts = _STRIPS_LEFT if i < len(roles) else {"": ""}
            strips = [(left, right) for right in rights for left in lefts if right + text + left == wide]
            left, right = strips[0] if strips else (next(iter(lefts)), next(iter(rights)))
            gaps.append(_Gap(tuple(self._classify(text, roles, i)), lefts[left], rights[right]))
        return gaps

    def _classify(self, text: str, roles: tuple[str, ...], i: int) -> Iterator[Piece]:
        """The pieces of what the template writes between turns i - 1 and i."""
        follows_response, last = i > 0 and roles[i - 1] == "assistant", i == len(roles)
        if follows_response and not last and _STOP not in text:
            # A response ends where the texts of a conversation that ends here and of one that goes on differ.
            ending = self._common_beginning(text, self._between(roles[:i])[-1])
            text = ending + _STOP + text.removeprefix(ending)
        asked = "" if last or roles[i] != "assistant" else self._asked(roles[:i])
        inside, ended = follows_response, ""
        for part in re.split(f"([{_START}{_STOP}])", text):
            if part in (_START, _STOP):
                inside = part == _START
            elif inside and part:
                ended += part if follows_response else ""
                yield Piece(part, Kind.RESPONSE)
            elif part:
                place = part.rfind(asked) if asked else -1
                header = part[place:] if place >= 0 else ""
                yield from (
                    Piece(text, kind)
                    for text, kind in ((part.removesuffix(header), Kind.PROMPT), (header, Kind.HEADER))
                    if text
                )
        if follows_response and last and not self._control_token(ended):
            yield Piece("", Kind.RESPONSE, ends=True)

    def _asked(self, roles: tuple[str, ...]) -> str:
        """What the template adds to ask for a response after these roles; empty if it cannot say."""
        try:
            asked, plain = self._render(roles, asks=True), self._render(roles)
        except InputError:  # templates may refuse to begin with the assistant, or to end with a system turn
            return ""
        return asked.removeprefix(self._common_beginning(asked, plain))

    def _unasked(self) -> str:
        pieces = prompt_pieces(self.pieces([Turn("user", _place(0)), Turn("assistant", "x")]))
        prompt = "".join(piece.text for piece in pieces)
        try:
            asked = self.prompt([Turn("user", _place(0))])
        except InputError:  # a template may refuse to ask
            return ""
        return prompt.removeprefix(asked) if prompt.startswith(asked) else ""

    def _between(self, roles: tuple[str, ...], padding: str = "") -> list[str]:
        """The texts around the turns, one more than there are roles."""
        rendered = self._render(roles, padding)
        if _PLACES.findall(rendered) != [_place(i) for i in range(len(roles))]:
            wanted = f"the model's chat template does not write each turn once and in order: {', '.join(roles)}"
            raise InputError(f"{wanted}. Choose another prompt style, such as prompt=alpaca.")
        return _PLACES.split(rendered)

    def _render(self, roles: tuple[str, ...], padding: str = "", asks: bool = False) -> str:
        return self._write([Turn(role, padding + _place(i) + padding) for i, role in enumerate(roles)], asks)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What the template writes of whole turns, and to ask for a response, as other programs let it write.

        Raises:
            InputError: The template refuses these roles.
        """
        return re.sub(f"[{_START}{_STOP}]", "", self._write(turns, asks=True))

    def _write(self, turns: Sequence[Turn], asks: bool) -> str:
        messages = [{"role": turn.role, "content": said(turn, "\n")} for turn in turns]
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=asks, **self.variables)
        except Exception as error:  # the template may do anything that Jinja's sandbox lets it
            remedy, roles = "Choose another prompt style, such as prompt=alpaca", ", ".join(turn.role for turn in turns)
            raise InputError(f"the model's chat template refuses {roles}: {error}. {remedy}.") from error

    def _common_beginning(self, *texts: str) -> str:
        """The beginning that the texts have in common, no control token cut in two."""
        tokens = "|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True)))
        units = (re.findall(f"{tokens}|." if tokens else ".", text, re.DOTALL) for text in texts)
        return "".join(first for first, *_ in takewhile(lambda pair: len(set(pair)) == 1, zip(*units, strict=False)))

    def _control_token(self, text: str) -> str:
        """The first control token in a text; empty if there is none."""
        places = {text.find(token): token for token in sorted(self.control_tokens, key=len) if token in text}
        return places[min(places)] if places else ""


def _place(i: int) -> str:
    """The placeholder of a turn."""
    return f"\ue000{i}\ue001"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
