"""Judges against servers that behave like those of today: thinking models, short contexts, other names."""

import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges import openai as openai_module
from instruct_lm.evaluation.judges import replies as replies_module
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.ollama import OllamaJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.questions import RUBRIC, SCORE, read_question
from instruct_lm.evaluation.judges.replies import least_tokens
from instruct_lm.evaluation.scoring import describe_judge, describe_summary, score_responses, summarise
from tests.conftest import ROOT
from tests.run_commands import commands

from .judge_server import JudgeServer, answering, in_turn
from .test_judges import ENTRY, format_prompt, openai, small_llamacpp


@pytest.fixture(autouse=True)
def _no_key_and_short_waits(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai_module, "BACKOFF", 0.001)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("content", ["", None, "<think>Score: 70", " \n"])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_thoughts_alone_are_no_answer(name, content, finish_reason):
    with JudgeServer(answering(content, finish_reason=finish_reason, **{name: "Score: 70"})) as server:
        verdict = openai(server, max_tokens=64).score(ENTRY, "x")
    assert (verdict.score, verdict.again, verdict.unreachable) == (None, True, False)
    assert all(word in verdict.reason for word in ("judge.max_tokens=64", "judge.reasoning_effort=none", "thinking"))


def test_a_judge_told_not_to_think_is_told_to_think_less():
    with JudgeServer(answering("", reasoning="Score: 70")) as server:
        verdict = openai(server, reasoning_effort="none").score(ENTRY, "x")
    assert "judge.reasoning_effort=low" in verdict.reason


def test_an_empty_answer_says_so():
    with JudgeServer(answering("", finish_reason="content_filter")) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert (verdict.score, verdict.raw, verdict.again) == (None, "", True)
    assert "empty" in verdict.reason


@pytest.mark.parametrize(
    ("content", "more"),
    [
        ("85", {"reasoning": "Score: 70"}),
        ("Draft score: 70 {hmm}\n</think>\n\n85", {}),
        ([{"type": "thinking", "thinking": [{"text": "70"}]}, {"type": "text", "text": "85"}], {}),
    ],
)
def test_the_answer_after_the_thoughts_counts(content, more):
    with JudgeServer(answering(content, **more)) as server:
        assert openai(server).score(ENTRY, "x").score == 85


@pytest.mark.parametrize(
    ("content", "score"),
    [
        ("85", None),  # of "85.5"?
        ("Score: 85. It names", None),
        ("85\n\nThe response", 85),
        ('{"score": 85}\n\n\n', 85),
        ('```json\n{"score": 85}\n', 85),
        ('{"score": 8', None),
        ("First, accuracy.\nScore: 70\nNext", None),
    ],
)
def test_of_a_reply_that_was_cut_only_what_is_whole_counts(content, score):
    with JudgeServer(answering(content, finish_reason="length")) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert (verdict.score, verdict.again) == (score, False)
    assert score is not None or "judge.max_tokens=2048" in verdict.reason


def test_a_judge_that_read_a_part_of_the_question():
    with JudgeServer(answering('{"score": 85}', prompt_tokens=256)) as server:
        verdict = openai(server).score(ENTRY, "meters and more " * 500)
        assert openai(server).score(ENTRY, "meters").score == 85
    assert (verdict.score, verdict.raw, verdict.again) == (None, '{"score": 85}', True)
    assert all(word in verdict.reason for word in ("256 tokens", "OLLAMA_CONTEXT_LENGTH", "num_ctx", "-c"))


@pytest.mark.parametrize("tokens", [None, 0, -1, "12", True, 2.5])
def test_servers_that_do_not_count(tokens):
    with JudgeServer(answering("85", prompt_tokens=tokens)) as server:
        assert openai(server).score(ENTRY, "meters " * 500).score == 85


@pytest.mark.parametrize("question", [SCORE, RUBRIC])
def test_the_bound_is_below_the_tokens_of_the_real_entries(shared_dir, smollm2_gguf, monkeypatch, question):
    from instruct_lm.data.tokenizer import load_tokenizer

    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_dir / "tiktoken"))
    encoders = [tiktoken.get_encoding("gpt2").encode, load_tokenizer(smollm2_gguf).encode]
    entries = json.loads((shared_dir / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    for entry in entries[::5]:
        asked = question.ask(entry, entry["output"], format_prompt)
        tokens = min(len(encode(asked)) for encode in encoders)
        assert 0.25 * tokens < least_tokens(asked) <= tokens


@given(st.text(" \n=-a", max_size=300) | st.text(max_size=100) | st.text("天気ありがとう한국", max_size=100))
def test_the_bound_is_below_the_words_and_the_bytes(text):
    assert least_tokens(text) <= len(text.encode(errors="replace"))
    assert least_tokens(text + " " * 500 + "=" * 500) <= least_tokens(text) + 1
    assert least_tokens("天" * 500) == 0


@pytest.mark.parametrize(
    ("names", "model", "near"),
    [
        (["whisper-1", "gpt-4o"], "gpt4o", "gpt-4o"),
        (["Qwen/Qwen3-8B"], "qwen3-8b", "Qwen/Qwen3-8B"),
        (["Qwen/Qwen3-8B"], "qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        (["llama3:latest", "llama3:70b"], "llama3:8b", "llama3:70b"),
    ],
)
def test_a_name_that_the_server_lacks(names, model, near):
    pages = {"/v1/models": {"data": [{"id": name} for name in names]}}
    with JudgeServer(answering("85"), pages) as server, pytest.raises(InputError) as error:
        OpenAIJudge(model, format_prompt=format_prompt, base_url=server.url).check()
    assert f"judge.model={model}. Did you mean {near}?" in str(error.value)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("model", ["gpt-4o", "llama3", "llama3:latest", "gpt-4o:online"])
def test_a_name_that_the_server_has(model):
    pages = {"/v1/models": {"data": [{"id": "gpt-4o"}, {"id": "llama3:latest"}]}}
    with JudgeServer(answering("85"), pages) as server:
        OpenAIJudge(model, format_prompt=format_prompt, base_url=server.url).check()


@pytest.mark.parametrize(
    "page",
    [
        *({"data": []}, {"data": None}, {"data": [3]}, {"data": [{"name": "x"}]}, [], "x", {"error": "none"}),
        {"data": [{"id": "some.gguf", "owned_by": "llamacpp"}]},  # answers to any name
    ],
)
def test_a_server_with_another_list_or_none_passes(page):
    with JudgeServer(answering("85"), {"/v1/models": page}) as server:
        openai(server).check()


def test_ollamas_names():
    tags = {"models": [{"name": "llama3:latest", "digest": "36"}, {"name": "Qwen3:8b", "digest": "42"}]}
    with JudgeServer(answering("85"), {"/api/tags": tags}) as server:
        for model, digest in {"Llama3": "36", "qwen3:8B": "42"}.items():
            judge = OllamaJudge(model, format_prompt=format_prompt, base_url=server.url)
            judge.check()
            assert judge.describe()["digest"] == digest
        with pytest.raises(InputError, match=r"Did you mean Qwen3:8b\?.*llama3:latest.*ollama pull qwen:8b"):
            OllamaJudge("qwen:8b", format_prompt=format_prompt, base_url=server.url).check()


def test_openais_thinking_models_take_other_fields(caplog):
    def behave(exchange):
        if "max_tokens" in exchange.body:
            words = "Unsupported parameter: 'max_tokens' is not supported with this model. "
            exchange.error(400, words + "Use 'max_completion_tokens' instead.")
        elif "temperature" in exchange.body:
            exchange.error(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        elif "reasoning_effort" in exchange.body:
            exchange.error(400, "Unrecognized request argument supplied: reasoning_effort")
        else:
            exchange.answer("85")

    with JudgeServer(behave) as server:
        judge = openai(server, reasoning_effort="low")
        assert [judge.score(ENTRY, text).score for text in "xy"] == [85, 85]
    assert server.bodies[-1].keys() == {"model", "messages", "seed", "max_completion_tokens", "response_format"}
    assert server.bodies[-1]["max_completion_tokens"] == 2048
    assert len(server.bodies) == 5  # three refusals, once
    assert "refuses reasoning_effort" in caplog.text


def test_an_error_that_repeats_the_question_refuses_nothing():
    with JudgeServer(lambda exchange: exchange.error(400, "too long: What temperature has a seed?")) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert "HTTP 400" in verdict.reason
    assert len(server.bodies) == 1


def test_a_rubric_is_mapped_and_keeps_its_feedback(tmp_path):
    replies = {"a": '{"feedback": "Too\\nshort.", "score": 2}', "b": "It is right. [RESULT] 5", "c": '{"score": 85}'}
    entries = [{**ENTRY, "model_response": text} for text in replies]
    with JudgeServer(lambda exchange: exchange.answer(replies[exchange.question.split("Response:\n")[1][0]])) as server:
        judge = openai(server, question=RUBRIC)
        scored = score_responses(entries, judge, tmp_path / "s")
        again = score_responses(entries, judge, tmp_path / "s")
    assert again == scored
    assert [item.score for item in scored] == [25, 100, None]
    assert [item.feedback for item in scored] == ["Too\nshort.", "It is right. [RESULT] 5", None]
    assert "from 1 to 5" in scored[2].reason
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["feedback", "score"]
    summary = summarise(scored, describe_judge(judge))
    assert "lowest: entry 0, 25: Too short." in describe_summary(summary)
    assert (summary["judge"]["scale"], json.loads(json.dumps(summary))) == ([1, 5], summary)


def test_a_question_of_ones_own_sends_no_schema():
    question = read_question("Is {response} right? Answer 0 to 10.", [0, 10])
    with JudgeServer(answering("Score: 7")) as server:
        judge = openai(server, question=question)
        assert judge.score(ENTRY, "x").score == 70
    assert "response_format" not in server.bodies[0]
    assert server.bodies[0]["messages"][0]["content"] == "Is x right? Answer 0 to 10."
    assert judge.describe()["structured"] is False


def test_what_shapes_a_score_is_described():
    def description(**options):
        return OpenAIJudge("m", format_prompt=format_prompt, **options).describe()

    changes = [
        *({"max_tokens": 9}, {"reasoning_effort": "none"}, {"question": RUBRIC}, {"seed": 1}),
        {"question": read_question("{response}")},
        {"question": read_question("{response}", [0, 10])},
    ]
    described = [json.dumps(description(**change)) for change in [{}, *changes]]
    assert len(set(described)) == len(described)
    assert description(timeout=3, api_key_env="OTHER") == description()


def test_what_got_no_answer_is_asked_again_and_nothing_else(tmp_path):
    first = {
        "a": lambda exchange: exchange.answer(""),
        "b": lambda exchange: exchange.answer("", finish_reason="length", reasoning="Score: 70"),
        "c": lambda exchange: exchange.answer("85", prompt_tokens=2),
        "d": lambda exchange: exchange.error(400, "no"),
        "e": lambda exchange: exchange.answer("I cannot say."),
        "f": lambda exchange: exchange.answer("Score: 8", finish_reason="length"),
        "g": lambda exchange: exchange.answer("90"),
    }

    def behave(exchange):
        in_turn(first[exchange.question.split("model response `")[1][0]], answering("40"))(exchange)

    entries = [{**ENTRY, "model_response": text} for text in first]
    with JudgeServer(behave) as server:
        before = score_responses(entries, openai(server), tmp_path / "s")
        after = score_responses(entries, openai(server), tmp_path / "s")
        assert len(server.asked) == 7 + 4
        assert score_responses(entries, openai(server), tmp_path / "s") == after
        assert len(server.asked) == 7 + 4
    assert [item.score for item in before] == [None, None, None, None, None, None, 90]
    assert [item.score for item in after] == [40, 40, 40, 40, None, None, 90]


def test_a_real_llama_server_takes_every_setting(smollm2_gguf, monkeypatch):
    small_llamacpp(monkeypatch, n_ctx=512)
    options = {"question": RUBRIC, "reasoning_effort": "none", "max_tokens": 48}
    judge = LlamaCppJudge(smollm2_gguf, format_prompt=format_prompt, **options)
    judge.check()
    try:
        verdict = judge.score(ENTRY, "45 kilometers is 45 meters.")
    finally:
        judge.close()
    assert verdict.raw.lstrip("{ \n").startswith('"feedback"')  # by its schema
    if verdict.score is None:
        assert "judge.max_tokens=48" in verdict.reason
    else:
        assert verdict.score in (0, 25, 50, 75, 100)


COMMANDS = re.findall(
    r"^python evaluate\.py (.*)$", (ROOT / "docs" / "judges.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_document_are_accepted(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("Rate {response} from 1 to 10.")
    args = [arg for arg in shlex.split(line, comments=True) if not arg.startswith("run=")]  # there is no such run
    with commands(tmp_path, monkeypatch, capsys) as command:
        status, err, seen = command("evaluate", *args)
    assert (status, len(seen)) == (0, 1), err


def test_a_model_in_circles_is_asked_twice_and_the_remedy_is_named():
    with JudgeServer(lambda exchange: exchange.stall()) as server:
        verdict = openai(server, timeout=0.1).score(ENTRY, "x")
    assert len(server.asked) == 2
    assert (verdict.unreachable, verdict.again) == (True, True)
    assert all(word in verdict.reason for word in ("0.1 seconds", "judge.timeout", "judge.max_tokens=2048"))


def test_a_body_without_end_is_a_time_out():
    def drip(exchange):
        exchange.handler.send_response(200)
        exchange.handler.end_headers()  # no length: until the connection ends
        while not exchange.server.stopping.wait(0.005):
            exchange.handler.wfile.write(b" " * 1024)

    with JudgeServer(drip) as server:
        verdict = openai(server, timeout=0.2).score(ENTRY, "x")
    assert "0.2 seconds" in verdict.reason
    assert len(server.asked) == 2


def test_a_huge_body_is_not_read_whole(monkeypatch):
    def flood(exchange):
        exchange.handler.send_response(200)
        exchange.handler.end_headers()
        while True:  # until the judge hangs up
            exchange.handler.wfile.write(b"x" * 2**16)

    monkeypatch.setattr(replies_module, "MOST_BYTES", 10**5)
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    with JudgeServer(flood) as server:
        verdict = openai(server).score(ENTRY, "x")
    assert "HTTP 200, no answer: xxx" in verdict.reason
    assert len(verdict.reason) < 400
