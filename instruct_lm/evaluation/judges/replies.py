"""What a chat completion says, beside its text, and the least tokens that a question has."""

import json
import re
import time
from dataclasses import dataclass
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError

MOST_BYTES = 10_000_000  # of a response: the rest is not read

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_REPEATED = re.compile(r"(.{1,20}?)\1+", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: The answer, without blanks at its ends; "" if there is none.
        reasoning: What the model thought before it, if the server keeps it apart; "" if not.
        cut: Whether it ended at the longest reply that the request or the server allows.
        prompt_tokens: Length of the question as the server read it; None if it does not tell.
    """

    text: str
    reasoning: str = ""
    cut: bool = False
    prompt_tokens: int | None = None


def read_body(response: requests.Response, seconds: float) -> bytes:
    """The body of a streamed response, at most `MOST_BYTES` and a piece.

    Raises:
        requests.ReadTimeout: It takes longer than that, or nothing came for the time-out of the request.
        requests.RequestException: It breaks off.
    """
    end, body = time.monotonic() + seconds, bytearray()
    try:
        for piece in response.iter_content(1024):
            body += piece
            if len(body) >= MOST_BYTES:
                break
            if time.monotonic() > end:
                raise requests.ReadTimeout
    except requests.ConnectionError as error:  # what requests makes of urllib3's time-out
        if isinstance(error.args[0], ReadTimeoutError):
            raise requests.ReadTimeout from error
        raise
    return bytes(body)


def read_reply(response: requests.Response) -> Reply | None:
    """The chat completion in a server's response; None if it is none."""
    try:
        body = json.loads(response.content)
        choice = body["choices"][0]
        message = choice["message"]
        text, thoughts = _parts(message.get("content"))
        # Ollama, vLLM; llama.cpp, DeepSeek, SGLang; Ollama's own interface
        names = ("reasoning", "reasoning_content", "thinking")
        reasoning = [thoughts, *(message[name] for name in names if isinstance(message.get(name), str))]
        tokens = (body.get("usage") or {}).get("prompt_tokens")
        return Reply(
            text=(text or message.get("refusal") or "").strip(),
            reasoning=max(reasoning, key=len).strip(),
            cut=choice.get("finish_reason") == "length",
            prompt_tokens=tokens if type(tokens) is int and tokens > 0 else None,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _parts(content: Any) -> tuple[str, str]:
    """Text and thoughts of a message's content: a text, null, or a list of parts, as Mistral's thinking models send."""
    if not isinstance(content, list):
        return content or "", ""
    thoughts = "".join(str(part.get("thinking") or "") for part in content)
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text"), thoughts


def least_tokens(text: str) -> int:
    """A lower bound of the tokens of a text, for any tokenizer in use.

    Tokenizers do not join words across blanks (those that do, SuperBPE's, save about a tenth), so a text has about as
    many tokens as words, or more; a quarter is taken off for safety. In Chinese, Japanese and Korean, whose words
    touch, four letters count as one token; of a repetition, which a vocabulary may hold as one, the first counts.

    Example:
        >>> least_tokens("Convert 45 kilometers to meters. " * 100)
        375
    """
    words = len(_CJK.sub("", text).split())
    letters = sum(len(_REPEATED.sub(r"\1", run)) for run in _CJK.findall(text))
    return words * 3 // 4 + letters // 4
