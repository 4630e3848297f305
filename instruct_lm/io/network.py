"""HTTP requests that are repeated while another attempt may succeed, and a short try for hosts that never answered."""

import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from requests.exceptions import ChunkedEncodingError, ConnectTimeout, ContentDecodingError, ProxyError, SSLError
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import NewConnectionError

from instruct_lm.errors import InputError, RunError
from instruct_lm.io.credentials import Auth

logger = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = (5.0, 60.0)  # seconds to connect, and seconds without a byte
RETRIES = 5  # failed attempts in a row that add no bytes, after the first
BACKOFF = 1.0  # seconds before the first retry, doubled by each further one, with jitter
MAX_WAIT = 60.0  # seconds; the longest pause, also when a server asks for more
FIRST_CONTACT = 4.0  # seconds in which a host must accept a connection, for all its addresses together
TRANSIENT = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError, ContentDecodingError)

_answered: set[str] = set()  # the hosts that have answered in this process


class DownloadError(RunError):
    """A server or the network failed; the user's input is not at fault."""


class UnreachableError(DownloadError):
    """No connection to a host that has not answered before in this process."""

    def __init__(self, message: str, host: str = "") -> None:
        super().__init__(message)
        self.host = host


class NotThereError(InputError):
    """The server has no such file."""


class TryAgain(Exception):
    """This attempt failed, another one may succeed; `after` is the pause in seconds that the server asks for."""

    def __init__(self, reason: str, after: int | None = None) -> None:
        super().__init__(reason)
        self.after = after


def shown_url(url: str) -> str:
    """The URL without its possible secrets: user, password and query."""
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2], query="").geturl()


def host_of(url: str) -> str:
    """`host` or `host:port` of a URL."""
    return urlsplit(url).netloc.rpartition("@")[2]


def integer(text: str | None) -> int | None:
    """The number in a header; None if it holds none."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def request(method: str, url: str, auth: Auth | None, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Send a request, follow its redirects, and return the response with its body unread.

    Raises:
        requests.RequestException: No answer came.
    """
    headers = {"Accept-Encoding": "identity", **(headers or {})}
    response = requests.request(
        method, url, headers=headers, auth=auth, stream=True, timeout=TIMEOUT, allow_redirects=True
    )
    _answered.update(host_of(answer.url) for answer in (*response.history, response))
    return response


def repeat(attempt: Callable[[], T], name: str, received: Callable[[], int] = lambda: 0) -> T:
    """Call `attempt` until it returns; give up after too many failures in a row that add no bytes.

    Args:
        attempt: Raises `TryAgain` or one of `TRANSIENT` where another attempt may succeed.
        name: What the log calls it.
        received: The number of bytes that have come.

    Raises:
        UnreachableError: No connection, twice, to a host that has never answered.
        DownloadError: Too many failures, or one that does not pass.
    """
    failures, furthest = 0, received()
    while True:
        asked = None
        try:
            return attempt()
        except TryAgain as error:
            reason, asked = str(error), error.after
        except TRANSIENT as error:
            reason = _root_cause(error)
            host = host_of(error.request.url or "") if error.request is not None else ""
            if _is_no_contact(error) and host not in _answered and (failures or isinstance(error, ConnectTimeout)):
                raise UnreachableError(f"{host} cannot be reached ({reason})", host) from error
        except requests.RequestException as error:
            raise DownloadError(f"could not be fetched: {_root_cause(error)}") from error
        failures = failures + 1 if received() <= furthest else 1
        furthest = max(furthest, received())
        if failures > RETRIES:
            raise DownloadError(f"could not be fetched: {reason} (attempts: {failures})")
        backoff = BACKOFF * 2 ** min(failures - 1, 16) * random.uniform(0.5, 1)
        wait = min(MAX_WAIT, backoff if asked is None else asked)
        logger.warning("%s: %s; trying again in %.1f s", name, reason, wait)
        time.sleep(wait)


def check_status(response: requests.Response, login: str) -> None:
    """Raise an error for a status other than 200 and 206; `login` says how to get access."""
    code, status = response.status_code, f"HTTP {response.status_code} {response.reason}"
    if code in (408, 425, 429) or code >= 500:
        raise TryAgain(status, integer(response.headers.get("Retry-After")))
    if code in (401, 403):
        raise InputError(f"access refused ({status}): {login}")
    if code in (404, 410):
        raise NotThereError(f"not available ({status}): check the spelling and the revision")
    if code not in (200, 206):
        raise InputError(f"not available ({status}): check the spelling and the revision")


def remote_size(url: str, auth: Auth | None, login: str) -> int | None:
    """The size in bytes of a file on a server; None if the server does not state it.

    Raises:
        NotThereError: There is no such file.
        InputError: Another status that does not pass, such as 401.
        DownloadError: The server or the network failed.
    """

    def attempt() -> int | None:
        with request("HEAD", url, auth) as response:
            if response.ok or response.status_code == 404:
                check_status(response, login)
                return _stated_size(response)
        with request("GET", url, auth) as response:  # closed unread: a server or its file store may know no HEAD
            check_status(response, login)
            return _stated_size(response)

    return repeat(attempt, shown_url(url).rpartition("/")[2])


def _stated_size(response: requests.Response) -> int | None:
    """The hub states the size of a large file when it redirects to its file store."""
    linked = [answer.headers.get("X-Linked-Size") for answer in (*response.history, response)]
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    return integer(next(filter(None, linked), None if encoded else response.headers.get("Content-Length")))


def unreachable(urls: Iterable[str]) -> dict[str, str]:
    """The hosts that accept no connection → a sentence that says why; each is tried at most twice, all at once.

    A host that has answered in this process is not tried. Where a proxy is set, it is the proxy that must accept.
    """
    urls_of = {host_of(url): url for url in urls if host_of(url) not in _answered}
    reasons = dict.fromkeys(urls_of, f"no connection within {FIRST_CONTACT:g} s")

    def knock(host: str) -> None:
        url = urls_of[host]
        proxy = select_proxy(url, get_environ_proxies(url, no_proxy=None))
        address = urlsplit(url if proxy is None else proxy if "://" in proxy else f"http://{proxy}")
        for attempt in range(2):
            try:
                port = address.port or {"http": 80, "https": 443}.get(address.scheme, 1080)
                socket.create_connection((address.hostname or "", port), timeout=FIRST_CONTACT).close()
                del reasons[host]
                return
            except (OSError, ValueError) as error:
                reasons[host] = str(error) if proxy is None else f"proxy {host_of(address.geturl())}: {error}"
            if attempt == 0:
                time.sleep(BACKOFF / 2)

    # Threads, because a name server that does not answer can block for longer than any timeout of a socket.
    threads = [threading.Thread(target=knock, args=(host,), daemon=True) for host in urls_of]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + FIRST_CONTACT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {host: f"{host} cannot be reached ({reason})" for host, reason in list(reasons.items())}


def _is_no_contact(error: requests.RequestException) -> bool:
    """Whether not even a connection was made: no name, no route, refused, no proxy, no trusted certificate."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, (ConnectTimeout, ProxyError, SSLError)) or isinstance(reason, NewConnectionError)


def _root_cause(error: BaseException) -> str:
    """The innermost error's text: requests' own texts are long and contain the whole URL."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__
