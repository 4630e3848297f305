"""The judge that asks a model behind an OpenAI-compatible server."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader, MaxRetryError

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.base import Judge, JudgeError, Verdict
from instruct_lm.evaluation.judges.parsing import parse_score
from instruct_lm.io.credentials import bearer_auth, read_secret

# Chapter 7.8 of the book. {input} is the entry in its prompt style, {output} the reference answer.
PROMPT = (
    "Given the input `{input}` and correct output `{output}`, score the model response `{response}` "
    "on a scale from 0 to 100, where 100 is the best score. Respond with the integer number only."
)
MAX_TOKENS = 512  # longest reply
CONNECT_TIMEOUT = 10.0  # seconds
RETRIES = 4  # attempts after the first
# Seconds before the second retry (the first follows at once), doubled for each later one, plus up to half at random.
BACKOFF = 1.0
MAX_WAIT = 60.0  # seconds between two attempts, even if the server asks for more

_SCORE = {"type": "integer", "minimum": 0, "maximum": 100}
_SCHEMA = {"type": "object", "properties": {"score": _SCORE}, "required": ["score"], "additionalProperties": False}
_SCORE_FORMAT = {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": _SCHEMA}}
# Request fields that some servers refuse, and the pattern in the error message that shows it.
_OPTIONAL_FIELDS = {"response_format": "response_format|schema|structured|grammar", "max_tokens": "max_tokens"}
_UNREACHABLE = (301, 302, 307, 308, 401, 403, 404)  # HTTP statuses: wrong address, key or model


@dataclass(eq=False)
class OpenAIJudge(Judge):
    """A model behind any OpenAI-compatible server; one request per entry.

    Connection errors, time-outs, incomplete or unreadable replies, 429 and 5xx are retried; other 4xx are not.
    urllib3's `Retry` counts the attempts and computes the waits, or takes them from `Retry-After`. It is not mounted in
    the session, because there it neither sees a reply's body (a body that breaks off, an error page with status 200, a
    500 that refuses a request field) nor survives an invalid `Retry-After`.

    Args:
        model: The model's name on the server.
        format_prompt: Entry → prompt text, as the answering model saw it; replaces `{input}` in `PROMPT`.
        base_url: The server's address with its version, such as `http://localhost:8080/v1`.
        api_key_env: Environment variable that holds the key, which is sent to `base_url` alone; None: no key.
        temperature: Sampling temperature of the judge; None: the server's default (some models accept no other).
        seed: Sampling seed of the judge; None: the server's default.
        timeout: Seconds to wait for a reply.

    Raises:
        InputError: `base_url` has a password or a query.
    """

    kind = "openai"

    model: str
    _: KW_ONLY
    format_prompt: Callable[[Mapping[str, str]], str]
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    seed: int | None = 123
    timeout: float = 120.0

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.username or url.password or url.query:
            raise InputError("judge.base_url has a password or query: give the key through judge.api_key_env")
        self.base_url = self.base_url.rstrip("/")
        self.server = self.base_url  # for messages and describe()
        self._refused: set[str] = set()  # optional request fields that this server refuses
        self._closed = threading.Event()

    def describe(self) -> dict[str, Any]:
        """The server, the model and everything that is sent; `prompt` is the question around a placeholder entry."""
        placeholders = {key: f"{{{key}}}" for key in ("instruction", "input", "output")}
        return {
            "kind": self.kind,
            "server": self.server,
            "digest": self.digest,
            "prompt": self._question(placeholders, "{response}"),
            "structured": True,  # asks for a JSON object with an integer score
            **self._settings(),
        }

    @cached_property
    def digest(self) -> str | None:
        """Identifier of the model's weights; None: OpenAI-compatible servers do not tell."""
        return None

    def check(self) -> None:
        """Ask the server for its list of models, which costs nothing."""
        self._closed.clear()
        if urlsplit(self.base_url).hostname == "api.openai.com" and not read_secret(self.api_key_env):
            variable = self.api_key_env or "OPENAI_API_KEY"
            raise InputError(f"{self.base_url} needs a key: set judge.api_key_env={variable} and export {variable}=…")
        reply = self._reach(f"{self.base_url}/models")
        if reply.status_code in (401, 403):
            raise JudgeError(f"{self.base_url} refuses the key (HTTP {reply.status_code}). {self._remedy()}")

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """Ask the server, retrying as the class says; a failure is a verdict, not an exception."""
        messages = [{"role": "user", "content": self._question(entry, response)}]
        body = {**self._settings(), "messages": messages, "response_format": _SCORE_FORMAT}
        retry = Retry(RETRIES, backoff_factor=BACKOFF / 2, backoff_jitter=BACKOFF / 2)
        while True:
            sent = {key: value for key, value in body.items() if value is not None and key not in self._refused}
            reply: requests.Response | None = None
            try:
                reply = self._send("POST", f"{self.base_url}/chat/completions", sent)
            except requests.RequestException as error:
                failure = Verdict(None, f"no answer from {self.server}: {type(error).__name__}", unreachable=True)
            else:
                status = reply.status_code
                if status == 200 and (answer := _content(reply)):
                    return self._verdict(*answer)
                words = self._without_key(" ".join(reply.content.decode("utf-8", "replace").split()))[:200]
                failure = Verdict(None, f"HTTP {status}, no answer: {words}", unreachable=status in _UNREACHABLE)
                if refused := _refused_fields(reply) & sent.keys():
                    self._refused |= refused  # for this question and all later ones
                    continue
                if 300 <= status < 500 and status != 429:
                    return failure
            try:
                retry = retry.increment()
            except MaxRetryError:
                return failure
            if self._closed.wait(_seconds_to_wait(retry, reply)):  # ends early after close()
                return failure

    def close(self) -> None:
        """Stop retrying."""
        self._closed.set()

    def _settings(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "seed": self.seed, "max_tokens": MAX_TOKENS}

    def _question(self, entry: Mapping[str, str], response: str) -> str:
        # All at once, so that an answer that contains "{output}" is left as it is.
        parts = {"{input}": self.format_prompt(entry), "{output}": entry["output"], "{response}": response}
        return re.sub(r"\{(?:input|output|response)\}", lambda match: parts[match[0]], PROMPT)

    def _verdict(self, raw: str, cut: bool) -> Verdict:
        raw = self._without_key(raw)
        # A reply that max_tokens cut after a digit may have lost further digits: "8" of "85".
        number = None if cut and raw[-1:].isdigit() else parse_score(raw)
        if number is None:
            return Verdict(None, f"no score from 0 to 100 in the answer {raw[:80]!r}" + " (cut short)" * cut, raw)
        return Verdict(number, raw=raw)

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> requests.Response:
        with requests.Session() as session:
            # A proxy set in the environment cannot reach servers on this machine.
            session.trust_env = urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
            auth, timeout = bearer_auth(self.api_key_env), (CONNECT_TIMEOUT, self.timeout)
            return session.request(method, url, json=body, auth=auth, timeout=timeout, allow_redirects=False)

    def _reach(self, url: str) -> requests.Response:
        try:
            return self._send("GET", url)
        except requests.RequestException as error:
            raise JudgeError(f"no server answers at {url} ({type(error).__name__}). {self._remedy()}") from error

    def _remedy(self) -> str:
        return f"Is the server running, and are judge.base_url and the key in {self.api_key_env} right?"

    def _without_key(self, text: str) -> str:
        key = read_secret(self.api_key_env)
        return text.replace(key, "***") if key else text


def _content(reply: requests.Response) -> tuple[str, bool] | None:
    """The text of a chat completion and whether `max_tokens` cut it; None if the reply is no chat completion."""
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
    return {field for field, pattern in _OPTIONAL_FIELDS.items() if re.search(pattern, message)}


def _seconds_to_wait(retry: Retry, reply: requests.Response | None) -> float:
    """The server's `Retry-After` (seconds or a date) or else Retry's own backoff, at most `MAX_WAIT`."""
    asked = None
    if reply is not None:
        with contextlib.suppress(InvalidHeader):
            asked = retry.get_retry_after(reply.raw)
    return min(MAX_WAIT, asked or retry.get_backoff_time())
