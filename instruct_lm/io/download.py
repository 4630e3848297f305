"""Download of one file over HTTP: resumed, retried, and verified before it is moved into place."""

import logging
import random
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from tqdm import tqdm

from instruct_lm.errors import InputError, RunError
from instruct_lm.io.credentials import Auth
from instruct_lm.io.verification import beside, is_page, place

logger = logging.getLogger(__name__)

TIMEOUT = (10.0, 60.0)  # seconds to connect, and seconds without a byte
RETRIES = 5  # failed attempts in a row that add no bytes, after the first
BACKOFF = 1.0  # seconds before the first retry, doubled by each further one, with jitter
MAX_WAIT = 60.0  # seconds; the longest pause, also when a server asks for more
TRANSIENT = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError, ContentDecodingError)


class DownloadError(RunError):
    """A server or the network failed; the user's input is not at fault."""


class _TryAgain(Exception):
    """This attempt failed, another one may succeed; `after` is the pause in seconds that the server asks for."""

    def __init__(self, reason: str, after: int | None = None) -> None:
        super().__init__(reason)
        self.after = after


def shown_url(url: str) -> str:
    """The URL without its possible secrets: user, password and query."""
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2], query="").geturl()


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _root_cause(error: BaseException) -> str:
    """The innermost error's text: requests' own texts are long and contain the whole URL."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def _integer(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size in `Content-Range: bytes 5-9/10` (with status 416: `bytes */10`)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (_integer(match[1]), _integer(match[2])) if match else (None, None)


def _linked_sha256(response: requests.Response) -> str | None:
    """The sha256 of a large file, which the hub states when it redirects to its file store."""
    tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response)]
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)


class Download:
    """One file over HTTP: from `url` to `path`, by way of `path.part`.

    The messages of its errors say what is wrong; `Fetcher` adds which file, where it comes from and the remedy.
    """

    def __init__(self, url: str, path: Path, sha256: str | None, auth: Auth | None) -> None:
        self.url, self.path, self.sha256, self.auth = url, path, sha256, auth
        self.part = beside(path, ".part")  # the bytes received so far
        # Two lines: the strong ETag of the version that `part` belongs to, and its URL.
        self.etag_file = beside(path, ".part.etag")

    def run(self) -> None:
        """Repeat attempts until the file is in place; give up after too many in a row that add no bytes."""
        failures, furthest = 0, _size_of(self.part)
        while True:
            asked = None
            try:
                return self._attempt()
            except _TryAgain as error:
                reason, asked = str(error), error.after
            except TRANSIENT as error:
                reason = _root_cause(error)
            except requests.RequestException as error:
                raise DownloadError(f"could not be fetched: {_root_cause(error)}") from error
            failures = failures + 1 if _size_of(self.part) <= furthest else 1
            furthest = max(furthest, _size_of(self.part))
            if failures > RETRIES:
                raise DownloadError(f"could not be fetched: {reason} (attempts: {failures})")
            backoff = BACKOFF * 2 ** min(failures - 1, 16) * random.uniform(0.5, 1)
            wait = min(MAX_WAIT, backoff if asked is None else asked)
            logger.warning("%s: %s; trying again in %.1f s", self.path.name, reason, wait)
            time.sleep(wait)

    def _attempt(self) -> None:
        """Send one request that continues where `part` ends; raise _TryAgain or TRANSIENT if another may succeed."""
        etag = self._etag_of_part()
        # Without an ETag or a hash, parts of two versions could be joined unnoticed: then start at byte 0.
        offset = _size_of(self.part) if etag or self.sha256 else 0
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": etag} if etag else {})
        with requests.get(self.url, headers=headers, auth=self.auth, stream=True, timeout=TIMEOUT) as response:
            linked = _linked_sha256(response)
            if self.sha256 and linked and self.sha256 != linked:
                raise InputError(f"its sha256 is {linked} there instead of {self.sha256}")
            sha256 = self.sha256 or linked
            if response.status_code == 416 and offset:
                # Nothing follows byte `offset`: `part` is complete, or belongs to another version of the file.
                same_version = etag and response.headers.get("ETag") == etag
                if _content_range(response)[1] != offset or not (sha256 or same_version):
                    raise self._start_over(f"the server cannot continue from byte {offset}")
            else:
                self._check_status(response)
                offset = self._save(response, offset, etag, sha256)
        try:
            place(self.part, self.path, sha256)
        except InputError as error:
            if offset:
                raise self._start_over(str(error)) from error
            error_type = InputError if self.sha256 else DownloadError
            raise error_type(str(error)) from error

    def _check_status(self, response: requests.Response) -> None:
        code, status = response.status_code, f"HTTP {response.status_code} {response.reason}"
        if code in (408, 425, 429) or code >= 500:
            raise _TryAgain(status, _integer(response.headers.get("Retry-After")))
        if code in (401, 403):
            raise InputError(f"access refused ({status}): it does not exist, or HF_TOKEN must give access")
        if code not in (200, 206):
            raise InputError(f"not available ({status}): check the spelling and the revision")
        if response.headers.get("Content-Type", "").lower().startswith("text/html") and not is_page(self.path.name):
            raise DownloadError("the server sent a web page, such as a login, proxy or error page")

    def _save(self, response: requests.Response, offset: int, etag: str, sha256: str | None) -> int:
        """Append the body to `part`; return the offset at which the server began, 0 if it ignored the range."""
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        if response.status_code == 206:
            start, size = _content_range(response)
            changed = etag and response.headers.get("ETag", etag) != etag
            if start != offset or size is None or encoded or changed:
                raise self._start_over(f"the server did not send the bytes from {offset} on")
        else:
            offset, size = 0, None if encoded else _integer(response.headers.get("Content-Length"))
            framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
            if not framed and not sha256:
                raise InputError("the server states no length, so the file may be incomplete: set its sha256")
        if not offset:
            self.part.write_bytes(b"")  # before the ETag, so that old bytes never get a new version
            version = "" if encoded else response.headers.get("ETag", "")
            self.etag_file.write_text(f"{version}\n{shown_url(self.url)}" if version.startswith('"') else "")
        done = _size_of(self.part)
        bar = tqdm(desc=self.path.name, total=size, initial=done, unit="B", unit_scale=True)
        with self.part.open("ab") as file, bar:
            for chunk in response.iter_content(1 << 16):  # bytes: the most that an interruption loses
                done += file.write(chunk)
                bar.update(len(chunk))
        if size is not None and done > size:
            raise self._start_over(f"the server sent more than {size} bytes")
        if size is not None and done < size:
            raise _TryAgain(f"the download ended at {done} of {size} bytes")
        return offset

    def _etag_of_part(self) -> str:
        """The strong ETag of `part`, or "" if `part` cannot be continued from this URL by version."""
        etag, _, url = (self.etag_file.read_text() if self.etag_file.exists() else "").partition("\n")
        return etag if url == shown_url(self.url) else ""

    def _start_over(self, reason: str) -> _TryAgain:
        self.part.unlink(missing_ok=True)
        return _TryAgain(f"{reason}, so the download starts over")
