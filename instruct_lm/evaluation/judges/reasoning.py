"""What a thinking model writes before its answer, in the marks of today's models."""

import re

_NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|details)"
_BEFORE = r"(?:<\|?|\[|◁|【)\s*"
_AFTER = r"(?:\s[^<>\[\]▷】]*)?\s*(?:\|?>|\]|▷|】)"
_PREFIX = r"(?:[a-z]+[_:])?"  # <seed:think>, <longcat_think>
# gpt-oss's channels (https://github.com/openai/harmony): all but `final` are reasoning. A server that drops the control
# tokens leaves "analysis…assistantfinal…". The last two: Gemma 4, MedGemma.
_OPENER = re.compile(
    rf"{_BEFORE}(?:begin_of_|start_)?{_PREFIX}{_NAMES}{_AFTER}"
    r"|<\|channel\|>\s*(?!final)|\A\s*(?-i:analysis(?=[A-Z]))"
    r"|<\|channel>\s*thought|<unused94>",
    re.IGNORECASE,
)
_CLOSER = re.compile(
    rf"{_BEFORE}(?:[/\\]\s*|\|?/|end_(?:of_)?){_PREFIX}{_NAMES}{_AFTER}"
    r"|<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>|(?-i:assistantfinal)"
    r"|<channel\|>|<unused95>",
    re.IGNORECASE,
)
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|im_end|eot_id)\|>")


def answer_of(reply: str) -> str:
    """The text of a reply after its reasoning; empty if the reasoning does not end.

    The answer begins after the last mark that ends a reasoning, whether or not one began it: servers often send the
    first mark as part of the prompt. Text before a reasoning may be a draft and is no answer.

    Example:
        >>> answer_of("Draft score: 70, hmm.\\n</think>\\n\\nI'd give it 85.")
        "I'd give it 85."
        >>> answer_of("<thinking>Is it 70?")
        ''
    """
    *_, last = [None, *_CLOSER.finditer(reply)]
    answer = _MESSAGE_END.split(reply[last.end() :] if last else reply, maxsplit=1)[0]
    return "" if _OPENER.search(answer) else answer.strip()
