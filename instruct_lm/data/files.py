"""From a data file to its records: JSON, JSON lines, CSV, TSV and Parquet, each also compressed by gzip.

The content decides what a file is, and only where it leaves that open its name. All formats are read as a stream: JSON
value by value, CSV row by row, Parquet by batches of rows.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from instruct_lm.data.foreign import GZIP, NOT_UTF8, PARQUET, TRAILING_COMMA, kind_of, kind_of_fault, refusal
from instruct_lm.errors import InputError, listing

_HEAD = 1 << 16  # bytes that say what a file is
_CHUNK = 1 << 20  # characters of JSON read at a time
_ROWS = 256  # of Parquet read at a time
_TOKEN = 16  # characters: longer than any JSON token but a string
_LONGEST = 1 << 28  # characters of a JSON value or a cell of CSV: a quote that is never closed must not take all memory
_BOMB, _BOMB_RATIO = 1 << 20, 200  # bytes unpacked, and their number for each packed one; text has 3 to 20
_NOT_SPACE = re.compile(r"[^ \t\n\r]")  # JSON's whitespace, which is not Unicode's
_REMEDIES = {  # by the decoder's words
    "Invalid \\escape": "a backslash in a text is written \\\\",
    "Invalid control character at": r"a line end or tab in a text is written \n or \t, or a quote is not closed",
}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the records of a data file, one by one.

    Text is UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one. The cells of CSV are texts.

    Args:
        path: A JSON list, or JSON values one after the other (JSON lines); CSV or TSV with a header, whose separator is
            the one of ``,``, ``;``, ``|`` and tab that splits the header most; or Parquet. Each may be compressed.

    Yields:
        A record's place, `` (line n)`` in JSON lines and empty elsewhere, and the record, which may be any JSON value.

    Raises:
        InputError: The file cannot be read; the message says where and why, or what the file is and how to convert it.
    """
    try:
        with path.open("rb") as raw:
            gzipped = raw.peek(2)[:2] == GZIP
            stream = cast(BinaryIO, _Unpacked(raw, path) if gzipped else raw)
            head = stream.read(_HEAD)
            stream.seek(0)
            if read := next((read for mark, read in _BINARY.items() if head.startswith(mark)), None):
                yield from read(stream, path, gzipped)
                return
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
            if (kind := kind_of(head)) is not None:
                raise refusal(path, kind)
            # newline="": line ends inside CSV cells stay as they are
            with io.TextIOWrapper(stream, encoding, newline="") as text:
                try:
                    yield from _text_records(text, head.decode(encoding, "ignore"), path)
                except UnicodeError as error:
                    raise _not_text(path, stream, encoding) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: its gzip data is damaged ({error}): fetch or compress it again.") from error
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}.") from error


class _Unpacked(gzip.GzipFile):
    """What gzip has compressed, as long as it is no more than data can be compressed."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        super().__init__(fileobj=packed)
        self._packed, self._path = packed, path

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def _checked(self, chunk: bytes) -> bytes:
        if (size := self.tell()) > _BOMB and size > _BOMB_RATIO * self._packed.tell():
            sizes = f"{self._packed.tell()} bytes become more than {size}"
            raise InputError(f"{self._path}: {sizes}, as no data do but one record many times. Unpack it to use it.")
        return chunk


def _text_records(text: TextIO, head: str, path: Path) -> Iterator[tuple[str, Any]]:
    separator = _separator(head, path)
    return _JsonReader(text, path).records() if separator is None else _csv(text, separator, path)


def _not_text(path: Path, stream: BinaryIO, encoding: str) -> InputError:
    """The error that names the first byte that is no text."""
    decoder, size, line, chunk = codecs.getincrementaldecoder(encoding)(), 0, 1, b" "
    stream.seek(0)
    while chunk:
        chunk = stream.read(_CHUNK)
        size += len(chunk)
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            at = size - len(error.object) + error.start  # the object begins with bytes left over from the chunk before
            place = f", byte 0x{error.object[error.start]:02x} in position {at} (line {line})"
            if encoding.startswith("utf-8"):
                return refusal(path, NOT_UTF8, place)
            return InputError(f"{path}{place}: not {encoding.upper()} text. Save it as UTF-8.")
        line += chunk.count(b"\n")
    return InputError(f"{path}: not {encoding.upper()} text. Save it as UTF-8.")


def _separator(head: str, path: Path) -> str | None:
    """The separator of CSV, by its header; None if the text is JSON."""
    first = _NOT_SPACE.search(head)
    if first is None or first.group() in "[{":
        return None
    headers = {mark: _header(head, mark) for mark in ",;|\t"}
    separator = max(headers, key=lambda mark: len(headers[mark]))
    named = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    names = all(re.fullmatch(r"[\w .-]{0,64}", name) for name in headers[separator])
    return separator if named or (names and len(headers[separator]) > 1) else None


def _header(head: str, separator: str) -> list[str]:
    with contextlib.suppress(csv.Error):  # Python 3.10 refuses NUL
        return next(filter(None, csv.reader(io.StringIO(head, newline=""), delimiter=separator)), [])
    return []


def _csv(text: TextIO, separator: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dicts. In strict mode, for else a quote that is never closed swallows the rest of the file."""
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(text, delimiter=separator, strict=True)
    rows = filter(None, reader)  # blank lines are no rows
    try:
        header = [name.strip() or f"column {i}" for i, name in enumerate(next(rows, []), start=1)]
        _check_names(header, path)
        for row in rows:
            if len(row) != len(header):
                names = f"{len(header)} names in the header ({', '.join(listing(header))}), here {len(row)}"
                remedy = f"Write cells that hold {separator!r}, quotes or line ends in quotes."
                raise InputError(f"{path}, line {reader.line_num}: {names}. {remedy}")
            yield "", dict(zip(header, row, strict=True))
    except csv.Error as error:
        fault = f"{error}. A cell that holds quotes is written in quotes, with each of its own doubled"
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {fault}.") from error


def _check_names(names: list[str], path: Path) -> None:
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"{path}: more than one column is named {', '.join(listing(repeated))}. Rename or remove one.")


def _parquet(stream: BinaryIO, path: Path, gzipped: bool) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile  # here: most runs need none of it

    with tempfile.TemporaryFile() as unpacked:
        if gzipped:  # Parquet is read from its end
            shutil.copyfileobj(stream, unpacked)
        try:
            file = ParquetFile(unpacked if gzipped else path)
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches(_ROWS):
                yield from (("", row) for row in batch.to_pylist())
        except InputError:
            raise
        except Exception as error:  # Arrow raises a dozen kinds, and those of dates and time zones
            fault = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"{path}: its Parquet data is damaged ({fault}). Fetch or write it again.") from error


_BINARY = {PARQUET: _parquet}  # the first bytes of a format → its reader


class _JsonReader:
    """Reads one JSON value after the other; of a list, one element after the other."""

    def __init__(self, text: TextIO, path: Path) -> None:
        self.text, self.path = text, path
        self.decoder = json.JSONDecoder()
        self.buffer = self.head = text.read(_CHUNK)
        self.position = 0  # in the buffer: the next character to read
        self.line = 1  # of the position
        self.line_start = 0  # where that line begins in the buffer; negative if before it
        self.listed = False  # whether the position is inside a list of records

    def records(self) -> Iterator[tuple[str, Any]]:
        while character := self._next():
            if character == "[":
                self.listed = True
                yield from (("", value) for value in self._elements())
                self.listed = False
            else:
                yield f" (line {self.line})", self._value()

    def _elements(self) -> Iterator[Any]:
        """The elements of a list whose bracket is next."""
        self._move(self.position + 1)
        if self._next() == "]":
            self._move(self.position + 1)
            return
        while True:
            yield self._value()
            mark = self._next()
            if mark not in (",", "]"):
                raise self._fault("Expecting ',' delimiter", self.position)
            self._move(self.position + 1)
            if mark == "]":
                return
            if self._next() == "]":
                raise refusal(self.path, TRAILING_COMMA, self._place(self.position), self.text.encoding, self.head)

    def _next(self) -> str:
        """Move to the next character that is no whitespace, and return it; at the end of the file return ""."""
        while not (found := _NOT_SPACE.search(self.buffer, self.position)):
            self._move(len(self.buffer))
            if not self._read_on():
                return ""
        self._move(found.start())
        return found.group()

    def _value(self) -> Any:
        """The value that is next."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - _TOKEN or error.msg.startswith("Unterminated string")
                if not (cut and self._read_on()):
                    raise self._fault(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
                raise InputError(f"{self.path}, line {self.line}: {error}.") from error
            else:
                if end < len(self.buffer) or not self._read_on():  # else it may be the beginning of a number
                    self._move(end)
                    return value

    def _read_on(self) -> bool:
        """Drop what was read and read as much again as is left, at least a chunk; False at the end of the file."""
        if len(self.buffer) - self.position > _LONGEST:
            fault = f"a value is longer than {_LONGEST} characters, or a quote or bracket is never closed"
            raise InputError(f"{self.path}, line {self.line}: {fault}. Write a list of entries, or an entry a line.")
        chunk = self.text.read(max(_CHUNK, len(self.buffer) - self.position))
        if chunk:
            self.buffer = self.buffer[self.position :] + chunk
            self.line_start -= self.position
            self.position = 0
        return bool(chunk)

    def _move(self, position: int) -> None:
        if lines := self.buffer.count("\n", self.position, position):
            self.line += lines
            self.line_start = self.buffer.rindex("\n", self.position, position) + 1
        self.position = position

    def _place(self, at: int) -> str:
        start = self.position
        line = self.line + self.buffer.count("\n", start, at)
        line_start = self.line_start if line == self.line else self.buffer.rindex("\n", start, at) + 1
        return f", line {line}, column {at - line_start + 1}"

    def _fault(self, words: str, at: int) -> InputError:
        if kind := kind_of_fault(self.buffer, at, self.listed):
            return refusal(self.path, kind, self._place(at), self.text.encoding, self.head)
        words = _REMEDIES.get(words, words)
        if self.buffer is self.head and "{" not in self.head[:at]:
            words += ". The file is none of JSON, JSON lines, CSV, TSV and Parquet"
        return InputError(f"{self.path}{self._place(at)}: not JSON: {words}.")
