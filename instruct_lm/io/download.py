"""Download of one file over HTTP, resumed and verified before it is moved into place, and the bar over several."""

import re
from pathlib import Path
from types import TracebackType

import requests
from tqdm import tqdm

from instruct_lm.errors import InputError
from instruct_lm.io.credentials import Auth
from instruct_lm.io.network import DownloadError, TryAgain, check_status, integer, repeat, request, shown_url
from instruct_lm.io.verification import beside, is_page, place


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size in `Content-Range: bytes 5-9/10` (with status 416: `bytes */10`)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (integer(match[1]), integer(match[2])) if match else (None, None)


def _linked_sha256(response: requests.Response) -> str | None:
    """The sha256 of a large file, which the hub states when it redirects to its file store."""
    tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response)]
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)


class Progress:
    """One progress bar on stderr over the bytes of several files; it appears with the first of them.

    Args:
        sizes: Bytes of each file to come; None where the server states none: the bar then has no total.
    """

    def __init__(self, sizes: dict[Path, int | None]) -> None:
        self._sizes = dict(sizes)
        self._done: dict[Path, int] = {}
        self._bar: tqdm | None = None

    def begin(self, path: Path, done: int, size: int | None = None) -> None:
        """A file goes on at byte `done`, which may lie before the one that it had reached."""
        self._sizes[path] = size or self._sizes.get(path)
        total = sum(known for known in self._sizes.values() if known is not None)
        if self._bar is None:
            self._bar = tqdm(desc=path.name, total=total or None, initial=done, unit="B", unit_scale=True)
        else:
            self._bar.initial += done - self._done.get(path, 0)  # the rate counts received bytes alone
        self._done[path] = done
        self._bar.n, self._bar.total = sum(self._done.values()), None if None in self._sizes.values() else total
        self._bar.set_description(path.name)

    def advance(self, path: Path, n_bytes: int) -> None:
        """Some bytes of a file have come."""
        self._done[path] += n_bytes
        if self._bar is not None:
            self._bar.update(n_bytes)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


class Download:
    """One file over HTTP: from `url` to `path`, by way of `path.part`.

    The messages of its errors say what is wrong; `Fetcher` adds which file, where it comes from and the remedy.
    """

    def __init__(
        self, url: str, path: Path, sha256: str | None, auth: Auth | None, login: str, progress: Progress | None
    ) -> None:
        self.url, self.path, self.sha256, self.auth = url, path, sha256, auth
        self.login = login  # the remedy where the server refuses access
        self.progress = progress
        self.part = beside(path, ".part")  # the bytes received so far
        # Two lines: the strong ETag of the version that `part` belongs to, and its URL.
        self.etag_file = beside(path, ".part.etag")

    def run(self) -> None:
        """Repeat attempts until the file is in place."""
        repeat(self._attempt, self.path.name, lambda: _size_of(self.part))

    def _attempt(self) -> None:
        """Send one request that continues where `part` ends; raise TryAgain or TRANSIENT if another may succeed."""
        etag = self._etag_of_part()
        # Without an ETag or a hash, parts of two versions could be joined unnoticed: then start at byte 0.
        offset = _size_of(self.part) if etag or self.sha256 else 0
        headers = {"Range": f"bytes={offset}-"} | ({"If-Range": etag} if etag else {}) if offset else {}
        with request("GET", self.url, self.auth, headers) as response:
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
        check_status(response, self.login)
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
            offset, size = 0, None if encoded else integer(response.headers.get("Content-Length"))
            framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
            if not framed and not sha256:
                raise InputError("the server states no length, so the file may be incomplete: set its sha256")
        if not offset:
            self.part.write_bytes(b"")  # before the ETag, so that old bytes never get a new version
            version = "" if encoded else response.headers.get("ETag", "")
            self.etag_file.write_text(f"{version}\n{shown_url(self.url)}" if version.startswith('"') else "")
        done = _size_of(self.part)
        if self.progress:
            self.progress.begin(self.path, done, size)
        with self.part.open("ab") as file:
            for chunk in response.iter_content(1 << 16):  # bytes: the most that an interruption loses
                done += file.write(chunk)
                if self.progress:
                    self.progress.advance(self.path, len(chunk))
        if size is not None and done > size:
            raise self._start_over(f"the server sent more than {size} bytes")
        if size is not None and done < size:
            raise TryAgain(f"the download ended at {done} of {size} bytes")
        return offset

    def _etag_of_part(self) -> str:
        """The strong ETag of `part`, or "" if `part` cannot be continued from this URL by version."""
        etag, _, url = (self.etag_file.read_text() if self.etag_file.exists() else "").partition("\n")
        return etag if url == shown_url(self.url) else ""

    def _start_over(self, reason: str) -> TryAgain:
        self.part.unlink(missing_ok=True)
        return TryAgain(f"{reason}, so the download starts over")
