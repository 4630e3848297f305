"""The client of OpenAI-compatible servers, as a judge."""

import json
import os
import random
import re
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import BOOK_PROMPT, Entry, JudgeError, Verdict
from instruct_lm.evaluation.judges.parsing import parse_score

OPENAI_URL = "https://api.openai.com/v1"
CONNECT_TIMEOUT = 10.0  # seconds
MAX_WAIT = 60.0  # seconds between two attempts, also when a server asks for more

_SCORE_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "score",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 100}},
            "required": ["score"],
            "additionalProperties": False,
        },
    },
}
# Request fields that a server may refuse, and the words by which its message is known; the answer is sought without.
_OPTIONAL_FIELDS = {
    "response_format": ("response_format", "json_schema", "schema", "structured", "grammar"),
    "max_tokens": ("max_tokens",),
}
_NO_WAY_IN = (301, 302, 307, 308, 401, 403, 404)  # wrong address, key or model


class _NoAnswerError(Exception):
    """Why the server gave no answer to one question."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class OpenAIJudge:
    """A model behind any OpenAI-compatible server, asked one entry a request.

    Connection errors, time-outs, 429 and 5xx are tried again after a growing, jittered wait (or the server's
    `Retry-After`); other 4xx are not. A server that refuses structured output is asked without from then on.

    Args:
        model: The model's name on the server.
        format_prompt: Entry to prompt text, as the answering model saw it; fills `{input}`.
        base_url: The server's address with its version, such as `http://localhost:8080/v1`.
        api_key_env: Environment variable that holds the key, which goes to `base_url` and nowhere else; None: no key.
        prompt: The question, with `{input}`, `{output}` and `{response}`.
        temperature: Of the judge's sampling; None leaves it to the server (some models take no other).
        seed: Of the judge's sampling; None leaves it to the server.
        max_tokens: Longest answer; None leaves it to the server.
        timeout: Seconds to wait for an answer.
        retries: Attempts after the first.
        backoff: Seconds before the first retry, doubled for each further one.
        structured: Ask for a JSON object with an integer 0-100.

    Raises:
        InputError: `base_url` or `prompt` cannot be used.
    """

    kind = "openai"

    def __init__(
        self,
        model: str,
        format_prompt: Callable[[Entry], str],
        *,
        base_url: str = OPENAI_URL,
        api_key_env: str | None = "OPENAI_API_KEY",
        prompt: str = BOOK_PROMPT,
        temperature: float | None = 0.0,
        seed: int | None = 123,
        max_tokens: int | None = 512,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        structured: bool = True,
    ) -> None:
        if "{response}" not in prompt:
            raise InputError(f"judge.prompt={prompt!r}: holds no {{response}}, so the judge would not see the answer")
        self.model, self.format_prompt, self.prompt = model, format_prompt, prompt
        self.base_url, self.api_key_env = _checked_url(base_url), api_key_env
        self.temperature, self.seed, self.max_tokens, self.structured = temperature, seed, max_tokens, structured
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._refused: set[str] = set()  # optional request fields that this server does not take
        self._closed = threading.Event()

    def describe(self) -> dict[str, Any]:
        """The server, the model and all that is sent with a question; `prompt` shows the whole text around an entry."""
        blank = {key: f"{{{key}}}" for key in ("instruction", "input", "output")}
        return {
            "kind": self.kind,
            "server": self.server,
            "model": self.model,
            "digest": self.digest(),
            "prompt": self._question(blank, "{response}"),
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        }

    @property
    def server(self) -> str:
        """Where the model runs, for people and for the record."""
        return self.base_url

    def digest(self) -> str | None:
        """What identifies the model's weights; an OpenAI-compatible server does not tell."""
        return None

    def check(self) -> None:
        """Ask the server for its models, which costs nothing."""
        self._closed.clear()
        if urlsplit(self.base_url).hostname == "api.openai.com" and not self._key():
            raise InputError(
                f"judge.api_key_env={self.api_key_env}: {self.base_url} needs a key, and that variable of the "
                f"environment is not set.\nSet it: export {self.api_key_env or 'OPENAI_API_KEY'}=…"
            )
        reply = self._reach(f"{self.base_url}/models")
        if reply.status_code in (401, 403):
            raise JudgeError(f"{self.base_url} refuses the key (HTTP {reply.status_code}). {self._remedy()}")

    def score(self, entry: Entry, response: str) -> Verdict:
        """Ask the server; never raises for what it answers."""
        try:
            raw, cut = self._ask(self._question(entry, response))
        except _NoAnswerError as error:
            return Verdict(None, str(error), unreachable=error.unreachable)
        raw = self._without_key(raw)
        number = None if cut and raw[-1:].isdigit() else parse_score(raw)  # "8" of "85"
        if number is not None:
            return Verdict(number, raw=raw)
        return Verdict(None, f"no score from 0 to 100 in the answer {raw[:80]!r}" + " (cut short)" * cut, raw)

    def close(self) -> None:
        """Give up waiting for another attempt."""
        self._closed.set()

    def _question(self, entry: Entry, response: str) -> str:
        # one pass, so that an answer that says "{output}" is not filled in
        parts = {"{input}": self.format_prompt(entry), "{output}": entry["output"], "{response}": response}
        return re.sub(r"\{(?:input|output|response)\}", lambda match: parts[match[0]], self.prompt)

    def _ask(self, question: str) -> tuple[str, bool]:
        """The answer's text, and whether it was cut at `max_tokens`."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "response_format": _SCORE_SCHEMA if self.structured else None,
        }
        attempt = 0
        while True:
            wait = None
            sent = {key: value for key, value in body.items() if value is not None and key not in self._refused}
            try:
                reply = self._send("POST", f"{self.base_url}/chat/completions", sent)
            except requests.RequestException as error:
                failure = _NoAnswerError(f"no answer from {self.server}: {type(error).__name__}", unreachable=True)
            else:
                if answer := _content(reply):
                    return answer
                failure = _NoAnswerError(
                    f"HTTP {reply.status_code}, no answer: {self._words(reply)}", reply.status_code in _NO_WAY_IN
                )
                if refused := _refused_fields(reply) & sent.keys():
                    self._refused |= refused
                    continue
                if 300 <= reply.status_code < 500 and reply.status_code != 429:
                    raise failure
                wait = _retry_after(reply.headers.get("Retry-After"))
            if attempt == self.retries:
                raise failure
            pause = (
                self.backoff * 2**attempt * random.uniform(0.5, 1)
                if wait is None
                else wait + self.backoff * random.random()
            )
            if self._closed.wait(min(pause, MAX_WAIT)):
                raise failure
            attempt += 1

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> requests.Response:
        with requests.Session() as session:
            # a proxy of the environment cannot reach this machine's own servers
            session.trust_env = urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
            return session.request(
                method,
                url,
                json=body,
                auth=self._authorise,
                timeout=(CONNECT_TIMEOUT, self.timeout),
                allow_redirects=False,
            )

    def _reach(self, url: str) -> requests.Response:
        """GET `url`, or say that nothing answers there."""
        try:
            return self._send("GET", url)
        except requests.RequestException as error:
            raise JudgeError(f"no server answers at {url} ({type(error).__name__}). {self._remedy()}") from error

    def _remedy(self) -> str:
        return f"Is the server running, and are judge.base_url and the key in {self.api_key_env} right?"

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"the environment variable {self.api_key_env} holds more than a key: set it to the key alone"
            )
        return key

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # as requests' `auth`, which also keeps it from sending a password of ~/.netrc
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _without_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text

    def _words(self, reply: requests.Response) -> str:
        """The beginning of what a server said, fit for a message."""
        return self._without_key(" ".join(reply.content.decode("utf-8", "replace").split()))[:200]


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise InputError(
            "judge.base_url holds a password or a query: put the key into the variable of judge.api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"judge.base_url={url}: not an address such as http://localhost:8080/v1")
    return url.rstrip("/")


def _content(reply: requests.Response) -> tuple[str, bool] | None:
    """Text of a chat completion and whether it was cut short; None if the reply is none."""
    if reply.status_code != 200:
        return None
    try:
        choice = json.loads(reply.content)["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        return text.strip(), choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _refused_fields(reply: requests.Response) -> set[str]:
    if reply.status_code not in (400, 422, 500, 501):
        return set()
    message = reply.content.decode("utf-8", "replace").lower()
    return {field for field, words in _OPTIONAL_FIELDS.items() if any(word in message for word in words)}


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which may be a number or a date; None if it is absent or unreadable."""
    try:
        return max(0.0, float(value or "none"))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value or "none")
        return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):
        return None
