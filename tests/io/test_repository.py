"""Whole repositories from a local server: what is asked for, what is fetched, and what is refused."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from instruct_lm.errors import InputError
from instruct_lm.io import network, repository
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError, UnreachableError
from tests.io.server import BODY, HALF, Handler, Server, closed_port, good, hub
from tests.io.test_fetcher import flip

SOURCE = "hf:owner/model@1"
WEIGHTS = struct.pack("<Q", 2) + b"{}" + BODY
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def index(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}).encode()


SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "merges.txt": b"a b\n"}
SINGLE = SMALL | {"model.safetensors": WEIGHTS}
SHARDED = SMALL | {INDEX: index(*SHARDS, SHARDS[0])} | dict.fromkeys(SHARDS, WEIGHTS)
UNUSED = {"README.md": b"#", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], None]:
    """Serves files as a repository of the hub."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)

    def serve(files: dict[str, bytes]) -> None:
        server.default = server.head = hub({f"/owner/model/resolve/1/{name}": body for name, body in files.items()})

    return serve


def folder(fetcher: Fetcher) -> Path:
    assert fetcher.cache_dir is not None
    return fetcher.cache_dir / "hf/owner/model/1"


def contents(fetcher: Fetcher) -> dict[str, bytes]:
    paths = folder(fetcher).iterdir()
    return {path.name: path.read_bytes() for path in paths if path.suffix not in (".lock", ".sha256")}


def names(paths: list[str]) -> list[str]:
    return [path.removeprefix("/owner/model/resolve/1/") for path in paths]


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
def test_a_repository_is_fetched_once_and_then_needs_no_network(
    server: Server, fetcher: Fetcher, publish: Callable, files: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    publish(files | UNUSED)
    assert fetcher.fetch(SOURCE) == folder(fetcher)
    assert contents(fetcher) == files
    fetched = [path for path, _ in server.requests]
    assert Counter(names(fetched)) == Counter(files.keys())
    assert set(names(server.heads)) <= {*repository.OPTIONAL, *files, "model.safetensors"}
    last = capfd.readouterr().err.rpartition("\r")[2]
    new_bytes = sum(len(body) for name, body in files.items() if name != INDEX)
    assert re.search(rf"100%.*{new_bytes / 1000:.0f}k/{new_bytes / 1000:.0f}k", last)
    assert fetcher.fetch(SOURCE) == Fetcher(fetcher.cache_dir, offline=True).fetch(SOURCE) == folder(fetcher)
    assert (len(server.requests), len(server.heads)) == (len(fetched), len(set(server.heads)))


@pytest.mark.parametrize("head", ["good", "no HEAD", "no HEAD in the file store"])
def test_the_hub_redirects_to_its_file_store(
    server: Server, fetcher: Fetcher, publish: Callable, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(SINGLE)
    serve, blob = server.default, "/blob/model.safetensors"
    digest = hashlib.sha256(WEIGHTS).hexdigest()

    def redirect(h: Handler) -> None:
        if h.path == blob:
            return h.answer(403) if h.command == "HEAD" and head != "good" else good(h, body=WEIGHTS)
        if h.path.endswith("model.safetensors"):
            return h.answer(302, Location=blob, X_Linked_ETag=f'"{digest}"', X_Linked_Size=str(len(WEIGHTS)))
        return serve(h)

    server.default = redirect
    server.head = (lambda h: h.answer(405)) if head == "no HEAD" else redirect
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetcher.fetch(SOURCE)
    assert contents(fetcher) == SINGLE
    assert all(headers["Authorization"] == "Bearer hf_secret" for path, headers in server.requests)
    corrupt = WEIGHTS[:-1] + b"?"
    (folder(fetcher) / "model.safetensors").unlink()
    server.default = lambda h: good(h, body=corrupt) if h.path == blob else redirect(h)
    with pytest.raises(DownloadError, match=r"hf:owner/model@1: model.safetensors: its sha256 is .* instead of"):
        fetcher.fetch(SOURCE)
    assert "model.safetensors" not in contents(fetcher)


def test_an_interrupted_step_goes_on_where_it_stopped(
    server: Server, fetcher: Fetcher, publish: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(SHARDED)
    serve, monkey = server.default, monkeypatch
    monkey.setattr(network, "RETRIES", 0)
    server.default = lambda h: good(h, send=HALF, body=WEIGHTS) if h.path.endswith(SHARDS[1]) else serve(h)
    with pytest.raises(DownloadError, match=rf"(?s){SOURCE}: {SHARDS[1]}: .*by hand: put {SHARDS[1]}, and"):
        fetcher.fetch(SOURCE)
    with pytest.raises(InputError, match=rf"(?s)offline=true.*by hand: put {SHARDS[1]}, and"):
        Fetcher(fetcher.cache_dir, offline=True).fetch(SOURCE)
    server.default, server.requests[:] = serve, []
    fetcher.fetch(SOURCE)
    assert contents(fetcher) == SHARDED
    ((path, headers),) = server.requests
    assert (names([path]), headers["Range"]) == ([SHARDS[1]], f"bytes={HALF}-")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.safetensors": WEIGHTS}, r"has no config.json there: check the spelling and the revision"),
        (SMALL, r"has no model.safetensors: name one of its files, such as hf:owner/model@1/<file>.gguf"),
        (
            SMALL | {"pytorch_model.bin": b"pickle"},
            r"(?s)but pytorch_model.bin, a pickle.*python -c .*from_pretrained\('owner/model', revision='1'\)",
        ),
        (SMALL | {"pytorch_model.bin.index.json": b"{}"}, r"but pytorch_model.bin.index.json, a pickle"),
        (SHARDED | {INDEX: index(*SHARDS, "model-3.safetensors")}, r"lacks the shard model-3.safetensors"),
    ],
    ids=["no config", "no weights", "pickle", "pickled shards", "no shard"],
)
def test_a_repository_without_what_is_needed_is_refused(
    server: Server, fetcher: Fetcher, publish: Callable, files: dict[str, bytes], says: str
) -> None:
    publish(files)
    with pytest.raises(InputError, match=says):
        fetcher.fetch(SOURCE)
    assert set(names([path for path, _ in server.requests])) <= {INDEX}  # nothing large


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "a\\x.safetensors", "a/x.safetensors", "", ".x.safetensors",
     "C:x.safetensors", "pytorch_model-1.bin", "x.safetensors\n", "x.safetensors?", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_that_leaves_its_folder_is_refused(
    server: Server, fetcher: Fetcher, publish: Callable, name: object
) -> None:
    publish(SMALL | {INDEX: index(SHARDS[0], name), SHARDS[0]: WEIGHTS})
    with pytest.raises(InputError, match=f"(?s){INDEX} (names {re.escape(repr(name))}|is no index)"):
        fetcher.fetch(SOURCE)
    assert names([path for path, _ in server.requests]) == [INDEX]


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": ["x"]}', b"3"])
def test_a_broken_index_is_refused(fetcher: Fetcher, publish: Callable, text: bytes) -> None:
    publish(SMALL | {INDEX: text})
    with pytest.raises(InputError, match=f"{INDEX} (is no index of weights|names nothing)"):
        fetcher.fetch(SOURCE)


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no network"])
def test_a_folder_put_in_place_by_hand(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], offline: bool
) -> None:
    fetcher = Fetcher(fetcher.cache_dir, offline=offline)
    error = InputError if offline else UnreachableError
    with closed_port() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(error, match=r"put config.json, model.safetensors \(or .*shards\), and those of .* that it"):
            fetcher.fetch(SOURCE)
        folder(fetcher).mkdir(parents=True, exist_ok=True)
        for i, (name, body) in enumerate(files.items()):
            if i == len(files) - 1:
                with pytest.raises(error, match=f"put {name}"):
                    fetcher.fetch(SOURCE)
            (folder(fetcher) / name).write_bytes(body)
        assert fetcher.fetch(SOURCE) == folder(fetcher)


def test_a_gated_repository_that_was_put_in_place_by_hand_is_used(
    server: Server, fetcher: Fetcher, publish: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    publish({})
    server.default = server.head = lambda h: h.answer(401)
    folder(fetcher).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder(fetcher) / name).write_bytes(SINGLE[name])
    assert fetcher.fetch(SOURCE) == folder(fetcher)
    assert "going on with the files that are there" in caplog.text


def test_a_folder_put_in_place_by_hand_is_completed_by_the_network(
    server: Server, fetcher: Fetcher, publish: Callable
) -> None:
    publish(SINGLE)
    folder(fetcher).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder(fetcher) / name).write_bytes(SINGLE[name])
    fetcher.fetch(SOURCE)
    assert contents(fetcher) == SINGLE
    assert set(names([path for path, _ in server.requests])) == {"tokenizer.json", "merges.txt"}


def test_a_deleted_file_is_fetched_again(server: Server, fetcher: Fetcher, publish: Callable) -> None:
    publish(SINGLE)
    (fetcher.fetch(SOURCE) / "tokenizer.json").unlink()
    server.requests.clear()
    fetcher.fetch(SOURCE)
    assert contents(fetcher) == SINGLE
    assert names([path for path, _ in server.requests]) == ["tokenizer.json"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_the_token_and_the_page(
    server: Server, fetcher: Fetcher, publish: Callable, status: int
) -> None:
    publish({})
    server.default = server.head = lambda h: h.answer(status)
    with pytest.raises(InputError, match=rf"{status}.*ask for access at {server.url}/owner/model, then set HF_TOKEN"):
        fetcher.fetch(SOURCE)
    assert len(server.requests) == 1


def test_one_hash_for_a_folder_is_refused(fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=r"hf:owner/model@1 is a folder, .*set it to null"):
        fetcher.fetch(SOURCE, sha256="0" * 64)


def test_two_processes_fetch_each_file_once(server: Server, fetcher: Fetcher, publish: Callable) -> None:
    publish(SHARDED)
    code = "import sys; from pathlib import Path; from instruct_lm.io.fetcher import Fetcher\n"
    code += "print(Fetcher(Path(sys.argv[1])).fetch(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(fetcher.cache_dir), SOURCE]
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=os.environ)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outputs == [str(folder(fetcher))] * 2
    assert contents(fetcher) == SHARDED
    assert Counter(names([path for path, _ in server.requests])) == Counter(SHARDED.keys())


def test_a_data_set_and_a_model_of_one_name_are_two_files(server: Server, fetcher: Fetcher, publish: Callable) -> None:
    publish({})
    files = {"/a/b/resolve/1/data.json": b"[1]", "/datasets/a/b/resolve/1/data.json": b"[2]"}
    server.default = server.head = hub(files)
    paths = fetcher.fetch_all({"hf:a/b@1/data.json": None, "hf:datasets/a/b@1/data.json": None})
    assert [path.read_bytes() for path in paths.values()] == [b"[1]", b"[2]"]
    with pytest.raises(InputError, match=r"404.*\n.*\n  by hand"):
        fetcher.fetch("hf:datasets/a/b@1/" + quote("other.json"))


def test_a_shard_whose_bits_flip_in_the_cache_is_fetched_again_alone(
    publish: Callable[[dict[str, bytes]], None], server: Server, fetcher: Fetcher
) -> None:
    publish(SHARDED)
    path = fetcher.fetch(SOURCE)
    flip(path / SHARDS[0])
    with pytest.raises(
        InputError, match=f"{SHARDS[0]} is damaged: its bytes have changed on the disk, and offline=true"
    ):
        Fetcher(fetcher.cache_dir, offline=True).fetch(SOURCE)
    fetcher.fetch(SOURCE)
    assert (path / SHARDS[0]).read_bytes() == WEIGHTS


def test_a_record_of_names_leads_to_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.json"
    folder.mkdir()
    for file in (outside, folder / "config.json"):
        file.write_text("{}")
    for names, whole in (("config.json", True), ("../outside.json", False), (str(outside), False)):
        repository.mark_complete(folder, [names])
        assert repository.is_complete(folder) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.complete", "outside.json"]
