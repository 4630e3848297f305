import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges import llamacpp as llamacpp_module
from instruct_lm.evaluation.judges import openai as openai_module
from instruct_lm.evaluation.judges.base import JudgeError, Verdict
from instruct_lm.evaluation.judges.factory import make_judge
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.ollama import OllamaJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.parsing import parse_score
from instruct_lm.evaluation.judges.reference import ReferenceJudge
from instruct_lm.evaluation.metrics import chrf

from .judge_server import JudgeServer, answering, in_turn

ENTRY = {"instruction": "Convert 45 kilometers to meters.", "input": "", "output": "45 kilometers is 45000 meters."}


def format_prompt(entry):
    return f"### Instruction:\n{entry['instruction']}"


def small_llamacpp(monkeypatch, n_ctx):
    """Short contexts, and one thread: two that wait for each other are slow where other tests share the machine."""
    xllamacpp = pytest.importorskip("xllamacpp")
    real = xllamacpp.CommonParams

    def one_thread():
        params = real()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        return params

    monkeypatch.setattr(xllamacpp, "CommonParams", one_thread)
    monkeypatch.setattr(llamacpp_module, "N_CTX", n_ctx)


def openai(server, **options):
    return OpenAIJudge("m", format_prompt=format_prompt, **{"base_url": server.url, "timeout": 30, **options})


@pytest.fixture(autouse=True)
def _no_key_and_short_waits(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai_module, "BACKOFF", 0.001)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85),
        ("0", 0),
        ("100.", 100),
        ("85/100", 85),
        ("85 / 100", 85),
        ("85%", 85),
        ("Score: 85", 85),
        ("**85**", 85),
        ("**Score:** 85/100", 85),
        ('{"score": 85}', 85),
        ('{"score": "85", "reason": "close to 90"}', 85),
        ('```json\n{\n  "score": 85\n}\n```', 85),
        ("I'd give 85 out of 100", 85),
        ("I would rate this an 85.", 85),
        ("The score is 85 out of 100.", 85),
        ("On a scale from 0 to 100, I'd give it 85.", 85),
        ("Score (0-100): 85", 85),
        ("85\n\nThe response says 3000 m, but 3 km is meant.", 85),
        ("The 2 units are right.\n\n85", 85),
        ("Score: 85. It names 2 of 3 vitamins.", 85),
        ("Score: 85\nFinal score: 85", 85),
        ("<think>90? No, H2O is 1 of 2.</think>\n85", 85),
        ("85.5", 86),
        ("84.5", 84),
        ("85.0/100", 85),
    ],
)
def test_parse_score_accepts(text, score):
    assert parse_score(text) == score


@pytest.mark.parametrize(
    "text",
    [
        *("", " \n", "prose without a number", "eighty-five", "null", "NaN"),
        *("-5", "−5", "Score: -5", "150", "150/100", "85/1000", '{"score": 150}', '{"score": -5}', "9" * 5000),
        *("8/10", "Score: 8/10", "8 out of 10", "0.85", '{"score": 0.85}', "4.5 of 5 stars"),
        *("80-90", "Score: 80-90", "between 80 and 90", "85, 90", "Score: 85\nScore: 40", "1\n2\n3"),
        *("85,5", "1,000", "1e2", "H2O", "3.5km", "The answer is 4.", "It contains 3 mistakes"),
        *('{"score": 8', '{"score": true}', '{"score": null}', '{"confidence": 85}', "{" * 100_000, "<think>85"),
        "on a scale from 0 to 100",
    ],
)
def test_parse_score_rejects(text):
    assert parse_score(text) is None


@given(
    st.integers(0, 100),
    st.sampled_from(["{}", "Score: {}", "{}/100", "I give it {}.", '{{"score": {}}}', "Rating = {}\n"]),
)
@settings(deadline=None)
def test_parse_score_reads_every_score(score, template):
    assert parse_score(template.format(score)) == score


@given(
    st.integers().filter(lambda n: not 0 <= n <= 100), st.sampled_from(["{}", "Score: {}", "{}/100", '{{"score": {}}}'])
)
@settings(deadline=None)
def test_parse_score_never_leaves_the_scale(score, template):
    assert parse_score(template.format(score)) is None


@given(st.one_of(st.text(), st.text(alphabet='0123456789.,-/{}[]": score of100\n')))
@settings(deadline=None)
def test_parse_score_of_anything_is_an_integer_in_range_or_none(text):
    score = parse_score(text)
    assert score is None or (type(score) is int and 0 <= score <= 100)


def test_reference_judge():
    judge = ReferenceJudge()
    assert judge.score(ENTRY, ENTRY["output"].upper() + " ") == Verdict(
        (100 + chrf(ENTRY["output"].upper(), ENTRY["output"])) / 2
    )
    assert judge.score(ENTRY, ENTRY["output"]).score == pytest.approx(100)
    assert judge.score(ENTRY, "45 kilometers is 45 meters.").score == pytest.approx(
        chrf("45 kilometers is 45 meters.", ENTRY["output"]) / 2
    )
    assert json.dumps(judge.describe())


def test_the_request_is_the_books_question_with_a_schema(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with JudgeServer(answering('{"score": 85}')) as server:
        verdict = openai(server).score(ENTRY, "45 km is {output} {input}.")
    assert verdict == Verdict(85, raw='{"score": 85}')
    body = server.bodies[0]
    assert body["messages"] == [
        {
            "role": "user",
            "content": "Given the input `### Instruction:\nConvert 45 kilometers to meters.` and correct output "
            "`45 kilometers is 45000 meters.`, score the model response `45 km is {output} {input}.` on a scale from 0 to "
            "100, where 100 is the best score. Respond with the integer number only.",
        }
    ]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0, 123)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"score": {"type": "integer", "minimum": 0, "maximum": 100}}
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_null_options_are_left_to_the_server():
    with JudgeServer(answering("85")) as server:
        openai(server, temperature=None, seed=None).score(ENTRY, "x")
    assert server.bodies[0].keys() == {"model", "messages", "max_tokens", "response_format"}


@pytest.mark.parametrize(
    ("content", "score"),
    [
        ("85/100", 85),
        ("I'd say the score is 70.", 70),
        ("-5", None),
        ("150", None),
        ("", None),
        (None, None),
        ("no idea", None),
    ],
)
def test_an_answer_is_scored_or_failed_and_never_asked_again(content, score):
    with JudgeServer(answering(content)) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert (verdict.score, verdict.raw) == (score, content or "")
    assert (verdict.reason is None) == (score is not None)
    assert verdict.reason is None or repr(content or "") in verdict.reason
    assert len(server.asked) == 1


def test_an_answer_cut_within_its_number_is_no_score():
    with JudgeServer(answering("Score: 8", finish_reason="length")) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert verdict.score is None
    assert "cut short" in verdict.reason


TRANSIENT = {
    "429": lambda exchange: exchange.error(429, "slow down", {"Retry-After": "0"}),
    "500": lambda exchange: exchange.error(500, "oops"),
    "503": lambda exchange: exchange.error(503, "loading model"),
    "reset": lambda exchange: exchange.reset(),
    "half": lambda exchange: exchange.half(),
    "invalid JSON": lambda exchange: exchange.send(200, b'{"choices": ['),
    "error page": lambda exchange: exchange.send(200, b"<html>busy</html>"),
    "no choices": lambda exchange: exchange.send(200, b'{"choices": []}'),
    "binary": lambda exchange: exchange.send(200, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("trouble", TRANSIENT)
def test_transient_trouble_is_tried_again(trouble):
    with JudgeServer(in_turn(TRANSIENT[trouble], TRANSIENT[trouble], answering("85"))) as server:
        assert openai(server).score(ENTRY, "x") == Verdict(85, raw="85")
    assert len(server.asked) == 3


@pytest.mark.parametrize("trouble", TRANSIENT)
def test_lasting_trouble_fails_the_entry_after_the_retries(monkeypatch, trouble):
    monkeypatch.setattr(openai_module, "RETRIES", 2)
    with JudgeServer(TRANSIENT[trouble]) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert (verdict.score, verdict.raw) == (None, None)
    assert verdict.reason
    assert verdict.unreachable == (trouble in ("reset", "half"))
    assert len(server.asked) == 3


def test_a_stalled_server_times_out_and_is_asked_again():
    with JudgeServer(in_turn(lambda exchange: exchange.stall(), answering("85"))) as server:
        assert openai(server, timeout=0.2).score(ENTRY, "x").score == 85
    assert len(server.asked) == 2


@pytest.mark.parametrize(("status", "unreachable"), [(400, False), (413, False), (401, True), (404, True), (302, True)])
def test_other_refusals_fail_at_once(status, unreachable):
    with JudgeServer(lambda exchange: exchange.error(status, "the prompt has 9000 tokens")) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert f"HTTP {status}" in verdict.reason
    assert "9000 tokens" in verdict.reason
    assert (verdict.raw, verdict.unreachable) == (None, unreachable)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_question_and_its_key_go_to_no_other_address(status, monkeypatch):
    monkeypatch.setenv("KEY_OF_JUDGE", "secret")
    with JudgeServer(answering("85"), {}) as other:
        moved = {"Location": f"{other.url}/chat/completions"}
        with JudgeServer(lambda exchange: exchange.error(status, "moved", moved)) as server:
            verdict = openai(server, api_key_env="KEY_OF_JUDGE").score(ENTRY, "x")
    assert (verdict.score, verdict.unreachable) == (None, True)
    assert f"HTTP {status}" in verdict.reason
    assert other.asked == []


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("field", ["response_format", "max_tokens"])
def test_a_refused_field_is_dropped_and_not_sent_again(status, field):
    def behave(exchange):
        if field in exchange.body:
            exchange.error(status, f"Unsupported parameter: '{field}' is not supported")
        else:
            exchange.answer("85")

    with JudgeServer(behave) as server:
        judge = openai(server)
        before = judge.describe()
        assert [judge.score(ENTRY, response).score for response in ("x", "y")] == [85, 85]
    assert [field in body for body in server.bodies] == [True, False, False]
    assert judge.describe() == before


def test_waits_grow_and_obey_retry_after(monkeypatch):
    waits = []

    def behave(exchange):
        exchange.error(
            429, "", {"Retry-After": ["7", "3600", "soon", ""][exchange.attempt]} if exchange.attempt < 4 else {}
        )

    monkeypatch.setattr(openai_module, "BACKOFF", 1.0)
    monkeypatch.setattr(openai_module, "RETRIES", 6)
    with JudgeServer(behave) as server:
        judge = openai(server)
        monkeypatch.setattr(judge._closed, "wait", lambda seconds: waits.append(seconds))
        judge.score(ENTRY, "x")
    assert 7 <= waits[0] <= 8
    assert waits[1] == 60  # no longer than that, whatever the server asks for
    assert [low <= wait <= 2 * low for wait, low in zip(waits[2:], (2, 4, 8, 16), strict=True)] == [True] * 4


def test_retry_after_as_a_date(monkeypatch):
    waits = []
    date = datetime.now(timezone.utc) + timedelta(seconds=30)
    dates = [format_datetime(date - timedelta(hours=hours), usegmt=True) for hours in (0, 1)]
    replies = [lambda exchange, date=date: exchange.error(503, "", {"Retry-After": date}) for date in dates[::-1]]
    monkeypatch.setattr(openai_module, "BACKOFF", 0)
    with JudgeServer(in_turn(*replies, answering("85"))) as server:
        judge = openai(server)
        monkeypatch.setattr(judge._closed, "wait", waits.append)
        assert judge.score(ENTRY, "x").score == 85
    assert waits[0] == 0  # a date in the past
    assert 25 <= waits[1] <= 30


def test_a_reply_that_stalls_after_its_headers_is_tried_again():
    def stall(exchange):
        exchange.handler.send_response(200)
        exchange.handler.send_header("Content-Length", "9")
        exchange.handler.end_headers()
        exchange.stall()

    with JudgeServer(in_turn(stall, answering("85"))) as server:
        assert openai(server, timeout=0.2).score(ENTRY, "x").score == 85
    assert len(server.asked) == 2


def test_a_closed_judge_gives_up_waiting():
    with JudgeServer(lambda exchange: exchange.error(429, "", {"Retry-After": "60"})) as server:
        judge = openai(server)
        judge.close()
        assert judge.score(ENTRY, "x").score is None
        assert len(server.asked) == 1
        judge.check()  # opens it again
        server.behave = in_turn(*[lambda exchange: exchange.error(503, "busy")] * 2, answering("85"))
        assert judge.score(ENTRY, "x").score == 85


def test_the_key_is_never_told(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-123\n")
    replies = in_turn(
        lambda exchange: exchange.error(401, "bad key sk-secret-123"),
        answering("sk-secret-123"),
        answering("<think>sk-secret-123"),
        lambda exchange: exchange.error(401, "." * 165 + " sk-secret-123"),  # across the end of what is shown
    )
    with JudgeServer(replies) as server:
        judge = openai(server, api_key_env="MY_KEY")
        verdicts = [judge.score(ENTRY, "x") for _ in range(4)]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
    assert "***" in verdicts[0].reason
    assert verdicts[1].raw == "***"
    assert "secret" not in repr((verdicts, judge.describe(), vars(judge)))


def test_an_unusable_key_is_named_by_its_variable_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nX-Header: 1")
    with JudgeServer(answering("85")) as server, pytest.raises(InputError, match="OPENAI_API_KEY") as error:
        openai(server).check()
    assert "secret" not in str(error.value)


def test_no_password_of_netrc_is_sent(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with JudgeServer(answering("85")) as server:
        openai(server).score(ENTRY, "x")
    assert "Authorization" not in server.headers[0]


def test_a_local_server_is_not_sought_through_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with JudgeServer(answering("85")) as server:
        assert openai(server).score(ENTRY, "x").score == 85


def test_openai_needs_a_key():
    with pytest.raises(InputError, match=r"export OPENAI_API_KEY="):
        OpenAIJudge("gpt-4o-mini", format_prompt=format_prompt).check()


def _unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_check_of_a_server_that_is_not_there():
    url = f"http://127.0.0.1:{_unused_port()}/v1"
    with pytest.raises(JudgeError, match=f"{url}.*judge.base_url"):
        OpenAIJudge("m", format_prompt=format_prompt, base_url=url).check()
    with pytest.raises(JudgeError, match="ollama serve"):
        OllamaJudge("llama3", format_prompt=format_prompt, base_url=url).check()


def test_check_of_a_server_with_other_pages_passes():
    with JudgeServer(answering("85"), pages={}) as server:
        openai(server).check()
        judge = OllamaJudge("llama3", format_prompt=format_prompt, base_url=server.url)
        judge.check()
        assert judge.describe()["digest"] is None


TAGS = {
    "models": [{"name": "llama3:latest", "digest": "365c0bd3c000"}, {"name": "phi3:mini", "digest": "4f2222927938"}]
}


@pytest.mark.parametrize(("model", "digest"), [("llama3", "365c0bd3c000"), ("phi3:mini", "4f2222927938")])
def test_ollama_is_described_with_its_digest(monkeypatch, model, digest):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with JudgeServer(answering("85"), pages={"/api/tags": TAGS}) as server:
        judge = OllamaJudge(model, format_prompt=format_prompt, base_url=server.url)
        assert judge.describe()["digest"] == digest
        judge.check()
        assert judge.score(ENTRY, "x").score == 85
    assert "Authorization" not in server.headers[0]


def test_ollama_without_the_model():
    with JudgeServer(answering("85"), pages={"/api/tags": TAGS}) as server, pytest.raises(InputError) as error:
        OllamaJudge("mistral", format_prompt=format_prompt, base_url=server.url).check()
    assert "ollama pull mistral" in str(error.value)
    assert "llama3:latest, phi3:mini" in str(error.value)


def test_describe_shows_the_whole_question():
    judge = OpenAIJudge("m", format_prompt=format_prompt, base_url="http://localhost:8080/v1/", temperature=None)
    assert judge.describe() == {
        "kind": "openai",
        "server": "http://localhost:8080/v1",
        "model": "m",
        "digest": None,
        "prompt": "Given the input `### Instruction:\n{instruction}` and correct output `{output}`, score the model response "
        "`{response}` on a scale from 0 to 100, where 100 is the best score. Respond with the integer number only.",
        "temperature": None,
        "seed": 123,
        "max_tokens": 2048,
        "reasoning_effort": None,
        "scale": [0, 100],
        "structured": True,
    }


@pytest.mark.parametrize("url", ["http://me:hidden@host/v1", "http://host/v1?key=hidden"])
def test_a_bad_address_is_refused_without_repeating_a_password(url):
    with pytest.raises(InputError, match=r"judge\.base_url") as error:
        OpenAIJudge("m", format_prompt=format_prompt, base_url=url)
    assert "hidden" not in str(error.value)


def test_make_judge():
    assert make_judge("none", format_prompt=format_prompt) is None
    assert isinstance(make_judge("reference", format_prompt=format_prompt, temperature=0.0), ReferenceJudge)
    judge = make_judge("ollama", format_prompt=format_prompt, model="llama3", timeout=5)
    assert isinstance(judge, OllamaJudge)
    assert (judge.model, judge.base_url, judge.timeout) == ("llama3", "http://localhost:11434/v1", 5)
    assert judge.api_key_env is None
    judge = make_judge("openai", format_prompt=format_prompt, model="gpt-4o", api_key_env="OTHER")
    assert (judge.model, judge.base_url) == ("gpt-4o", "https://api.openai.com/v1")
    assert (judge.api_key_env, judge.timeout) == ("OTHER", 120)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("openai", "m", r"judge\.base_url has a password"),
        ("ollama", "m", r"judge\.base_url has a password"),
        ("llamacpp", "absent.gguf", r"judge\.model=absent\.gguf: no such file"),
    ],
)
def test_make_judge_refuses(kind, model, message):
    with pytest.raises(InputError, match=message):
        make_judge(kind, format_prompt=format_prompt, model=model, base_url="http://me:hidden@host/v1")


def test_llamacpp_needs_its_extra(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[llamacpp\]'"):
        make_judge("llamacpp", format_prompt=format_prompt, model=tmp_path / "model.gguf")


def test_llamacpp_refuses_a_broken_file(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="cannot load"):
        make_judge("llamacpp", format_prompt=format_prompt, model=tmp_path / "model.gguf").check()


@pytest.fixture(scope="module")
def llamacpp(smollm2_gguf):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_llamacpp(monkeypatch, n_ctx=1024)
        judge = LlamaCppJudge(smollm2_gguf, format_prompt=format_prompt)
        judge.check()
    yield judge
    judge.close()


def test_llamacpp_is_described_by_its_file(llamacpp):
    description = llamacpp.describe()
    assert description["model"].endswith(".gguf")
    assert description["digest"].startswith("sha256:b179c952")
    assert "xllamacpp" in description["server"]
    assert json.dumps(description)


def test_a_real_llama_server_scores_by_schema_and_repeats_itself(llamacpp):
    verdict = llamacpp.score(ENTRY, "45 kilometers is 45 meters.")
    assert json.loads(verdict.raw)["score"] == verdict.score
    assert llamacpp.score(ENTRY, "45 kilometers is 45 meters.") == verdict


def test_a_real_llama_server_without_structure_answers_in_its_own_words(llamacpp):
    judge = OpenAIJudge("any", format_prompt=format_prompt, base_url=llamacpp.base_url, api_key_env=None, max_tokens=24)
    judge.check()
    judge._refused.add("response_format")
    verdict = judge.score(ENTRY, "45 kilometers is 45 meters.")
    assert verdict.raw
    assert verdict.score == parse_score(verdict.raw)


def test_a_question_longer_than_the_context_fails_with_the_servers_words(llamacpp):
    verdict = llamacpp.score(ENTRY, "meters " * 2000)
    assert verdict.score is None
    assert "HTTP 400" in verdict.reason
    assert "context" in verdict.reason


def test_a_closed_llama_judge_can_be_checked_open_again(smollm2_gguf, monkeypatch):
    small_llamacpp(monkeypatch, n_ctx=256)
    judge = LlamaCppJudge(smollm2_gguf, format_prompt=format_prompt)
    assert judge.score(ENTRY, "x").unreachable
    judge.check()
    first = judge.base_url
    judge.close()
    with pytest.raises(JudgeError, match="no server answers"):
        OpenAIJudge("any", format_prompt=format_prompt, base_url=first, api_key_env=None).check()
    judge.check()
    assert judge.score(ENTRY, "x").raw
    judge.close()


def test_closing_a_llama_judge_ends_the_questions_that_wait(smollm2_gguf, monkeypatch):
    small_llamacpp(monkeypatch, n_ctx=256)
    judge = LlamaCppJudge(smollm2_gguf, format_prompt=format_prompt)
    judge.check()
    with ThreadPoolExecutor(4) as pool:
        questions = [pool.submit(judge.score, ENTRY, str(i)) for i in range(4)]
        next(as_completed(questions))
        judge.close()
    verdicts = [question.result() for question in questions]
    assert any(verdict.raw for verdict in verdicts)
    assert all(verdict.raw or verdict.unreachable for verdict in verdicts)
