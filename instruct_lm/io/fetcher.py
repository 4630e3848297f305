"""From sources to verified local files: one step for several sources, with one progress bar and one message.

Files beside a cached file `x`: `x.part` (an unfinished download, which the next process resumes), `x.part.etag` (the
version that the part belongs to), `x.lock`, and `x.sha256` (its hash, by which a flipped bit is noticed). Beside the
folder `x` of a repository: `x.complete` (the names of its files). A file is verified before it is moved into place and
once in each process that uses it; it is fetched again only where it is damaged: delete it to update a moving revision
such as `main`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from instruct_lm.config import BUILT_IN
from instruct_lm.errors import InputError
from instruct_lm.io.files import sha256_of
from instruct_lm.io.sources import default_cache_dir, parse_source
from instruct_lm.io.step import Step, Wanted


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
        """Return the path of a local source, or of a remote one in the cache, after fetching it if necessary.

        A cached file with another hash than expected stays until its replacement is fetched and verified.

        Args:
            source: In one of the forms in `FORMS`.
            sha256: Expected hash, 64 hex digits; None: the hash that the hub states, if it does.

        Raises:
            InputError: Malformed source, missing local file, file not in the cache while `offline`, HTTP status such as
                404, unexpected hash, cache that is not writable.
            UnreachableError: No connection to the server, which takes seconds to notice.
            DownloadError: The server or the network failed, or the server sent something else than the file.
        """
        return self.fetch_all({source: sha256})[source]

    def fetch_all(self, sources: Mapping[str, str | None]) -> dict[str, Path]:
        """Fetch several sources in one step, with one progress bar over the bytes of all.

        Args:
            sources: Source → expected sha256, or None.

        Returns:
            Source → path, as `fetch` returns it.

        Raises:
            InputError, DownloadError: As in `fetch`. One message names every file that could not be fetched, why, and
                where to put it by hand.
        """
        paths, wanted = {}, []
        for source, sha256 in sources.items():
            found = self._look_up(source, sha256.lower() if sha256 else None)
            paths[source] = found.path if isinstance(found, Wanted) else found
            wanted += [found] if isinstance(found, Wanted) else []
        if wanted:
            Step(wanted, self.offline).run()
        return paths

    def _look_up(self, source: str, sha256: str | None) -> Path | Wanted:
        """The path of what is there already, or what is wanted."""
        remote = Path(source) if source in BUILT_IN else parse_source(source)
        if isinstance(remote, Path):
            found = sha256_of(remote) if sha256 and remote.is_file() else None
            if found != sha256 and source not in BUILT_IN:
                raise InputError(f"{remote}: its sha256 is {found} instead of {sha256}. Correct it, or set it to null")
            return remote
        path = Path(self.cache_dir or default_cache_dir()).expanduser().absolute().joinpath(*remote.parts)
        if remote.is_repository and sha256:
            hint = "set it to null (each file is held against the hash that the hub states)"
            raise InputError(f"{source} is a folder, and the sha256 {sha256} that of one file: {hint}")
        url = remote.origin
        if remote.kind == "url" and self.mirror:  # the mirror gets no user name and password
            url = self.mirror.rstrip("/") + "/" + re.sub(r"^https?://([^/?]*@)?", "", url)
        wanted = Wanted(source, remote, path, sha256, url)
        try:
            return path if wanted.in_place() else wanted
        except OSError as error:
            raise wanted.cannot_use(error) from error
