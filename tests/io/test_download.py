"""Downloads from a server that misbehaves: the right bytes in place, or a clear error and nothing."""

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.io import network
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError
from tests.io.server import (
    BODY,
    ETAG,
    HALF,
    SHA256,
    Server,
    chunked,
    chunked_and_truncated,
    error_404,
    error_416,
    error_416_of_a_shorter_file,
    error_429,
    error_500,
    good,
    gzipped,
    gzipped_and_truncated,
    hang_up,
    ignores_if_range,
    ignores_range,
    ignores_range_and_truncates,
    leftovers,
    page_200,
    page_as_data,
    place,
    range_of_unknown_total,
    range_without_its_place,
    reset,
    serving,
    stall,
    stall_before_answering,
    too_many_bytes,
    truncate,
    truncate_a_little_later,
    truncate_without_etag,
    without_etag,
    without_length,
    without_length_and_truncated,
    wrong_bytes,
    wrong_range,
)


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["sha256", "no sha256"])
@pytest.mark.parametrize(
    ("faults", "n_requests"),
    [
        ([], 1),
        ([without_etag], 1),
        ([truncate], 2),
        ([truncate_without_etag], 2),
        ([reset], 2),
        ([hang_up], 2),
        ([error_500], 2),
        ([error_429, error_500], 3),
        ([truncate, truncate, ignores_range], 3),
        ([ignores_range_and_truncates, ignores_range], 2),
        ([truncate, wrong_range], 3),
        ([truncate, range_without_its_place], 3),
        ([truncate, range_of_unknown_total], 3),
        ([range_of_unknown_total], 2),
        ([truncate, error_416], 3),
        ([truncate, error_416_of_a_shorter_file], 3),
        ([truncate, ignores_if_range], 3),
        ([truncate_a_little_later] * 4, 5),  # more failures than retries, but each goes further
        ([gzipped], 1),
        ([gzipped_and_truncated], 2),
        ([chunked], 1),
        ([chunked_and_truncated], 2),
    ],
    ids=lambda value: "+".join(fault.__name__ for fault in value) or "good" if isinstance(value, list) else "",
)
def test_ends_with_the_right_file(
    server: Server, fetcher: Fetcher, faults: list, n_requests: int, sha256: str | None
) -> None:
    server.faults = list(faults)
    path = fetcher.fetch(f"{server.url}/model.bin", sha256=sha256)
    assert path == place(server, fetcher)
    assert path.read_bytes() == BODY
    assert len(server.requests) == n_requests
    assert leftovers(path) == set()
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)


@pytest.mark.parametrize("fault", [stall, stall_before_answering])
def test_a_stalled_download_goes_on(server: Server, fetcher: Fetcher, impatient: None, fault: Callable) -> None:
    server.faults = [fault]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY


def test_a_resume_asks_for_the_rest_of_the_same_version(server: Server, fetcher: Fetcher) -> None:
    server.faults = [truncate]
    fetcher.fetch(f"{server.url}/model.bin")
    (_, first), (_, second) = server.requests
    assert "Range" not in first
    assert (second["Range"], second["If-Range"]) == (f"bytes={HALF}-", ETAG)


def test_a_changed_file_is_fetched_anew(server: Server, fetcher: Fetcher) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag='"version-0"')]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert server.requests[1][1]["If-Range"] == '"version-0"'


def test_a_splice_of_two_versions_is_noticed_by_its_hash(server: Server, fetcher: Fetcher) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF)]  # no ETag: resumed on trust in sha256
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY
    assert [headers.get("Range") for _, headers in server.requests] == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize("etag", ['W/"weak"', "", None])
def test_nothing_is_resumed_without_a_strong_etag_or_sha256(server: Server, fetcher: Fetcher, etag: str | None) -> None:
    server.faults = [lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag=etag)]
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert "Range" not in server.requests[1][1]


def test_a_compressed_answer_is_not_continued(server: Server, fetcher: Fetcher) -> None:
    server.faults = [gzipped_and_truncated]  # its ETag and bytes are those of the compressed form
    assert fetcher.fetch(f"{server.url}/model.bin").read_bytes() == BODY
    assert "Range" not in server.requests[1][1]


def test_the_part_of_another_mirror_is_not_continued(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "RETRIES", 0)
    source = "https://example.org/model.bin"
    server.default = lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag=ETAG)
    first = Fetcher(fetcher.cache_dir, mirror=f"{server.url}/one")
    with pytest.raises(DownloadError):
        first.fetch(source)
    server.default = good
    second = Fetcher(fetcher.cache_dir, mirror=f"{server.url}/two/")
    assert second.fetch(source).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/one/example.org/model.bin", "/two/example.org/model.bin"]


def test_an_unfinished_download_keeps_no_password(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "RETRIES", 0)
    server.default = lambda h: h.answer(200, bytes(len(BODY)), send=HALF, ETag=ETAG)
    with pytest.raises(DownloadError) as raised:
        fetcher.fetch(f"{server.url.replace('://', '://me:hidden@')}/model.bin?token=hidden")
    kept = [path for path in Path(str(fetcher.cache_dir)).rglob("*") if path.is_file()]
    assert any(path.name.endswith(".part.etag") and path.read_text().startswith(ETAG) for path in kept)
    assert b"hidden" not in b"".join(path.read_bytes() + str(path).encode() for path in kept)
    assert "hidden" not in str(raised.value)


def test_a_finished_part_is_only_verified(server: Server, fetcher: Fetcher) -> None:
    path = place(server, fetcher)
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(BODY)  # killed between the last byte and the move
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY
    assert [headers["Range"] for _, headers in server.requests] == [f"bytes={len(BODY)}-"]


def test_a_finished_part_with_wrong_bytes_is_dropped(server: Server, fetcher: Fetcher) -> None:
    path = place(server, fetcher)
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(bytes(len(BODY)))
    assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256).read_bytes() == BODY


@pytest.mark.parametrize("fault", [without_length, without_length_and_truncated])
def test_without_a_length_only_the_hash_tells_that_a_file_is_whole(
    server: Server, fetcher: Fetcher, fault: Callable
) -> None:
    server.default = fault
    with pytest.raises(InputError, match="states no length"):
        fetcher.fetch(f"{server.url}/model.bin")
    assert not place(server, fetcher).exists()
    server.default, server.faults = without_length, [fault]
    with contextlib.suppress(InputError):  # the truncated one has another hash
        fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256)
    assert place(server, fetcher).exists() == (fault is without_length)


@pytest.mark.parametrize(
    ("fault", "error", "says", "n_requests"),
    [
        (error_404, InputError, "404.*check the spelling", 1),
        (error_416, InputError, "416", 1),
        (lambda h: h.answer(401), InputError, "401.*HF_TOKEN", 1),
        (lambda h: h.answer(403), InputError, "403.*HF_TOKEN", 1),
        (lambda h: h.answer(204, Content_Length=None), InputError, "204", 1),
        (lambda h: h.answer(302, Location="/model.bin"), DownloadError, "redirects", 31),
        (lambda h: h.answer(302, Location="ftp://nowhere/model.bin"), DownloadError, "ftp", 1),
        (page_200, DownloadError, "a web page", 1),
        (page_as_data, DownloadError, "a web page", 1),
        (error_500, DownloadError, "HTTP 500", 3),
        (error_429, DownloadError, "HTTP 429", 3),
        (hang_up, DownloadError, "closed connection", 3),
        (reset, DownloadError, "", None),
        (ignores_range_and_truncates, DownloadError, "IncompleteRead", 3),
        (gzipped_and_truncated, DownloadError, "IncompleteRead", 3),
    ],
)
def test_ends_with_an_error_that_says_where_and_what_to_do(
    server: Server, fetcher: Fetcher, fault: Callable, error: type, says: str, n_requests: int | None
) -> None:
    server.default = fault
    with pytest.raises(error, match=f"(?s)model.bin.*{says}.*from: {server.url}/model.bin.*by hand") as raised:
        fetcher.fetch(f"{server.url}/model.bin")
    assert str(place(server, fetcher)) in str(raised.value)
    assert not place(server, fetcher).exists()
    assert n_requests in (None, len(server.requests))


def test_a_server_that_always_stalls(server: Server, fetcher: Fetcher, impatient: None) -> None:
    server.default = stall_before_answering
    with pytest.raises(DownloadError, match="timed out"):
        fetcher.fetch(f"{server.url}/model.bin")
    assert len(server.requests) == 3
    assert not place(server, fetcher).exists()


@pytest.mark.parametrize("fault", [wrong_bytes, too_many_bytes, gzipped_and_truncated])
def test_other_bytes_than_asked_for(server: Server, fetcher: Fetcher, fault: Callable) -> None:
    server.default = fault
    with pytest.raises((InputError, DownloadError), match=r"model.bin"):
        fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256)
    assert not place(server, fetcher).exists()
    assert not place(server, fetcher, "model.bin.part").exists() or fault is gzipped_and_truncated


def test_wrong_hash_names_both(server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=f"sha256 is {SHA256} instead of {'0' * 64}"):
        fetcher.fetch(f"{server.url}/model.bin", sha256="0" * 64)
    assert len(server.requests) == 1
    assert not place(server, fetcher).exists()


FAULTS = [truncate, truncate_a_little_later, truncate_without_etag, without_etag, reset, hang_up, error_500, error_429]
FAULTS += [error_404, error_416, error_416_of_a_shorter_file, ignores_range, ignores_range_and_truncates, wrong_range]
FAULTS += [
    range_without_its_place,
    range_of_unknown_total,
    ignores_if_range,
    page_200,
    page_as_data,
    gzipped,
    gzipped_and_truncated,
    chunked,
]
FAULTS += [chunked_and_truncated, without_length, without_length_and_truncated]


@settings(max_examples=60, deadline=None)
@given(faults=st.lists(st.sampled_from(FAULTS), max_size=7), with_sha256=st.booleans())
def test_any_sequence_of_faults(faults: list, with_sha256: bool) -> None:
    with serving() as server, tempfile.TemporaryDirectory() as folder:
        server.faults = list(faults)
        fetcher = Fetcher(Path(folder))
        path = place(server, fetcher)
        with contextlib.suppress(InputError, DownloadError):
            assert fetcher.fetch(f"{server.url}/model.bin", sha256=SHA256 if with_sha256 else None) == path
            assert path.exists()
        assert not path.exists() or path.read_bytes() == BODY


def test_progress_starts_at_the_resumed_byte(
    server: Server, fetcher: Fetcher, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = [truncate, error_404]
    with pytest.raises(InputError, match="404"):
        fetcher.fetch(f"{server.url}/model.bin")
    capfd.readouterr()
    fetcher.fetch(f"{server.url}/model.bin")
    err = capfd.readouterr().err
    assert re.match(r"\rmodel.bin:  44%.*131k/300k", err)
    assert re.search(r"model.bin: 100%.*300k/300k \[.*B/s\]\n$", err)


def test_one_bar_counts_the_bytes_of_all_files_once(
    server: Server, fetcher: Fetcher, capfd: pytest.CaptureFixture[str]
) -> None:
    server.head = good
    server.faults = [truncate, wrong_range, good, truncate_a_little_later, reset]
    fetcher.fetch_all({f"{server.url}/{name}.bin": None for name in "abc"})
    err = capfd.readouterr().err
    assert re.match(r"\ra.bin:   0%.*0.00/900k", err)  # 3 * 300,001 bytes
    assert re.search(r"c.bin: 100%.*900k/900k \[.*B/s\]\n$", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("linked_sha256", "configured", "error"),
    [
        (SHA256, None, None),
        (SHA256, SHA256, None),
        ("0" * 64, None, DownloadError),
        ("0" * 64, SHA256, InputError),
    ],
)
def test_what_the_hub_states_is_checked(
    server: Server,
    fetcher: Fetcher,
    monkeypatch: pytest.MonkeyPatch,
    linked_sha256: str,
    configured: str | None,
    error: type | None,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with serving() as store:
        server.default = lambda h: h.answer(302, Location=f"{store.url}/blob", X_Linked_ETag=f'"{linked_sha256}"')
        with pytest.raises(error, match=r"model.bin") if error else contextlib.nullcontext():
            fetcher.fetch("hf:a/b@1/model.bin", sha256=configured)
    path = fetcher.cache_dir / "hf/a/b/1/model.bin"
    assert path.exists() == (error is None)
    assert not path.exists() or path.read_bytes() == BODY
