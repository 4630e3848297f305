"""Hostile values, and valid files made hostile: bytes flipped, cut and spliced, fields swapped and replaced."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CONTROLS = ("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r\x1b[2K", "\x00", "\x9b2J", "\u202egnp.exe", "\ud800", "\x7f")
PATHS = ("../x", "/etc/passwd", "..\\x", "C:\\x", "a/../../x", "~/x", "x\x00y", ".", "..", "", "a" * 5000, "\ud800/x")
MAGIC = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def nested(depth: int, kind: str = "list") -> Any:
    """A value inside lists or objects inside one another."""
    value: Any = "x"
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def hostile(random: Random) -> Any:
    """A value that a file of JSON may hold and nobody expects."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: random.choice((None, True, False, float("nan"), float("inf"), -float("inf"), -0.0, 1e308, 5e-324)),
        lambda: random.choice(MAGIC) * random.choice((1, -1)),
        lambda: 10 ** random.choice((20, 400, 4000)),
        lambda: random.choice((*CONTROLS, *PATHS)),
        lambda: random.choice(([], {}, [[]], [{}], [None], {"": None}, "", " ", "\n")),
        lambda: nested(random.choice((3, 50, 400)), random.choice(("list", "object"))),
        lambda: random.choice("xé🙏\u2028") * random.choice((100, 10_000, 100_000)),
        lambda: [random.choice((1, "x", None, {}))] * random.choice((2, 1000)),
        lambda: random.choice(("${oc.env:HOME}", "{{ 1 }}", "{% for %}", "!!python/object:os.system", "*a", "&a [*a]")),
    )
    return random.choice(makers)()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate_value(random: Random, value: Any, times: int = 1) -> Any:
    """A copy of a JSON value in which some values are replaced, swapped, renamed, repeated or taken away."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        paths = list(places(value))
        if not paths:
            return hostile(random)
        path, other = random.choice(paths), random.choice(paths)
        try:
            parent, key = inside(value, path[:-1]), path[-1]
            what = random.randrange(6)
            if what < 3:
                parent[key] = hostile(random)
            elif what == 3:
                parent[key] = json.loads(json.dumps(inside(value, other)))
            elif what == 4:
                del parent[key]
            elif isinstance(parent, dict):
                parent[str(hostile(random))[:6000]] = parent.pop(key)
            else:
                parent.insert(0, parent[key])
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return value


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def mutate_bytes(random: Random, content: bytes, times: int | None = None) -> bytes:
    """A copy of a file's bytes with bits flipped, parts cut, repeated or replaced by large numbers or by noise."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if times is None else times):
        if not data:
            return random.randbytes(random.randrange(64))
        # headers stand at the beginning or the end
        at = random.choice((random.randrange(len(data)), random.randrange(min(64, len(data))), len(data) - 1))
        what, length = random.randrange(7), random.choice((1, 2, 8, 100, len(data) // 2))
        if what == 0:
            data[at] ^= 1 << random.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            del data[at : at + length]
        elif what == 3:
            data[at:at] = data[at : at + length] * random.choice((1, 3))
        elif what == 4:
            width = random.choice((1, 2, 4, 8))
            data[at : at + width] = (random.choice(MAGIC) % 256**width).to_bytes(
                width, random.choice(("little", "big"))
            )
        elif what == 5:
            data[at : at + length] = random.randbytes(length)
        else:
            data[at:at] = random.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"[" * 1000, b"\x1b[2J", b"\n"))
    return bytes(data)


def dump(random: Random, value: Any) -> bytes:
    """JSON text of a value; now and then with keys twice, in another encoding, or nested too deeply for any reader."""
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.5, indent=random.choice((None, None, 1)))
    except RecursionError:
        text = "[" * 5000
    if random.random() < 0.05:
        text = text.replace("{", '{"a": 1, "a": 2, ', random.choice((1, 1000)))
    if random.random() < 0.02:
        deep = random.choice((1000, 100_000))
        text = random.choice(("[" * deep, '{"a":' * deep, "[" * deep + "]" * deep))
    encoding = random.choice(("utf-8",) * 20 + ("utf-8-sig", "utf-16", "utf-32", "latin-1"))
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def grown(strategy: st.SearchStrategy[Any], random: Random) -> Any:
    """A value of a hypothesis strategy, the same for the same state of `random`; None where it found none."""
    found: list[Any] = []

    @settings(database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
    @given(strategy)
    def take(value: Any) -> None:
        found.append(value)

    drawn = random.randbytes(random.choice((64, 512, 4096)))
    take.hypothesis.fuzz_one_input(drawn)  # type: ignore[attr-defined]
    return found[0] if found else None
