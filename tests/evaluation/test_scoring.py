import _thread
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from instruct_lm.errors import InputError
from instruct_lm.evaluation import scoring
from instruct_lm.evaluation.judges import openai as openai_module
from instruct_lm.evaluation.judges.base import Judge, JudgeError, Verdict
from instruct_lm.evaluation.judges.llamacpp import LlamaCppJudge
from instruct_lm.evaluation.judges.openai import OpenAIJudge
from instruct_lm.evaluation.judges.reference import ReferenceJudge
from instruct_lm.evaluation.metrics import METRICS, chrf, rouge_l
from instruct_lm.evaluation.score_file import read_scores
from instruct_lm.evaluation.scoring import (
    ScoredEntry,
    describe_judge,
    describe_summary,
    score_responses,
    summarise,
)
from instruct_lm.evaluation.statistics import bootstrap_interval

from .judge_server import JudgeServer, answering, in_turn
from .test_judges import small_llamacpp

ROOT = Path(__file__).resolve().parents[2]


def responses(n):
    return [
        {"instruction": f"Double {i}.", "input": "", "output": f"{2 * i}.", "model_response": f"answer-{i}"}
        for i in range(n)
    ]


def format_prompt(entry):
    return entry["instruction"]


def judge_of(server, **options):
    return OpenAIJudge(
        "m",
        format_prompt=format_prompt,
        base_url=server.url,
        api_key_env=None,
        **options,
    )


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(openai_module, "BACKOFF", 0.001)
    monkeypatch.setattr(openai_module, "RETRIES", 1)


def number(question):
    return int(re.search(r"answer-(\d+)", question)[1])


def score_of(i):
    return i * 37 % 101


def honest(exchange):
    exchange.answer(f'{{"score": {score_of(number(exchange.question))}}}')


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_entry_becomes_a_line_and_an_item_in_order(tmp_path):
    path = tmp_path / "run" / "scores.jsonl"
    with JudgeServer(honest) as server:
        scored = score_responses(responses(20), judge_of(server), path)
    assert [(item.index, item.score) for item in scored] == [(i, score_of(i)) for i in range(20)]
    values = {name: metric.compute("answer-3", "6.") for name, metric in METRICS.items()}
    assert (values["chrf"], values["rouge_l"]) == (chrf("answer-3", "6."), rouge_l("answer-3", "6."))
    assert scored[3] == ScoredEntry(3, 10, None, **values, raw='{"score": 10}')
    assert {line["index"]: line["score"] for line in lines(path)} == {i: score_of(i) for i in range(20)}
    names = {"index", "score", "reason", *METRICS, "raw", "feedback", "again"}
    assert lines(path)[0].keys() == {"fingerprint", "check", *names}


def test_eight_questions_are_in_flight_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    eight = threading.Barrier(8)

    def behave(exchange):
        eight.wait(30)  # breaks, and the answer with it, unless eight wait here together
        honest(exchange)

    with JudgeServer(behave) as server:
        scored = score_responses(responses(16), judge_of(server), tmp_path / "s", concurrency=8)
    assert all(item.score is not None for item in scored)


def test_each_kind_of_failure_is_counted_with_its_reason(tmp_path):
    behaviours = {
        0: answering("85/100"),
        1: answering("-5"),
        2: answering("150"),
        3: answering(""),
        4: answering("It is a fine answer."),
        5: lambda exchange: exchange.error(500, "oops"),
        6: lambda exchange: exchange.error(400, "too long"),
        7: lambda exchange: exchange.reset(),
        8: lambda exchange: exchange.half(),
        9: in_turn(lambda exchange: exchange.error(429, "wait", {"Retry-After": "0"}), answering("Score: 70")),
        10: lambda exchange: exchange.send(200, b"{"),
    }
    with JudgeServer(lambda exchange: behaviours[number(exchange.question)](exchange)) as server:
        judge = judge_of(server)
        scored = score_responses(responses(11), judge, tmp_path / "s")
        summary = summarise(scored, describe_judge(judge))
    assert (summary["n"], summary["scored"], summary["failed"]) == (11, 2, 9)
    assert (summary["mean"], summary["mean_failed_as_zero"]) == (77.5, 155 / 11)
    assert [failure["index"] for failure in summary["failures"]] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert all(failure["reason"] for failure in summary["failures"])
    assert json.loads(json.dumps(summary)) == summary


def test_a_rerun_asks_again_only_what_was_not_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    first = {
        1: answering("no idea"),
        2: lambda exchange: exchange.error(500, "oops"),
        3: lambda exchange: exchange.reset(),
    }
    path = tmp_path / "scores.jsonl"
    with JudgeServer(lambda exchange: first.get(number(exchange.question), honest)(exchange)) as server:
        score_responses(responses(5), judge_of(server), path)
        assert len(server.asked) == 5
        first.clear()
        scored = score_responses(responses(5), judge_of(server), path)
        again = score_responses(responses(5), judge_of(server), path)
    assert sorted(map(number, server.asked[5:])) == [2, 3]
    assert [item.score for item in scored] == [0, None, 74, 10, 47]
    assert scored == again
    assert len(lines(path)) == 7
    assert [read_scores(path)[i] for i in range(5)] == scored  # as a report reads them


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"temperature": 1.0},
        {"format_prompt": str},
        {"entries": "answer"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_prompt_judge_or_response_starts_anew(tmp_path, change):
    path = tmp_path / "scores.jsonl"
    with JudgeServer(answering("85")) as server:
        entries = responses(3)
        score_responses(entries, judge_of(server), path)
        options = {"model": "m", "format_prompt": format_prompt, **change}
        if options.pop("entries", None):
            entries[1]["model_response"] = "another"
        judge = OpenAIJudge(options.pop("model"), base_url=server.url, **options)
        score_responses(entries, judge, path)
    assert len(server.asked) == 6
    assert sorted(line["index"] for line in lines(path)) == [0, 1, 2]


def test_what_does_not_change_a_score_does_not_start_anew(tmp_path):
    path = tmp_path / "scores.jsonl"
    with JudgeServer(answering("85")) as server:
        score_responses(responses(3), judge_of(server), path)
        entries = [{**entry, "input": None, "tokens": 12} for entry in responses(3)]
        score_responses(entries, judge_of(server, timeout=7), path, concurrency=1)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("tail", "asked"),
    [(b'{"fingerprint": "', [2]), (b"\xff\xfe\x00", [2]), (None, [])],  # None: only the line end is missing
)
def test_a_torn_last_line_is_tolerated(tmp_path, tail, asked):
    path = tmp_path / "scores.jsonl"
    with JudgeServer(honest) as server:
        complete = score_responses(responses(3), judge_of(server), path, concurrency=1)
        content = path.read_bytes()
        whole = content[:-1] if tail is None else content[: content[:-1].rindex(b"\n") + 1] + tail
        path.write_bytes(whole)
        assert score_responses(responses(3), judge_of(server), path) == complete
    assert [number(question) for question in server.asked[3:]] == asked
    assert sorted(line["index"] for line in lines(path)) == [0, 1, 2]


def test_a_line_is_written_and_synced_before_the_next_question(tmp_path, monkeypatch):
    path, synced = tmp_path / "scores.jsonl", []
    monkeypatch.setattr(scoring.os, "fsync", lambda file: synced.append(len(lines(path))))

    def behave(exchange):
        assert len(lines(path)) == number(exchange.question)
        honest(exchange)

    with JudgeServer(behave) as server:
        scored = score_responses(responses(4), judge_of(server), path, concurrency=1)
    assert [item.score for item in scored] == [score_of(i) for i in range(4)]
    assert synced == [1, 2, 3, 4]


@pytest.mark.parametrize("key", ["score", "chrf", "index", "fingerprint", "check"])
def test_an_entry_whose_line_is_damaged_is_scored_again(tmp_path, caplog, key):
    path = tmp_path / "scores.jsonl"
    complete = score_responses(responses(3), ReferenceJudge(), path)
    first, second, third = path.read_text().splitlines()
    place = second.index(f'"{key}": ') + len(key) + 5
    flipped = second[:place] + chr(ord(second[place]) ^ 1) + second[place + 1 :]
    path.write_text(f"{first}\n{flipped}\n{third}\n")
    assert score_responses(responses(3), ReferenceJudge(), path) == complete
    assert "1 lines are damaged: their entries are scored again" in caplog.text
    assert sorted(path.read_text().splitlines()) == sorted([first, second, third])


def test_a_file_of_something_else_is_replaced(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"index": 0, "score": 100}\n')
    scored = score_responses(responses(2), ReferenceJudge(), path)
    assert [line["score"] for line in lines(path)] == [item.score for item in scored]


def metric(response, reference):
    """Stands for those whose packages a process takes seconds to import."""
    return float(len(response) * len(reference) % 100)


CHILD = """
import sys
from pathlib import Path
from tests.evaluation.test_scoring import *
for name in ("chrf", "rouge_l"):
    METRICS[name] = METRICS[name]._replace(compute=metric)
judge = OpenAIJudge("m", format_prompt=format_prompt, base_url=sys.argv[1], api_key_env=None)
score_responses(responses(40), judge, Path(sys.argv[2]), concurrency=4)
"""


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_goes_on_to_the_same_summary(tmp_path, monkeypatch):
    for name in ("chrf", "rouge_l"):
        monkeypatch.setitem(METRICS, name, METRICS[name]._replace(compute=metric))
    path = tmp_path / "scores.jsonl"
    limit, allowed, held = 0, threading.Semaphore(0), threading.Semaphore(0)

    def behave(exchange):
        if allowed.acquire(blocking=False):
            honest(exchange)
        else:
            held.release()
            exchange.stall()

    with JudgeServer(behave) as server:
        for answers in (7, 3, 1, 0, 4, 2, 1, 5, 6, 1):
            limit += answers
            for _ in range(answers):
                allowed.release()
            child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(path)], cwd=ROOT)
            for _ in range(4):  # all four workers wait here: what was answered has been written
                assert held.acquire(timeout=60)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert len(server.answered) == limit == len(lines(path))
        for _ in range(100):
            allowed.release()
        judge = judge_of(server)
        resumed = summarise(score_responses(responses(40), judge, path), describe_judge(judge))
        assert Counter(map(number, server.answered)) == Counter(range(40))
        whole = summarise(score_responses(responses(40), judge, tmp_path / "w"), describe_judge(judge))
    assert resumed == whole
    assert resumed["scored"] == 40


def test_ctrl_c_keeps_the_answers_under_way(tmp_path):
    path = tmp_path / "scores.jsonl"
    reached = threading.Barrier(4)

    def behave(exchange):
        if number(exchange.question) in (4, 5, 6, 7) and exchange.attempt == 0 and reached.wait(30) == 0:
            _thread.interrupt_main()
        honest(exchange)

    with JudgeServer(behave) as server:
        with pytest.raises(KeyboardInterrupt):
            score_responses(responses(400), judge_of(server), path, concurrency=4)
        kept = {line["index"] for line in lines(path)}
        assert kept == set(map(number, server.answered))
        assert {4, 5, 6, 7} <= kept
        assert len(kept) < 400
        scored = score_responses(responses(400), judge_of(server), path)
    assert [item.score for item in scored] == [score_of(i) for i in range(400)]
    assert Counter(map(number, server.answered)) == Counter(range(400))


def test_a_server_that_goes_away_ends_the_evaluation_and_keeps_what_was_scored(tmp_path):
    path = tmp_path / "scores.jsonl"

    def behave(exchange):
        (honest if number(exchange.question) < 20 else lambda exchange: exchange.reset())(exchange)

    with JudgeServer(behave) as server:
        judge = judge_of(server)
        with pytest.raises(JudgeError, match=r"8 entries in a row.*ConnectionError") as error:
            score_responses(responses(110), judge, path, concurrency=4)
        assert str(path) in str(error.value)
        assert len(server.asked) < 20 + 2 * 20
        server.behave = honest
        scored = score_responses(responses(110), judge, path)
    assert [item.score for item in scored] == [score_of(i) for i in range(110)]
    assert Counter(map(number, server.answered)) == Counter(range(110))


class Told(Judge):
    """Reaches its model or not, as told."""

    kind = "told"

    def __init__(self, reached: list[bool]) -> None:
        self.reached, self.closed = iter(reached), False

    def describe(self):
        return {"kind": self.kind}

    def check(self):
        pass

    def score(self, entry, response):
        reached = next(self.reached)
        return Verdict(50.0 if reached else None, None if reached else "no answer", unreachable=not reached)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("reached", "stops"), [([0] * 7 + [1] + [0] * 7, False), ([1] + [0] * 8 + [1], True)])
def test_only_entries_in_a_row_that_reach_no_judge_end_the_evaluation(tmp_path, monkeypatch, reached, stops):
    monkeypatch.setattr(scoring, "as_completed", iter)  # in the order of the questions
    judge, path = Told(reached), tmp_path / "scores.jsonl"
    if not stops:
        scored = score_responses(responses(len(reached)), judge, path, concurrency=1)
        assert [item.score for item in scored] == [50.0 if each else None for each in reached]
        return
    with pytest.raises(JudgeError, match=r"8 entries in a row .*no answer.\n9 of 10 entries are in .*scores\.jsonl"):
        score_responses(responses(len(reached)), judge, path, concurrency=1)
    assert judge.closed  # else the questions that wait for another try would keep the command for minutes


def test_an_absent_server_is_named_before_anything_is_asked(tmp_path):
    with JudgeServer(honest) as server:
        judge = judge_of(server)
    with pytest.raises(JudgeError, match="no server answers"):
        score_responses(responses(3), judge, tmp_path / "scores.jsonl")


def test_reference_judge_and_no_judge(tmp_path):
    entries = responses(4)
    entries[1]["model_response"] = "2"
    entries[2]["model_response"] = "4 !"
    scored = score_responses(entries, ReferenceJudge(), tmp_path / "s")
    summary = summarise(scored, describe_judge(ReferenceJudge()))
    per_entry = [(100 * item.exact_match + item.chrf) / 2 for item in scored]
    assert [item.exact_match for item in scored] == [False, True, True, False]
    assert [item.score for item in scored] == per_entry
    assert summary["ci95"] == list(bootstrap_interval(per_entry))
    assert (summary["exact_match"], summary["failed"]) == (0.5, 0)
    assert summary["chrf"] == pytest.approx(sum(item.chrf for item in scored) / 4)

    nobody = summarise(score_responses(entries, None, tmp_path / "s"), describe_judge(None))
    assert (nobody["n"], nobody["scored"], nobody["failed"], nobody["mean"], nobody["ci95"]) == (4, 0, 0, None, None)
    assert nobody["judge"] == {"kind": "none"}
    assert (nobody["exact_match"], nobody["chrf"], nobody["rouge_l"]) == (0.5, summary["chrf"], summary["rouge_l"])


def test_a_summary_in_words():
    scored = [
        ScoredEntry(0, 80, None, True, 90.0, 100.0),
        ScoredEntry(1, 40, None, False, 31.0, 50.0),
        ScoredEntry(2, None, "HTTP 500", False, 20.0, 0.0),
    ]
    summary = {**summarise(scored, {"kind": "openai"}), "mean_tokens": 12.34, "ended": 2 / 3}
    low, high = summary["ci95"]
    assert describe_summary(summary).splitlines() == [
        "3 answers: exact match 1 of 3, chrF 47.0, ROUGE-L 50.0",
        "answers ended by the model: 67%, 12.3 tokens each",
        f"score (openai): 60.0 of 100, 95% interval {low:.1f} to {high:.1f}",
        "1 entries have no score, the first: entry 2, HTTP 500. Mean with those as 0: 40.0",
    ]
    unjudged = summarise([ScoredEntry(0, None, None, True, 90.0, 100.0)], {"kind": "none"})
    assert describe_summary(unjudged) == "1 answers: exact match 1 of 1, chrF 90.0, ROUGE-L 100.0"


def test_the_lowest_score_is_shown_with_what_the_judge_says():
    told = [(0, 80, "good"), (1, 20, None), (2, 30, "wrong\n number"), (3, 30, "wrong too")]
    summary = summarise(
        [ScoredEntry(i, score, None, False, 1.0, 1.0, feedback=words) for i, score, words in told], {"kind": "ollama"}
    )
    assert summary["lowest"] == {"index": 2, "score": 30, "feedback": "wrong\n number"}
    assert describe_summary(summary).splitlines()[-1] == "lowest: entry 2, 30: wrong number"


def test_a_judge_that_is_late_twice_is_not_asked_a_third_time(monkeypatch):
    asked = []

    def late(*_):
        asked.append(1)
        raise openai_module.requests.ReadTimeout

    monkeypatch.setattr(openai_module, "RETRIES", 9)
    monkeypatch.setattr(OpenAIJudge, "_send", late)
    judge = OpenAIJudge("m", format_prompt=format_prompt, base_url="http://localhost:1/v1", api_key_env=None)
    verdict = judge.score(responses(1)[0], "a")
    assert (len(asked), verdict.score, verdict.unreachable, verdict.again) == (2, None, True, True)


def test_each_field_that_a_server_refuses_is_left_out_from_then_on():
    def behave(exchange):
        refused = [name for name in ("seed", "temperature") if name in exchange.body]
        if refused and len(exchange.server.asked) < 9:
            exchange.error(400, f"unknown field '{refused[0]}'")
        else:
            honest(exchange)

    with JudgeServer(behave) as server:
        judge = judge_of(server)
        assert judge.score(responses(1)[0], "answer-0").score == score_of(0)
        assert [sorted({"seed", "temperature"} & body.keys()) for body in server.bodies] == [
            ["seed", "temperature"],
            ["temperature"],
            [],
        ]


def test_the_bar_shows_the_running_mean(tmp_path, capsys):
    entries = responses(2)
    entries[0]["model_response"] = entries[1]["model_response"] = "zzz"
    score_responses(entries, ReferenceJudge(), tmp_path / "s")
    assert "mean 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no responses"),
        ([{"instruction": "a", "output": "b"}], "response 0: 'model_response' must be a text, and is None"),
        ([*responses(1), {**responses(1)[0], "output": 3}], "response 1: 'output' must be a text, and is 3"),
        (["text"], "response 0"),
    ],
)
def test_malformed_responses_are_named(tmp_path, entries, message):
    with pytest.raises(InputError, match=message):
        score_responses(entries, ReferenceJudge(), tmp_path / "s")


def test_odd_characters_survive_the_file(tmp_path):
    entries = [{"instruction": "\ud800", "output": "é\u2028x", "model_response": "\x00\r\n" + "long " * 20_000}]
    with JudgeServer(answering("85 \u2028 \u85e4")) as server:
        first = score_responses(entries, judge_of(server), tmp_path / "s")
        assert score_responses(entries, judge_of(server), tmp_path / "s") == first
    assert first[0].raw == "85 \u2028 \u85e4"
    assert len(server.asked) == 1


def test_a_real_llama_server_is_asked_by_many(smollm2_gguf, tmp_path, monkeypatch):
    small_llamacpp(monkeypatch, n_ctx=512)
    judge = LlamaCppJudge(smollm2_gguf, format_prompt=format_prompt)
    judge.check()
    try:
        server = OpenAIJudge("any", format_prompt=format_prompt, base_url=judge.base_url, api_key_env=None)
        through_http = score_responses(responses(8), server, tmp_path / "http.jsonl", concurrency=8)
        in_process = score_responses(responses(3), judge, tmp_path / "scores.jsonl", concurrency=8)
    finally:
        judge.close()
    assert [json.loads(item.raw)["score"] for item in in_process] == [item.score for item in in_process]
    assert [item.score for item in through_http[:3]] == [item.score for item in in_process]


def test_without_a_judge_there_is_no_mean_not_even_with_failures_as_zero() -> None:
    summary = summarise([ScoredEntry(0, None, None, True, 100.0, 100.0)], {"kind": "none"})
    assert [summary[key] for key in ("scored", "failed", "mean", "mean_failed_as_zero")] == [0, 0, None, None]
