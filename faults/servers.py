"""Servers that lie: downloads and judges that cut, stall, redirect, answer with pages, control characters or nonsense.

The servers are those of the tests; here the commands meet them as a user's would.
"""

import gzip
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from faults.commands import Ended, call, must
from faults.compare import differences
from faults.kinds import Run, reference
from faults.options import Options
from faults.outcomes import Outcome
from instruct_lm.io.conf_files import CONF
from instruct_lm.io.run_files import SUMMARY
from tests.evaluation.judge_server import Exchange, JudgeServer, in_turn
from tests.io.server import PAGE, Handler, error_404, error_500, good, hang_up, serving

_ENTRIES = (CONF.parent / "instruct_lm" / "data" / "sample.json").read_bytes()
_HALF = len(_ENTRIES) // 2
_CONTROLS = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b1m\x00\x08"
_UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_honest = partial(good, body=_ENTRIES)
_cut = partial(good, body=_ENTRIES, send=_HALF)


def _dripping(h: Handler) -> None:
    """Twenty pieces over two seconds."""
    h.answer(200, _ENTRIES, send=0)
    for start in range(0, len(_ENTRIES), piece := len(_ENTRIES) // 20 + 1):
        h.wfile.write(_ENTRIES[start : start + piece])
        h.wfile.flush()
        time.sleep(0.1)


def _to(address: str) -> Callable[[Handler], None]:
    return lambda h: h.answer(302, Location=address)


DOWNLOADS: dict[str, tuple[list[Callable[[Handler], None]], Callable[[Handler], None], bool]] = {
    # What it does first, what it does from then on, and whether a client can get the file nevertheless.
    "cuts the body once": ([_cut], _honest, True),
    "cuts the body twice": ([_cut, _cut], _honest, True),
    "hangs up, then answers": ([hang_up], _honest, True),
    "fails twice with 500": ([error_500, error_500], _honest, True),
    "drips": ([], _dripping, True),
    "compresses without being asked": (
        [],
        lambda h: h.answer(200, gzip.compress(_ENTRIES), Content_Encoding="gzip"),
        True,
    ),
    "cuts each body at the same place": ([], lambda h: h.answer(200, _ENTRIES, send=_HALF), False),
    "promises a longer body": ([], lambda h: h.answer(200, _ENTRIES, Content_Length=str(len(_ENTRIES) + 9)), False),
    "promises a negative length": ([], lambda h: h.answer(200, _ENTRIES, Content_Length="-5"), False),
    "sends other entries": ([], lambda h: h.answer(200, _ENTRIES.replace(b"the", b"teh")), False),
    "sends a page": ([], lambda h: h.answer(200, b"\n" + PAGE, Content_Type="text/html"), False),
    "sends a page as JSON": ([], lambda h: h.answer(200, PAGE, Content_Type="application/json"), False),
    "says 404 with a page": ([], error_404, False),
    "says 500 for ever": ([], error_500, False),
    "sends control characters": ([], lambda h: h.answer(403, _CONTROLS.encode(), Content_Type="text/html"), False),
    "puts control characters into the status": ([], lambda h: _status(h, f"No {_CONTROLS}".replace("\x00", "")), False),
    "redirects to a file": ([], _to("file:///etc/passwd"), False),
    "redirects in a circle": ([], _to("/data.json"), False),
    "redirects to control characters": ([], _to("http://127.0.0.1:9/%1b[2J\x1b[2J"), False),
    "sends nothing": ([], lambda h: h.answer(200, b""), False),
}


def _status(h: Handler, reason: str) -> None:
    h.wfile.write(f"HTTP/1.1 403 {reason}\r\nContent-Length: 0\r\n\r\n".encode())


def _say(content: Any, **more: Any) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.answer(content, **more)


def _judge(exchange: Exchange) -> None:
    """The honest one: a score that depends on what it is asked."""
    exchange.answer(str(int(hashlib.sha256(exchange.question.encode()).hexdigest(), 16) % 101))


def _raw(body: bytes, status: int = 200, **headers: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.send(
        status, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )


JUDGES: dict[str, tuple[Callable[[Exchange], None], bool]] = {
    # What it does, and whether all scores can be had nevertheless.
    "cuts its first answer": (in_turn(Exchange.half, _judge), True),
    "resets the connection once": (in_turn(Exchange.reset, _judge), True),
    "fails twice with 503": (in_turn(_raw(b"busy", 503), _raw(b"busy", 503), _judge), True),
    "fails for ever": (_raw(b"{}", 500, Retry_After="0"), False),
    "stalls": (Exchange.stall, False),
    "answers with a page": (_raw(PAGE, Content_Type="text/html"), False),
    "answers with an empty body": (_raw(b""), False),
    "answers with another shape": (_raw(b'{"choices": [{"message": ["85"]}, null]}'), False),
    "answers with deep nesting": (_raw(b"[" * 100_000), False),
    "answers with bytes that are no text": (_raw(b"\xff\xfe\x00" * 100), False),
    "says no number": (_say("very good indeed"), False),
    "says null": (_say(None), False),
    "says an object": (_say({"score": 85}), False),
    "says NaN": (_say("NaN"), False),
    "says 1e999": (_say("1e999"), False),
    "says control characters": (_say(_CONTROLS), False),
    "refuses with control characters": (lambda exchange: exchange.error(400, _CONTROLS), False),
    "redirects to a file": (_raw(b"", 302, Location="file:///etc/passwd"), False),
    "says a megabyte": (_say("x" * 1_000_000), False),
}


def servers(options: Options) -> Iterator[Outcome]:
    """Each lie of a server with data, then each of a judge."""
    whole = reference("gpt2", options.work)
    with ThreadPoolExecutor(2 * options.jobs) as pool:  # they wait more than they work
        lies = [name for name in DOWNLOADS if options.wants(f"servers:download:{name}")]
        yield from pool.map(lambda name: _download(name, whole, options), lies)
    if not (judges := [name for name in JUDGES if options.wants(f"servers:judge:{name}")]):
        return
    shutil.rmtree(options.work / "judged", ignore_errors=True)
    run = Path(shutil.copytree(whole.folder, options.work / "judged"))
    must("evaluate.py", f"run={run}", f"cache_dir={whole.cache}", "offline=true", folder=options.work)
    answers = run / "evaluation" / "test" / "responses.json"
    with JudgeServer(_judge) as server:
        right = _scores(_judged(answers, run / "right", server.url), run / "right")
    with ThreadPoolExecutor(2 * options.jobs) as pool:
        yield from pool.map(lambda name: _judgement(name, answers, right), judges)


def _download(lie: str, whole: Run, options: Options) -> Outcome:
    """Train on data from a server that lies; the same command, given an honest server, must end as it should."""
    first, then, possible = DOWNLOADS[lie]
    number = list(DOWNLOADS).index(lie)
    with serving() as server:
        server.faults, server.default = list(first), then
        settings = ("data.sha256=" + hashlib.sha256(_ENTRIES).hexdigest(), f"data.source={server.url}/data.json")
        run = Run(whole.kind, options.work / f"served-{number}", options.work / f"served-cache-{number}", *settings)
        command = [item for item in run.first if item != "offline=true"]
        ended = call("train.py", *command, folder=options.work)
        seen = _wrong(ended, possible)
        if ended.status != 0:
            server.faults, server.default = [], _honest
            again = call("train.py", *command, folder=options.work)
            seen = seen or ("" if again.status == 0 else f"with an honest server {again}")
    unlike = differences(run.folder, whole.folder)
    return Outcome(
        "a download that lies", f"servers:download:{lie}", not seen, not unlike, seen or "; ".join(unlike[:3])
    )


def _wrong(ended: Ended, possible: bool) -> str:
    """What is wrong with how a command took a lie: it may succeed or refuse, without control characters."""
    if found := _UNSAFE.search(ended.said.replace("\r", "")):
        return f"writes {found[0]!r} to the terminal: {ended}".encode("ascii", "backslashreplace").decode()
    return (
        ""
        if (ended.status == 0 or ended.refused) and ended.is_clean and (ended.status == 0 or not possible)
        else str(ended)
    )


def _judged(answers: Path, folder: Path, url: str) -> Ended:
    settings = (f"judge.base_url={url}", "judge.api_key_env=null", "judge.timeout=2", f"output_dir={folder}")
    return call("evaluate.py", f"responses={answers}", "judge=openai", *settings, folder=folder.parent)


def _scores(ended: Ended, folder: Path) -> Any:
    """Entry → score; None where there is none."""
    if not (folder / "scores.jsonl").exists():
        return None
    scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if ended.status == 0 else None
    return {score["index"]: score.get("score") for score in scored}


def _judgement(lie: str, answers: Path, right: Any) -> Outcome:
    """Score answers by a judge that lies, and then by an honest one at the same address."""
    name, folder = f"servers:judge:{lie}", answers.parent / f"judged-{list(JUDGES).index(lie)}"
    behave, possible = JUDGES[lie]
    with JudgeServer(behave) as server:
        ended = _judged(answers, folder, server.url)
        seen = _wrong(ended, possible)
        if not seen and ended.status == 0 and possible and _scores(ended, folder) != right:
            seen = "other scores"
        server.behave = _judge
        again = _judged(answers, folder, server.url)
    if lie.startswith("says") and again.refused:  # a judge that answered has answered: its verdict is kept
        return Outcome("a judge that lies", name, not seen, None, seen)
    same = again.status == 0 and _scores(again, folder) == right
    return Outcome("a judge that lies", name, not seen, same, seen or ("" if same else f"then, honest: {again}"))
