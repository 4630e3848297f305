"""A growing text of a model made safe to show: complete characters, nothing hidden, no mark of the prompt style."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import NamedTuple

from instruct_lm.data.conversation import Turn
from instruct_lm.data.pieces import Kind, PromptStyle
from instruct_lm.errors import InputError

_PARTIAL = "\ufffd"  # what an unfinished character decodes to
_LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_JOINERS = "\u200c\u200d"  # Persian and Indian scripts need them, and emoji of several parts
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"  # a letter's or an emoji's variant
# C0 and C1, among them escape; marks and changes of writing direction; blanks without width, tags, annotations, and
# code points that are no characters.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef\ufe00-\ufe0f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_RUN = re.compile(f"[{_INVISIBLE}]+")
_IS_SELECTOR = re.compile(f"[{_SELECTORS}]")
# The three flags that are a black flag and tag characters: https://www.unicode.org/reports/tr51/#valid-emoji-tag-sequences
_BLACK_FLAG = "\U0001f3f4"
_REGIONS = tuple("".join(chr(0xE0000 + ord(c)) for c in name) + "\U000e007f" for name in ("gbeng", "gbsct", "gbwls"))
_BASE = "[\u00a9\u00ae\u203c-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001f1e5\U0001f200-\U0001faff]"
_ONE = f"{_BASE}[\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*"
_LONGEST = 100  # characters of text that are searched for an emoji at its end
_EMOJI = re.compile(f"[\U0001f1e6-\U0001f1ff]{{1,2}}|{_ONE}(?:\u200d{_ONE})*\u200d?")


def visible(text: str) -> str:
    r"""A text without characters that a terminal acts on, that reorder what stands around them, or that hide something.

    Line ends of all kinds become `\n`, lone surrogates U+FFFD. Joiners stay where scripts and emoji need them: one,
    after a character beyond Latin, Greek and Cyrillic. So does one variation selector after what it varies. What an
    escape character announced stays as text. The text of a beginning is the beginning of the text, if no line end is
    cut in two.

    Example:
        >>> visible("\x1b[31mred\x07\r\n\u202egnp\u200b")
        '[31mred\ngnp'
    """
    text = _SURROGATES.sub("\ufffd", _LINE_ENDS.sub("\n", text))
    return _RUN.sub(_kept, text)


def _kept(match: re.Match[str]) -> str:
    """What stays of a run of invisible characters, by the visible one before it."""
    run, base = match[0], match.string[max(0, match.start() - 1) : match.start()]
    if base == _BLACK_FLAG and run.startswith(_REGIONS):
        return run[: len(_REGIONS[0])]
    kept, previous = "", base
    for character in run:
        joins = character in _JOINERS and previous >= "\u0590" and previous not in _JOINERS
        selects = _IS_SELECTOR.match(character) and previous.strip() and not _IS_SELECTOR.match(previous)
        if joins or (selects and previous not in _JOINERS):
            kept, previous = kept + character, character
    return kept


class Marks(NamedTuple):
    """What a prompt style writes around the turns: a model that writes it itself begins to write both sides.

    Attributes:
        header: The last line before a response; empty: there is none.
        others: The last line before a turn of the user or of the system; and what ends a response, unless that is a
            control token: spelled out in other tokens, `</s>` is HTML.

    Example:
        >>> from instruct_lm.data.prompts import ALPACA, CHATML
        >>> Marks.of(ALPACA)
        Marks(header='### Response:', others=('### Instruction:',))
        >>> Marks.of(CHATML).others
        ('<|im_end|>', '<|im_start|>user', '<|im_start|>system')
    """

    header: str
    others: tuple[str, ...]

    @classmethod
    def of(cls, style: PromptStyle, control_tokens: Collection[str] = ()) -> Marks:
        """The marks of a style in a model with these control tokens."""
        header, others = "", {} if style.end in control_tokens else {style.end: None}
        exchange = [Turn("user", "a"), Turn("assistant", "b")]
        for turns in (exchange * 2, [Turn("system", "a"), *exchange]):
            try:
                pieces = style.pieces(turns)
            except InputError:  # templates may refuse a system turn, or a second exchange
                continue
            own = ""
            for piece in pieces:
                if piece.own:
                    own += piece.text
                    continue
                mark = own.strip().rpartition("\n")[2]
                mark = mark.rpartition(style.end)[2].strip() if style.end else mark
                if piece.kind == Kind.RESPONSE:
                    header = mark
                else:
                    others[mark] = None
                own = ""
        return cls(header, tuple(mark for mark in others if mark not in ("", header)))

    @property
    def all(self) -> tuple[str, ...]:
        """The marks, none of them empty."""
        return tuple(filter(None, (self.header, *self.others)))


def growing(texts: Iterable[str], marks: Marks) -> Generator[str, None, None]:
    r"""Yield the visible answer for each text of a growing one, and the whole of it last; it is never taken back.

    Held back until more is known: an unfinished character, an emoji that may go on, the beginning of a mark. The header
    at the beginning of an answer is left out. Any other mark ends the answer, and no further text is asked for.

    Args:
        texts: All of the model's text so far, each time.
        marks: The prompt style's.

    Example:
        >>> list(growing(["Blue", "Blue.\n\n##", "Blue.\n\n### Response:", "never read"], Marks("### Response:", ())))
        ['Blue', 'Blue.', 'Blue.']
    """
    header, any_mark = _pattern(marks.header), _pattern(*marks.all)
    shown = answer = ""
    for text in texts:
        answer = visible(text.rstrip(_PARTIAL)).lstrip()
        while leading := header.match(answer):
            answer = answer[leading.end() :].lstrip()
        if end := any_mark.search(answer):
            answer = answer[: end.start()]
            break
        # By length, since some tokenizers decode a character anew when bytes that are not UTF-8 follow.
        shown += _settled(answer, marks.all)[len(shown) :]
        yield shown
    yield shown + answer.rstrip()[len(shown) :]


def _pattern(*marks: str) -> re.Pattern[str]:
    """Any of the marks; one that begins with a letter, such as `User:`, at the beginning of a line only."""
    patterns = ((r"^[ \t]*" if mark[0].isalnum() else "") + re.escape(mark) for mark in marks if mark)
    return re.compile("|".join(patterns) or "(?!)", re.MULTILINE)


def _settled(answer: str, marks: Sequence[str]) -> str:
    """The answer without an end that may become part of a mark or of an emoji."""
    partial = max((n for mark in marks for n in range(len(mark)) if answer.endswith(mark[:n])), default=0)
    answer = answer[: len(answer) - partial]
    tail = answer[-_LONGEST:]
    held = next((len(tail) - emoji.start() for emoji in _EMOJI.finditer(tail) if emoji.end() == len(tail)), 0)
    return answer[: len(answer) - held].rstrip()
