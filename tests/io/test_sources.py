"""The forms of a source, and its place in the cache."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.sources import Remote, parse_source
from tests.io.server import Server


@pytest.mark.parametrize(
    ("source", "url", "place"),
    [
        (
            "hf:openai-community/gpt2@607a/model.safetensors",
            "openai-community/gpt2/resolve/607a/model.safetensors",
            "hf/openai-community/gpt2/607a/model.safetensors",
        ),
        ("hf:a/b/sub/c.json", "a/b/resolve/main/sub/c.json", "hf/a/b/main/sub/c.json"),
        ("hf:a/b@refs/pr/3/c d.json", "a/b/resolve/refs%2Fpr%2F3/c%20d.json", "hf/a/b/refs%2Fpr%2F3/c%20d.json"),
        ("hf:datasets/a/b@1/c/d.json", "datasets/a/b/resolve/1/c/d.json", "hf/datasets/a/b/1/c/d.json"),
        ("hf:datasets/a/b/d.json", "datasets/a/b/resolve/main/d.json", "hf/datasets/a/b/main/d.json"),
        (
            "hf:datasets/a/b@refs/convert/parquet/d/0.json",
            "datasets/a/b/resolve/refs%2Fconvert%2Fparquet/d/0.json",
            "hf/datasets/a/b/refs%2Fconvert%2Fparquet/d/0.json",
        ),
    ],
)
def test_hub_sources(
    server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, source: str, url: str, place: str
) -> None:
    default = parse_source(source)
    assert isinstance(default, Remote)
    assert default.origin == f"https://huggingface.co/{url}"
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    server.default = lambda h: h.answer(200, b"\2\0\0\0\0\0\0\0{}" if h.path.endswith("safetensors") else b"[]")
    assert fetcher.fetch(source) == fetcher.cache_dir / place
    assert [path for path, _ in server.requests] == [f"/{url}"]


@pytest.mark.parametrize(
    "source",
    [
        "", "hf:", "hf:gpt2", "hf:gpt2/model.bin", "hf:a/b", "hf:a/b@", "hf:a/b@/c", "hf:a/b@1/", "hf:a/b@1/../c", "hf:../..@1/c",
        "hf:a/b@../c", "hf:a/b@1//c", "hf:datasets/b@1/c", "hf:datasets/b@1", "hf:datasets/a/b@1", "hf:datasets/a/b",
         "hf:a/b@1/c\\d", "hf:a/b@1/c\0", "pypi:a/b", "pypi:a==1", "pypi:a==1/",
        "pypi:a==1/../b", "pypi:-r==1/b", "pypi:a==1 --pre/b", "pypi:a>=1/b", "https://", "https://h", "https://h/",
        "https://h/a/../b", "https://h:port/a", "https:///a", "https:/h/a", "http://[::1/a", "ftp://h/a", "s3://h/a",
    ],
)  # fmt: skip
def test_malformed_sources_show_the_accepted_forms(source: str, fetcher: Fetcher) -> None:
    with pytest.raises(InputError, match=r"(?s)source .*A source is one of.*hf:<owner>/<repo>@<revision>/<file>"):
        fetcher.fetch(source)


def test_endpoint_that_is_no_url(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    with pytest.raises(InputError, match=r"HF_ENDPOINT='hub.example.org'"):
        fetcher.fetch("hf:a/b@1/c")


names = st.text(st.sampled_from("ab.%/\\:~ é\0") | st.characters(), min_size=1, max_size=12)
remote_names = st.builds("hf:o/r@1/{}".format, names) | st.builds("pypi:a==1/{}".format, names)
remote_names |= st.builds("http://h/{}".format, names)
SUFFIXES = ["x", "x.part", "x.part.etag", "x.lock", "x.sha256", "x.complete", "x.part%", "X.part"]


@given(remote_names | st.sampled_from(SUFFIXES).map("hf:o/r@1/{}".format))
def test_a_cache_path_never_leaves_the_cache(source: str) -> None:
    try:
        remote = parse_source(source)
    except InputError:
        return
    assert isinstance(remote, Remote)
    assert all(part not in ("", ".", "..") and not set(part) & set('/\\:*?"<>|\0') for part in remote.parts)


@given(
    st.lists(names | st.sampled_from(SUFFIXES), min_size=2, max_size=2, unique=True),
    st.sampled_from(["hf:o/r@1", "pypi:a==1"]),
)
def test_different_files_have_different_places(files: list[str], prefix: str) -> None:
    def places(file: str) -> set[str]:
        parsed = parse_source(f"{prefix}/{file}")
        assert isinstance(parsed, Remote)
        path = "/".join(parsed.parts)
        return {path, f"{path}.part", f"{path}.part.etag", f"{path}.lock", f"{path}.sha256"}

    with contextlib.suppress(InputError):
        assert not places(files[0]) & places(files[1])
