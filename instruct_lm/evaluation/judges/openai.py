"""The judge that asks a model behind an OpenAI-compatible server."""

import contextlib
import logging
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
from instruct_lm.evaluation.judges.model_names import find_name, list_names, nearest_first
from instruct_lm.evaluation.judges.parsing import parse_feedback, parse_score
from instruct_lm.evaluation.judges.questions import SCORE, Question
from instruct_lm.evaluation.judges.reasoning import answer_of
from instruct_lm.evaluation.judges.replies import Reply, least_tokens, read_body, read_reply
from instruct_lm.io.credentials import bearer_auth, read_secret

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
RETRIES = 4  # attempts after the first
TIMEOUTS = 2  # attempts of which no answer comes in time: a model that goes in circles does so again
# Seconds before the second retry (the first follows at once), doubled for each later one, plus up to half at random.
BACKOFF = 1.0
MAX_WAIT = 60.0  # seconds between two attempts, even if the server asks for more

# Request fields that some servers or models refuse, and the pattern in the error message that shows it.
_OPTIONAL_FIELDS = {
    "response_format": "response_format|schema|structured|grammar",
    "max_tokens": r"\bmax_tokens\b",
    "max_completion_tokens": "max_completion_tokens",
    "reasoning_effort": r"reasoning[_.]effort|does not support thinking|[\"']think[\"'] value",
    "temperature": r"[\"'`]temperature[\"'`]",  # in quotes: the message may repeat the question
    "seed": r"[\"'`]seed[\"'`]",
}
_UNREACHABLE = (301, 302, 307, 308, 401, 403, 404)  # HTTP statuses: wrong address, key or model


@dataclass(eq=False)
class OpenAIJudge(Judge):
    """A model behind any OpenAI-compatible server; one request per entry.

    Connection errors, incomplete or unreadable replies, 429 and 5xx are retried, a time-out once; other 4xx are not.
    urllib3's `Retry` counts the attempts and computes the waits, or takes them from `Retry-After`. It is not mounted in
    the session, because there it neither sees a reply's body (a body that breaks off, an error page with status 200, a
    500 that refuses a request field) nor survives an invalid `Retry-After`.

    Args:
        model: The model's name on the server.
        format_prompt: Entry → prompt text, as the answering model saw it.
        question: What to ask, and the scale of the answer.
        base_url: The server's address with its version, such as `http://localhost:8080/v1`.
        api_key_env: Environment variable that holds the key, which is sent to `base_url` alone; None: no key.
        temperature: Sampling temperature of the judge; None: the server's default (some models accept no other).
        seed: Sampling seed of the judge; None: the server's default.
        max_tokens: Longest reply, with what a thinking model thinks.
        reasoning_effort: How much a thinking model thinks, in the server's words (`none`, `low`, …); None: its default.
        timeout: Seconds to wait for a reply to begin, and as many for the rest of it.

    Raises:
        InputError: `base_url` has a password or a query.
    """

    kind = "openai"
    timeouts = TIMEOUTS

    model: str
    _: KW_ONLY
    format_prompt: Callable[[Mapping[str, str]], str]
    question: Question = SCORE
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    seed: int | None = 123
    max_tokens: int = 2048
    reasoning_effort: str | None = None
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
            "prompt": self.question.ask(placeholders, "{response}", self.format_prompt),
            "scale": list(self.question.scale),
            "structured": self.question.schema is not None,  # asks for a JSON object by its schema
            **self._settings(),
        }

    @cached_property
    def digest(self) -> str | None:
        """Identifier of the model's weights; None: OpenAI-compatible servers do not tell."""
        return None

    def check(self) -> None:
        """Ask the server for its list of models, which costs nothing.

        Raises:
            InputError: There is no key, or the list lacks the model.
            JudgeError: The server does not answer, or refuses the key.
        """
        self._closed.clear()
        if urlsplit(self.base_url).hostname == "api.openai.com" and not read_secret(self.api_key_env):
            variable = self.api_key_env or "OPENAI_API_KEY"
            raise InputError(f"{self.base_url} needs a key: set judge.api_key_env={variable} and export {variable}=…")
        reply = self._reach(f"{self.base_url}/models")
        if reply.status_code in (401, 403):
            raise JudgeError(f"{self.base_url} refuses the key (HTTP {reply.status_code}). {self._remedy()}")
        names = list_names(reply)
        if names and find_name(self.model, names) is None:
            raise InputError(f"{self.base_url} lacks judge.model={self.model}. {nearest_first(self.model, names)}")

    def score(self, entry: Mapping[str, str], response: str) -> Verdict:
        """Ask the server, retrying as the class says; a failure is a verdict, not an exception."""
        question = self.question.ask(entry, response, self.format_prompt)
        body = {**self._settings(), **self._extras(), "messages": [{"role": "user", "content": question}]}
        timeouts = 0
        retry = Retry(RETRIES, backoff_factor=BACKOFF / 2, backoff_jitter=BACKOFF / 2)
        while True:
            sent = self._accepted(body)
            reply: requests.Response | None = None
            try:
                reply = self._send("POST", f"{self.base_url}/chat/completions", sent)
            except requests.ReadTimeout:
                failure = Verdict(None, self._why_late(), unreachable=True, again=True)
                timeouts += 1
                if timeouts >= self.timeouts:
                    return failure
            except requests.RequestException as error:
                failure = Verdict(
                    None, f"no answer from {self.server}: {type(error).__name__}", unreachable=True, again=True
                )
            else:
                status = reply.status_code
                if status == 200 and (answer := read_reply(reply)):
                    return self._verdict(answer, question)
                words = self._without_key(" ".join(reply.content.decode("utf-8", "replace").split()))[:200]
                reason = f"HTTP {status}, no answer: {words}"
                failure = Verdict(None, reason, unreachable=status in _UNREACHABLE, again=True)
                if refused := _refused_fields(reply) & sent.keys():
                    self._leave_out(refused, words)
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
        names = ("model", "temperature", "seed", "max_tokens", "reasoning_effort")
        return {name: getattr(self, name) for name in names}

    def _extras(self) -> dict[str, Any]:
        """Request fields that say nothing new: they follow from the question and the settings."""
        if self.question.schema is None:
            return {}
        described = {"name": "score", "strict": True, "schema": self.question.schema}
        return {"response_format": {"type": "json_schema", "json_schema": described}}

    def _accepted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request without those that the server has refused."""
        fields = dict(body)
        if "max_tokens" in self._refused:  # OpenAI's thinking models know it by another name
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        return {key: value for key, value in fields.items() if value is not None and key not in self._refused}

    def _leave_out(self, fields: set[str], words: str) -> None:
        """Do not send fields with this question and all later ones."""
        if fields - self._refused:
            logger.warning("%s refuses %s, left out from now on: %s", self.server, ", ".join(sorted(fields)), words)
        self._refused |= fields

    def _verdict(self, reply: Reply, question: str) -> Verdict:
        raw = self._without_key(reply.text)
        if reply.prompt_tokens is not None and reply.prompt_tokens < (least := least_tokens(question)):
            reason = (
                f"the judge read {reply.prompt_tokens} tokens of a question that has over {least}: its context is too "
                "short. Give the server a longer one (Ollama: OLLAMA_CONTEXT_LENGTH, or num_ctx in a Modelfile; "
                "llama.cpp: -c)"
            )
            return Verdict(None, reason, raw, again=True)
        if not (answer := answer_of(raw)):
            return Verdict(None, self._why_empty(reply, raw), raw, again=True)
        low, high = self.question.scale
        score = parse_score(_whole_part(answer) if reply.cut else answer, self.question.scale)
        if score is None:
            reason = f"no score from {low:g} to {high:g} in the answer {answer[:80]!r}"
            cut = f" (cut short at judge.max_tokens={self.max_tokens})" if reply.cut else ""
            return Verdict(None, reason + cut, raw)
        feedback = parse_feedback(answer) if self.question.feedback else None
        return Verdict(self.question.percent(score), raw=raw, feedback=feedback)

    def _why_late(self) -> str:
        """The reason of a failure without an answer in time."""
        return (
            f"no answer from {self.server} in {self.timeout:g} seconds: the model is slow or goes in circles. "
            f"Raise judge.timeout, or lower judge.max_tokens={self.max_tokens}"
        )

    def _why_empty(self, reply: Reply, raw: str) -> str:
        """The reason of a failure without an answer."""
        effort = f"judge.reasoning_effort={'low' if self.reasoning_effort == 'none' else 'none'}"
        if reply.cut:
            limit = f"judge.max_tokens={self.max_tokens}"
            return (
                f"the answer {raw[:80]!r} ended before a score: {limit}, or the server's own limit, went on the "
                f"model's thinking. Raise judge.max_tokens, or let it think less: {effort}"
            )
        if reply.reasoning or raw:
            return (
                f"the answer {raw[:80]!r} is empty but for the model's thinking. Let it think less: {effort}, "
                f"or raise judge.max_tokens={self.max_tokens}"
            )
        return "the answer '' is empty"

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> requests.Response:
        with requests.Session() as session:
            # A proxy set in the environment cannot reach servers on this machine.
            session.trust_env = urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
            auth, timeout = bearer_auth(self.api_key_env), (CONNECT_TIMEOUT, self.timeout)
            with session.request(
                method, url, json=body, auth=auth, timeout=timeout, allow_redirects=False, stream=True
            ) as reply:
                reply._content = read_body(reply, self.timeout)  # requests itself has no limit of time or size
            return reply

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


def _whole_part(text: str) -> str:
    """What is certain of a reply that was cut: its JSON object, or its first line if another line begins.

    A number at the end may have lost digits, and a later line may have held the final score.
    """
    return text if text.lstrip("` \njson").startswith("{") else text.partition("\n")[0] * ("\n" in text)


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
