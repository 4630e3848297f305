"""The chat's page in a browser, with hostile answers and questions: text alone, and nothing is requested."""

import http.server
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.commands.chat_session import NOTHING
from instruct_lm.commands.chat_text import visible
from instruct_lm.data.conversation import Conversation, Turn
from tests.commands.chat_commands import TIMEOUT, WORD, prompts, script, scripted, scripted_command
from tests.run_commands import ROOT

# Each requests http://HOST/… if a page takes it for more than text, or names the window.
HOSTILE = [
    "<b>x</b>",
    "<img src=http://HOST/1.png onerror=\"window.name='pwned'\">",
    "![a](http://HOST/2.png)",
    "[link](javascript:window.name='pwned')",
    "http://HOST/3 and https://HOST/4.png",
    "<script>window.name='pwned'; fetch('http://HOST/5')</script>",
    "<style>@import url(http://HOST/6.css); body { background: url(http://HOST/7.png) }</style>",
    "$x^2$ $$\\includegraphics{http://HOST/8.png}$$ \\(\\href{javascript:alert(1)}{x}\\)",
    "<svg onload=\"window.name='pwned'\"><image href='http://HOST/9.png'/></svg>",
    "<iframe src='http://HOST/10'></iframe><object data='http://HOST/11'></object><embed src='http://HOST/12'>",
    "<link rel=prefetch href=http://HOST/13><meta http-equiv=refresh content='0;url=http://HOST/14'>",
    "<audio src=http://HOST/15.mp3 autoplay></audio><video poster=http://HOST/16.png></video>",
    "data:text/html,<script>window.name='pwned'</script>",
    "</div></article></main></script><script>window.name='pwned'</script>",
    "&lt;b&gt; &amp; &#x3c;",
    "# heading\n\n```html\n<i>code</i>\n```\n\n| a | b |\n|---|---|\n  indented\ttab",
    "tel:+4930123456 mail@example.org",
    "👩‍👩‍👧‍👦 🇨🇴 می\u200cخواهم שלום",
    "a\u202egnp.exe\u2066\u200b\x1b[31m\x07\rb",
]


@pytest.fixture(scope="module")
def requested() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that anyone asked it for."""
    paths: list[str] = []

    class Counting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", paths
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no chromium or google-chrome on the path")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"{program} does not start here: {error}")
        yield browser
        browser.close()


Start = Callable[[dict[str, str]], str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a scripted server: the answers by question; gives its address."""
    servers: list[subprocess.Popen[str]] = []

    def start(says: dict[str, str]) -> str:
        command = scripted_command("--web")
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        server = subprocess.Popen(command, cwd=ROOT, env=script(tmp_path / "asked", says), **pipes)
        servers.append(server)
        assert server.stdout is not None
        said = ""
        while not (address := re.search(r"http://127\.0\.0\.1:\d+/", said)):
            line = server.stdout.readline()
            assert line, f"the server ended with {server.wait()}: {said}"
            said += line
        return address[0]

    yield start
    for server in servers:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=TIMEOUT)
        assert (server.returncode, said) == (0, "")


class Page:
    """The page in a tab."""

    def __init__(self, browser: Any, address: str) -> None:
        self.tab = browser.new_page()
        self.tab.set_default_timeout(1000 * TIMEOUT)
        self.errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.requests: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.instruction, self.input = (
            self.tab.get_by_label(re.compile(f"^{name}")) for name in ("Instruction", "Input")
        )
        self.answers, self.questions = self.tab.locator(".answer"), self.tab.locator(".question")
        self.send = self.tab.get_by_role("button", name="Send")

    def ask(self, text: str, input: str = "") -> None:
        self.instruction.fill(text)
        self.input.fill(input)
        self.instruction.press("Enter")

    def ended(self) -> None:
        self.send.wait_for()


@pytest.mark.slow
def test_hostile_text_stays_text(browser: Any, start: Start, requested: tuple[str, list[str]]) -> None:
    host, paths = requested
    texts = [text.replace("HOST", host) for text in HOSTILE]
    says = {f"question {n}": text for n, text in enumerate(texts)}
    address = start(says | {text.replace("\r", "\n"): "ok" for text in texts})  # as a text field has it
    page = Page(browser, address)
    for n, text in enumerate(texts):
        page.ask(f"question {n}")
        page.ended()
        assert page.answers.nth(2 * n).text_content() == visible(text)
        page.ask(text, input=text)
        page.ended()
        assert page.questions.nth(2 * n + 1).locator(".text").all_text_contents() == [text.replace("\r", "\n")] * 2
    page.tab.mouse.move(200, 200)
    assert page.tab.locator("main :not(article, div, p)").count() == 0  # no element but the page's own
    assert page.tab.locator("main a, main img").count() == 0
    assert page.tab.evaluate("window.name") == ""
    assert paths == []
    assert {url for url in page.requests if not url.startswith(address)} == set()
    assert page.errors == []


@pytest.mark.slow
def test_the_policy_holds_even_for_a_page_with_a_mistake(
    browser: Any, start: Start, requested: tuple[str, list[str]]
) -> None:
    host, paths = requested
    page = Page(browser, start({}))
    with pytest.raises(Exception, match="TrustedHTML"):
        page.tab.evaluate(f"document.body.innerHTML = '<img src=http://{host}/x.png>'")
    blocked = f"new Promise(done => {{ const i = new Image(); i.onerror = () => done('blocked'); i.src = 'http://{host}/y.png' }})"
    assert page.tab.evaluate(blocked) == "blocked"
    assert page.tab.evaluate(f"fetch('http://{host}/z').then(() => 'sent', () => 'blocked')") == "blocked"
    assert paths == []


@pytest.mark.slow
def test_a_conversation(browser: Any, start: Start, tmp_path: Path) -> None:
    says = {"Add.": "3", "a\nb": "two lines", "z" * 9000: "long", "nothing": "\x1b", "Why?": "So."}
    page = Page(browser, start(says))
    page.ask("  ")
    page.ask("Add.", input="1\n2")
    page.ended()
    assert (page.instruction.input_value(), page.input.input_value()) == ("", "")
    page.instruction.press_sequentially("a")
    page.instruction.press("Shift+Enter")
    page.instruction.press_sequentially("b")
    page.instruction.press("Enter")
    page.ended()
    page.ask("go on")
    page.answers.nth(2).get_by_text(WORD * 3).wait_for()
    page.tab.get_by_role("button", name="Stop").click()
    page.ended()
    stopped = page.answers.nth(2).text_content()
    page.ask("nothing")
    page.ended()
    page.ask("z" * 9000)
    page.ended()
    remarks = page.tab.locator(".remark").all_text_contents()
    assert remarks[:2] == ["Stopped.", NOTHING]
    assert re.match(r"The earliest 3 exchanges were left out and the last [\d,]+ tokens", remarks[2])
    assert page.answers.all_text_contents() == ["3", "two lines", stopped, "long"]
    page.tab.get_by_role("button", name="New chat").click()
    assert page.tab.locator("main").text_content() == ""
    page.ask("Why?")
    page.ended()

    turns = [Turn("user", "Add.", "1\n2"), Turn("assistant", "3"), Turn("user", "a\nb"), Turn("assistant", "two lines")]
    turns += [Turn("user", "go on"), Turn("assistant", str(stopped)), Turn("user", "nothing"), Turn("assistant", "")]
    responder = scripted().responder
    expected = [responder.prompt_ids(Conversation((*turns[: 2 * n - 1], Turn("assistant", "")))) for n in range(1, 5)]
    given = prompts(tmp_path / "asked")
    assert given[:4] == expected
    assert given[5:] == [responder.prompt_ids(Conversation.of("Why?"))]


@pytest.mark.slow
def test_two_tabs_do_not_mix(browser: Any, start: Start) -> None:
    address = start({"short": "done"})
    first, second = Page(browser, address), Page(browser, address)
    first.ask("go on")
    first.answers.nth(0).get_by_text(WORD * 3).wait_for()
    second.ask("short")
    second.tab.locator("main").get_by_text("The model answers another question first.").wait_for()
    assert second.answers.nth(0).text_content() == ""
    first.tab.close()
    second.answers.nth(0).get_by_text("done").wait_for()
    second.ended()
    second.ask("go on")
    second.answers.nth(1).get_by_text(WORD * 3).wait_for()  # Ctrl-C ends the server amid an answer: see `start`
