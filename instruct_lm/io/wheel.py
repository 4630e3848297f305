"""One file of a wheel that pip downloads, with the user's own index, mirror, proxy and progress bar."""

import errno
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from difflib import get_close_matches
from pathlib import Path
from subprocess import DEVNULL, PIPE

from instruct_lm.errors import InputError
from instruct_lm.io.network import DownloadError, UnreachableError
from instruct_lm.io.verification import beside, place

_SHORT_TRY = ["--retries", "1", "--timeout", "3"]  # pip's own: 5 retries of 15 s each
# What zipfile raises for damaged archives, encrypted ones (RuntimeError) and unknown methods (NotImplementedError).
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError, struct.error)
_NO_CONTACT = re.compile(r"(?:NewConnection|NameResolution|ConnectTimeout|Proxy|SSL)Error")


def extract_from_wheel(requirement: str, file: str, path: Path, sha256: str | None) -> None:
    """Extract a file from the wheel of `name==version` to `path`.

    Raises:
        InputError: There is no such wheel or file, or it has another hash.
        UnreachableError: No connection to the index.
        DownloadError: The index or the network failed, or the wheel is damaged.
    """
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=path.parent) as folder:
        try:
            _pip_download(requirement, folder, _SHORT_TRY)
        except UnreachableError:
            raise
        except DownloadError:  # the index is there: now with the patience that pip is set to
            _pip_download(requirement, folder, [])
        wheel, part = next(Path(folder).iterdir()), beside(path, ".part")
        try:
            with zipfile.ZipFile(wheel) as archive:
                if file not in (names := archive.namelist()):
                    near = ", ".join(get_close_matches(file, names, cutoff=0.3)) or "nothing like it"
                    raise InputError(f"{wheel.name} has no file {file!r}; it has {near}")
                with archive.open(file) as member, part.open("wb") as target:
                    shutil.copyfileobj(member, target)
        except (*_DAMAGED, OSError) as error:
            part.unlink(missing_ok=True)
            if isinstance(error, InputError) or (
                isinstance(error, OSError) and error.errno != errno.EINVAL and error.errno
            ):
                raise  # EINVAL: a position before the beginning; none: of bzip2
            raise DownloadError(f"{wheel.name} is damaged: {error}") from error
    place(part, path, sha256)


def _pip_download(requirement: str, folder: str, options: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:", *options]
    command += ["--dest", folder, requirement]
    # stdout=2: pip shows its progress bar on our stderr
    done = subprocess.run(command, stdin=DEVNULL, stdout=2, stderr=PIPE, text=True, errors="replace")
    if not done.returncode:
        return
    said = "\n    ".join(done.stderr.strip().splitlines()[-5:])
    message = f"could not be fetched. pip said:\n    {said}"
    # pip says "No matching distribution" also when no index answered, but then it retried before.
    if "Retrying (" in done.stderr and _NO_CONTACT.search(done.stderr):
        raise UnreachableError(message)
    unknown = "No matching distribution" in said and "Retrying (" not in done.stderr
    raise (InputError if unknown else DownloadError)(message)
