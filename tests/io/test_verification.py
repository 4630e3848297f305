"""An error page is never taken for data."""

import gzip
import re
import struct

import pytest

from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import DownloadError
from tests.io.server import PAGE, Server, place


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("data.json", b'[{"instruction": "x"}]', b"Not found"),
        ("data.json", b"{}", b'[{"instruction": "x"'),
        ("data.jsonl", b'{"instruction": "x"}\n', PAGE),
        ("m.gguf", b"GGUF\x03\0\0\0", b"Not found"),
        ("m.safetensors", struct.pack("<Q", 2) + b"{}", b"{'error': 'gone', 'code': 17}"),
        ("m.safetensors", struct.pack("<Q", 8) + b"{}      ", struct.pack("<Q", 99) + b"{}"),
        ("lines.json", b'{"instruction": "x"}\n{"instruction": "y"}\n', b"['x']\n['y']\n"),
        ("data.json", gzip.compress(b"[]", mtime=0), b"\x1f"),
        ("data.json.gz", gzip.compress(b"[]", mtime=0), b"Not found"),
        ("data.parquet", b"PAR1....PAR1", b"Not found"),
        ("data.parquet", b"PAR1....PAR1", b"PAR1....PAR"),
        ("data.csv", b"instruction,output\nx,y\n", b"\r\n<html lang=en>"),
        ("page.html", PAGE, None),
    ],
)
def test_a_file_of_unknown_hash_must_be_of_its_kind(
    server: Server, fetcher: Fetcher, name: str, right: bytes, wrong: bytes | None
) -> None:
    server.default = lambda h: h.answer(200, wrong)
    if wrong is not None:
        with pytest.raises(DownloadError, match=re.escape(name)):
            fetcher.fetch(f"{server.url}/{name}")
        assert not place(server, fetcher, name).exists()
    server.default = lambda h: h.answer(200, right, Content_Type="text/html" if name == "page.html" else "text/plain")
    assert fetcher.fetch(f"{server.url}/{name}").read_bytes() == right
