"""One file over HTTP → a verified file in place: resumed, retried, never an error page."""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from instruct_lm.errors import InputError, RunError

logger = logging.getLogger(__name__)

TRANSIENT = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class DownloadError(RunError):
    """A server or the network failed, not the user."""


class _Retry(Exception):
    """This attempt failed, another may not; `after` is the pause in seconds that the server asks for."""

    def __init__(self, reason: str, after: int | None = None) -> None:
        super().__init__(reason)
        self.after = after


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_kind(path: Path, name: str) -> None:
    """Raises ValueError for a file of unknown hash that cannot be what its name says, such as an error page."""
    suffix, size = Path(name).suffix.lower(), path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not _is_page(name) and head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is a web page")
    if suffix == ".gguf" and not head.startswith(b"GGUF"):
        raise ValueError("it does not begin with GGUF")
    # safetensors: u64 length of the header, then the header, a JSON object
    if suffix == ".safetensors" and (head[8:9] != b"{" or int.from_bytes(head[:8], "little") > size - 8):
        raise ValueError("it has no safetensors header")
    if suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error})") from error


def verify(path: Path, name: str, sha256: str | None, size: int | None) -> str:
    """The sha256 of a whole file; ValueError says why it cannot be the one asked for."""
    if size is not None and (found := path.stat().st_size) != size:
        raise ValueError(f"it has {found} bytes instead of {size}")
    digest = sha256_of(path)
    if sha256 and digest != sha256:
        raise ValueError(f"its sha256 is {digest} instead of {sha256}")
    if not sha256:
        _check_kind(path, name)
    return digest


def place(part: Path, path: Path, name: str, sha256: str | None, size: int | None) -> None:
    """Verifies a finished `.part` and moves it into place, or drops it and raises ValueError with the reason."""
    try:
        digest = verify(part, name, sha256, size)
    except ValueError:
        part.unlink()
        raise
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    beside(path, ".sha256").unlink(missing_ok=True)
    part.replace(path)
    beside(path, ".part.etag").unlink(missing_ok=True)
    record(path, digest)


def record(path: Path, digest: str) -> None:
    """Notes a file's hash together with its present state."""
    with contextlib.suppress(OSError):  # a read-only cache
        beside(path, ".sha256").write_text(f"{digest} {state_of(path)}\n")


def _is_page(name: str) -> bool:
    return name.lower().endswith((".html", ".htm"))


def state_of(path: Path) -> str:
    """Bytes and time of change: other ones mean that a recorded hash is void."""
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def beside(path: Path, suffix: str) -> Path:
    """The path with `suffix` appended to its name."""
    return path.with_name(path.name + suffix)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def shown_url(url: str) -> str:
    """The URL without what may be secret: user, password and query."""
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2], query="").geturl()


def _root_cause(error: BaseException) -> str:
    """The innermost error's text: requests' own texts are long and hold the whole URL."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def _integer(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total of an answer's `Content-Range: bytes 5-9/10` (416: `bytes */10`)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (_integer(match[1]), _integer(match[2])) if match else (None, None)


def _linked(response: requests.Response) -> tuple[str | None, int | None]:
    """sha256 and bytes of a large file as the hub states them, in its redirect to the file store."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag, _integer(answer.headers.get("X-Linked-Size"))
    return None, None


@dataclass(frozen=True)
class Download:
    """One file over HTTP: `url` → `path`, by way of `path.part`."""

    url: str
    path: Path
    name: str  # its ending says what kind of file it must be
    sha256: str | None
    size: int | None  # bytes
    auth: Callable[[requests.PreparedRequest], requests.PreparedRequest] | None
    explain: Callable[[str], str]  # what is wrong with the file → the message, with place and remedy
    timeout: tuple[float, float]  # seconds: for the connection, between bytes
    retries: int
    backoff: float  # seconds
    max_wait: float  # seconds
    progress: bool

    @property
    def part(self) -> Path:
        """What has come so far."""
        return beside(self.path, ".part")

    @property
    def etag_file(self) -> Path:
        """Two lines: the strong ETag of the version that `part` belongs to, and its URL."""
        return beside(self.path, ".part.etag")

    def run(self) -> None:
        """Attempts until the file is in place, or `retries` attempts in a row brought it no further."""
        failures, furthest = 0, size_of(self.part)
        while True:
            asked = None
            try:
                return self._attempt()
            except _Retry as error:
                reason, asked = str(error), error.after
            except TRANSIENT as error:
                reason = _root_cause(error)
            except requests.RequestException as error:
                raise DownloadError(self.explain(f"could not be fetched: {_root_cause(error)}")) from error
            failures = failures + 1 if size_of(self.part) <= furthest else 1
            furthest = max(furthest, size_of(self.part))
            if failures > self.retries:
                raise DownloadError(self.explain(f"could not be fetched: {reason} (attempts: {failures})"))
            backoff = self.backoff * 2 ** min(failures - 1, 16) * random.uniform(0.5, 1)
            wait = min(self.max_wait, backoff if asked is None else asked)
            logger.warning("%s: %s; trying again in %.1f s", self.path.name, reason, wait)
            time.sleep(wait)

    def _attempt(self) -> None:
        """One request that goes on where `part` ends; _Retry or one of TRANSIENT where another one may help."""
        etag = self._etag_of_part()
        offset = size_of(self.part) if etag or self.sha256 else 0  # with neither, two versions might be joined
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": etag} if etag else {})
        with requests.get(self.url, headers=headers, auth=self.auth, stream=True, timeout=self.timeout) as response:
            linked_sha256, linked_size = _linked(response)
            if self.sha256 and linked_sha256 and self.sha256 != linked_sha256:
                raise InputError(self.explain(f"has the sha256 {linked_sha256} there, not {self.sha256}"))
            sha256 = self.sha256 or linked_sha256
            same_version = bool(etag) and response.headers.get("ETag") == etag
            if response.status_code == 416 and offset:  # whole already, or another file
                if _content_range(response)[1] != offset or not (sha256 or same_version):
                    raise self._anew(f"the server cannot go on from byte {offset}")
            else:
                self._check_answer(response)
                encoded = response.headers.get("Content-Encoding", "identity") != "identity"
                if response.status_code == 206:
                    start, total = _content_range(response)
                    changed = etag and "ETag" in response.headers and not same_version
                    if start != offset or total is None or encoded or changed:
                        raise self._anew(f"the server sent something else than the bytes from {offset} on")
                else:
                    offset, total = 0, None if encoded else _integer(response.headers.get("Content-Length"))
                size = self._agreed_size(self.size, linked_size, total)
                framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
                if size is None and not framed and not sha256:
                    raise InputError(self.explain("comes without its length, and may be cut: set its sha256"))
                if not offset:
                    self._begin_part("" if encoded else response.headers.get("ETag", ""))
                self._receive(response, size)
        try:
            place(self.part, self.path, self.name, sha256, self.size)
        except ValueError as error:
            if offset:
                raise self._anew(str(error)) from error
            error_type = InputError if self.sha256 else DownloadError
            raise error_type(self.explain(f"is not what was asked for: {error}")) from error

    def _begin_part(self, etag: str) -> None:
        """Empties `part` and notes its version: a strong ETag, or nothing for what cannot be continued."""
        self.part.write_bytes(b"")  # first, so that no old bytes get a new version
        self.etag_file.write_text(f"{etag}\n{shown_url(self.url)}" if etag.startswith('"') else "")

    def _etag_of_part(self) -> str:
        etag, _, url = (self.etag_file.read_text() if self.etag_file.exists() else "").partition("\n")
        return etag if url == shown_url(self.url) else ""

    def _anew(self, reason: str) -> _Retry:
        self.part.unlink(missing_ok=True)
        return _Retry(f"{reason}, so it starts anew")

    def _check_answer(self, response: requests.Response) -> None:
        """Raises what fits an answer that holds no part of the file."""
        code, status = response.status_code, f"HTTP {response.status_code} {response.reason}"
        if code in (408, 425, 429) or code >= 500:
            raise _Retry(status, _integer(response.headers.get("Retry-After")))
        if code in (401, 403):
            raise InputError(self.explain(f"is refused ({status}): no such file, or HF_TOKEN must give access"))
        if code not in (200, 206):
            raise InputError(self.explain(f"cannot be had ({status}): check the spelling and the revision"))
        if response.headers.get("Content-Type", "").lower().startswith("text/html") and not _is_page(self.name):
            raise DownloadError(self.explain("did not come, but a web page: of a login, a proxy or an error"))

    def _agreed_size(self, configured: int | None, linked: int | None, announced: int | None) -> int | None:
        sizes = [size for size in (configured, linked, announced) if size is not None]
        if len(set(sizes)) > 1:
            error_type = DownloadError if configured is None else InputError
            raise error_type(self.explain(f"has {sizes[-1]} bytes there, not {sizes[0]}"))
        return sizes[0] if sizes else None

    def _receive(self, response: requests.Response, size: int | None) -> None:
        """Appends the answer's body to `part`, which has `size` bytes in the end where that is known."""
        done = size_of(self.part)
        bar = tqdm(desc=self.path.name, total=size, initial=done, unit="B", unit_scale=True, disable=not self.progress)
        with self.part.open("ab") as file, bar:
            for chunk in response.iter_content(1 << 16):  # bytes: the most that an interruption loses
                done += file.write(chunk)
                bar.update(len(chunk))
                if size is not None and done > size:
                    break
        if size is not None and done > size:
            raise self._anew(f"the server sent more than {size} bytes")
        if size is not None and done < size:
            raise _Retry(f"the download ended at {done} of {size} bytes")
