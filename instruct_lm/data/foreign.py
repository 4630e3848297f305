"""What a data file is that cannot be read as it is, and a command that converts it."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from instruct_lm.errors import InputError, listing

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


class Foreign(NamedTuple):
    """A kind of file that is not read.

    Attributes:
        name: What it is.
        command: Reads the file from its standard input, or at `{path}`, and writes the converted one to its standard
            output; empty where `name` says all there is to say.
        suffix: Of the converted file; empty: that of the file; None: the command names its own output.
    """

    name: str
    command: str = ""
    suffix: str | None = ".json"


def python_command(code: str) -> str:
    """The command that runs code."""
    return f"python -c {shlex.quote(code)}"


_READ = 'sys.stdin.buffer.read().decode("utf-8-sig")'
# Python's literals, and nan, which is no literal, as null.
_PARSE = (
    "import ast, json, sys; Nan = type('Nan', (ast.NodeTransformer,), "
    "{'visit_Name': lambda self, n: ast.Constant(None) if n.id == 'nan' else n}); "
    "parse = lambda text: ast.literal_eval(Nan().visit(ast.parse(text.strip(), mode='eval'))); "
).replace("'", '"')
PYTHON_LIST = Foreign(
    "a Python list, not JSON",
    python_command(f"{_PARSE}json.dump(parse({_READ}), sys.stdout)"),
)
PYTHON_LINES = Foreign(
    "Python dicts, one a line, not JSON",
    python_command(f"{_PARSE}json.dump([parse(line) for line in {_READ}.split(chr(10)) if line.strip()], sys.stdout)"),
)
# Strings are matched first and kept as they are; \x22 is the double quote.
_STRIP = f"import re, sys; t = {_READ}; " + r's = r"(\x22(?:[^\x22\\]|\\.)*\x22)"; '
_STRIP += r't = re.sub(s + r"|//.*|#.*|/\*[\s\S]*?\*/", r"\1", t); '
_STRIP += r't = re.sub(s + r"|,(?=\s*[\]}])", r"\1", t); sys.stdout.buffer.write(t.encode())'
TRAILING_COMMA = Foreign("JSON with a comma before a closing bracket", python_command(_STRIP))
COMMA_LINES = Foreign(
    "JSON objects with commas between them and no brackets around them",
    python_command(f'import sys; t = {_READ}; sys.stdout.buffer.write(("[" + t.strip().rstrip(",") + "]").encode())'),
)
COMMENTS = Foreign("JSON with comments", python_command(_STRIP))
NOT_UTF8 = Foreign(
    "not UTF-8 text. If it is Latin-1 (Windows-1252), convert it; if not, name its encoding after -f, "
    "such as GB18030 (Chinese), SHIFT_JIS (Japanese) or WINDOWS-1251 (Russian)",
    "iconv -f WINDOWS-1252 -t UTF-8",
    "",
)

_SQLITE = (
    "import json, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.row_factory = sqlite3.Row; "
    'table = c.execute("select name from sqlite_master where type = ?", ("table",)).fetchone()[0]; '
    'json.dump([dict(row) for row in c.execute(f"select * from [{table}]")], sys.stdout)'
)
_PICKLE = (
    "import json, pickle, sys; data = pickle.load(sys.stdin.buffer); "
    'data = data.to_dict("records") if hasattr(data, "to_dict") else list(data); json.dump(data, sys.stdout)'
)
_EXCEL = (
    "import io, sys, pandas; file = io.BytesIO(sys.stdin.buffer.read()); "
    "pandas.read_excel(file).to_csv(sys.stdout, index=False)"
)
_ARROW = "import sys, pyarrow.ipc as ipc, pyarrow.parquet as parquet; "
_ARROW += "parquet.write_table(ipc.open_{}(sys.stdin.buffer.read()).read_all(), sys.stdout.buffer)"
_HTML = (
    "an HTML page, not data: give the address of the file itself "
    "(on GitHub the one behind Raw, on the hub with /resolve/ in place of /blob/)"
)
_YAML = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout)"

# The first bytes of a file, in the order in which they are tried.
_KINDS: tuple[tuple[str, Foreign], ...] = (
    (
        r"PK\x03\x04[\s\S]*xl/",
        Foreign("an Excel workbook (pip install pandas openpyxl)", python_command(_EXCEL), ".csv"),
    ),
    (
        r"PK\x03\x04[\s\S]*data\.pkl",
        Foreign("a file of PyTorch, in which a pickle can run any code. Write its data as JSON where you trust it"),
    ),
    (r"PK\x03\x04", Foreign("a zip archive. Give the file inside", "python -m zipfile -e {path} .", None)),
    (r"[\s\S]{257}ustar", Foreign("a tar archive. Give the file inside", "tar -xf {path}", None)),
    (
        r"SQLite format 3\0",
        Foreign("an SQLite database. The command takes its first table", python_command(_SQLITE) + " {path}"),
    ),
    (r"\x80[\x02-\x05]", Foreign("a Python pickle: opening it can run any code", python_command(_PICKLE))),
    (
        r"\x93NUMPY",
        Foreign("an array of NumPy, in which a pickle can run any code. Write its data as JSON where you trust it"),
    ),
    (r"ARROW1", Foreign("an Arrow file", python_command(_ARROW.format("file")), ".parquet")),
    (r"\xff\xff\xff\xff", Foreign("an Arrow stream", python_command(_ARROW.format("stream")), ".parquet")),
    (r"BZh", Foreign("compressed by bzip2", "bunzip2", "")),
    (r"\xfd7zXZ\0", Foreign("compressed by xz", "unxz", "")),
    (r"\x28\xb5\x2f\xfd", Foreign("compressed by zstd", "zstd -d", "")),
    (r"%PDF|\x89PNG|\xff\xd8\xff|GGUF|\x7fELF", Foreign("a PDF, an image, a model or a program, not data")),
    (r"version https://git-lfs", Foreign("a Git LFS pointer, not the data: run git lfs pull in its repository")),
    (r"\s*<(?i:!doctype|html)", Foreign(_HTML)),
    (r"\s*<[?\w]", Foreign("XML or HTML, not JSON, CSV or Parquet")),
    (r"(?:---\s+)?- +[\w\"']+ *:", Foreign("YAML", python_command(_YAML))),
    (r"(?:[\s\S]\0){8}", Foreign("UTF-16 text without a byte-order mark", "iconv -f UTF-16LE -t UTF-8", "")),
    (r"(?:\0[\s\S]){8}", Foreign("UTF-16 text without a byte-order mark", "iconv -f UTF-16BE -t UTF-8", "")),
)


def kind_of(head: bytes) -> Foreign | None:
    """The kind of a file that is not read, by its first bytes; None if they may be data."""
    text = head.decode("latin-1").removeprefix("ï»¿")
    return next((kind for pattern, kind in _KINDS if re.match(pattern, text)), None)


def kind_of_fault(text: str, at: int, listed: bool) -> Foreign | None:
    """The kind of a text that is almost JSON, by what stands where the decoder stopped, in a list or not."""
    rest, before = text[at : at + 200], text[max(at - 200, 0) : at].rstrip()
    if re.match(r"//|/\*|#", rest) and re.search(r"[\[{]", text):
        return COMMENTS
    if re.match(r",\s*[\]}]", rest) or (before.endswith(",") and re.match(r"\s*[\]}]", rest)):
        return TRAILING_COMMA
    if rest.startswith(",") and before.endswith("}"):  # inside an object a comma is expected there
        return COMMA_LINES
    if re.match(r"'|(None|True|False|nan)\b", rest):
        return PYTHON_LIST if listed else PYTHON_LINES
    return None


def keys_in(text: str) -> list[str]:
    """What looks like the keys of objects in a text, each once, in order."""
    found = re.findall(r"""(?<=[{,\s])["']([^"'\n\\]{1,40})["']\s*:""", text[:100_000])
    return list(dict.fromkeys(found))


def refusal(path: Path, kind: Foreign, place: str = "", encoding: str = "utf-8", text: str = "") -> InputError:
    """The error that says what a file is, which keys it has, and how to convert it.

    Args:
        path: The file.
        kind: What it is.
        place: Where in it that shows, such as ", line 3, column 5".
        encoding: The text's encoding.
        text: The beginning of its text, for its keys; empty: they are not named.
    """
    message = f"{path}{place}: this is {kind.name}"
    if keys := keys_in(text):
        message += f"; its keys: {', '.join(listing(keys))}"
    if not kind.command:
        return InputError(f"{message}.")
    with path.open("rb") as file:
        gzipped = file.read(2) == GZIP
    at, name = shlex.quote(str(path)), path.name.removesuffix(".gz") if gzipped else path.name
    if "{path}" in kind.command and gzipped:
        return InputError(f"{message}, compressed. Unpack it: gunzip -c {at} > {shlex.quote(name)}")
    steps = [f"iconv -f {encoding.upper()} -t UTF-8"] if encoding not in ("utf-8", "utf-8-sig") else []
    steps.append(kind.command.replace("{path}", at))
    if gzipped:
        steps.insert(0, f"gunzip -c {at}")
    elif "{path}" not in kind.command:
        steps[0] += f" < {at}"
    if kind.suffix is not None:
        steps[-1] += f" > {shlex.quote(f'{Path(name).stem}.converted{kind.suffix or Path(name).suffix}')}"
    return InputError(f"{message}. Convert it: {' | '.join(steps)}")
