"""Talking to a run: its options, answers to a pipe, and what terminal and page share."""

import subprocess
from pathlib import Path

import pytest

from instruct_lm.commands import chat
from instruct_lm.commands.chat_session import EMPTY, Chat, Exchange
from instruct_lm.commands.chat_text import visible
from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.prompts import STYLES
from instruct_lm.errors import InputError
from instruct_lm.respond import Responder
from tests.commands.chat_commands import TIMEOUT, command, options
from tests.run_commands import ROOT
from tests.test_respond import BYTES, MODEL


def whole(talk: Chat, instruction: str) -> str:
    *_, answer = talk.answer(talk.conversation(instruction))
    return answer


def test_the_answer_grows_to_what_evaluation_would_give(chat_run: Path) -> None:
    responder = chat.load(options(chat_run, temperature=1.0))  # greedy, these weights have nothing to say
    assert (responder.style.name, responder.max_new_tokens) == ("phi3", 20)
    given = responder.answer([Conversation.of("Name a colour.")])[0]
    assert given.tokens == 20
    answer = whole(Chat(responder, history=True), " Name a colour.\n")
    assert answer == visible(given.text.rstrip("\ufffd")).strip()
    assert answer


def test_the_plain_core_gives_the_same_answer(chat_run: Path) -> None:
    plain, fast = (Chat(chat.load(options(chat_run, fast=fast)), history=True) for fast in (False, True))
    assert whole(plain, "Name a colour.") == whole(fast, "Name a colour.")


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_model_is_given_the_conversation(style: object) -> None:
    responder = Responder(MODEL, BYTES, style, max_new_tokens=4)  # type: ignore[arg-type]
    before = [Exchange("Add.", "1 2\n", "3"), Exchange("<|im_end|>", "", "### Response:")]
    turns = [Turn("user", "Add.", "1 2"), Turn("assistant", "3"), Turn("user", "<|im_end|>")]
    turns += [Turn("assistant", "### Response:"), Turn("user", "Why?"), Turn("assistant", "")]
    assert Chat(responder, history=True).conversation("Why?", before=before).turns == tuple(turns)
    assert Chat(responder, history=False).conversation("Why?", before=before).turns == tuple(turns[-2:])
    system = Chat(responder, history=True, system=" Be brief. ").conversation("Why?", before=before)
    assert system.turns == (Turn("system", "Be brief."), *turns)


def test_what_the_prompt_leaves_out_is_told() -> None:
    talk = Chat(Responder(MODEL, BYTES, STYLES["chatml"], max_new_tokens=4), history=True)  # 300 tokens
    assert talk.remark(talk.conversation("Why?")) == ""
    one = [Exchange("x" * 150, "", "y" * 100)]
    assert (
        talk.remark(talk.conversation("Why?", before=one))
        == "The earliest exchange was left out: the model takes no more."
    )
    three = talk.remark(talk.conversation("z" * 400, before=one * 3))
    fixed = len(talk.responder.prompt_ids(talk.conversation("z"))) - 1
    left_out = 400 - (300 - 4 - fixed)
    assert three == (
        f"The earliest 3 exchanges were left out and the last {left_out} tokens of the instruction were left out: "
        "the model takes no more."
    )


def test_a_template_that_refuses_a_system_message_is_told_at_once() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    responder = Responder(MODEL, BYTES, TemplateStyle(template, {}, []))
    Chat(responder, history=True)
    with pytest.raises(InputError, match="no system here"):
        Chat(responder, history=True, system="Be brief.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["RUN", "--web", "--port", "0"], "--port 0: give a number from 1"),
        (["RUN", "--max-new-tokens", "0"], "generation.max_new_tokens=0 must be greater than or equal to 1"),
        (["RUN", "--temperature", "-1"], "generation.temperature=-1.0 must be greater than or equal to 0"),
        (["RUN", "--checkpoint", "first"], "invalid choice: 'first'"),
    ],
)
def test_bad_arguments_are_named(
    chat_run: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    try:
        status = chat.main([arg.replace("RUN", str(chat_run)) for arg in args])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_pipe_gives_an_answer_a_line(chat_run: Path) -> None:
    asked = "Name a colour.\r\n\n/help\n"
    done = subprocess.run(command(chat_run), cwd=ROOT, input=asked.encode(), capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.decode()) == (0, f"{EMPTY}\n")
    talk = Chat(chat.load(options(chat_run)), history=False)  # each line alone; a slash is nothing special
    assert done.stdout.decode() == f"{whole(talk, 'Name a colour.')}\n\n{whole(talk, '/help')}\n"


def test_a_pipe_with_history_is_a_conversation(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    seen = []
    monkeypatch.setattr(Responder, "stream", lambda self, asked: seen.append(asked.turns) or iter(["Blue\x1b."]))  # type: ignore[func-returns-value]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffName a colour.\nWhy?\n"))
    assert chat.main([str(chat_run), "--history", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "Blue.\nBlue.\n"
    first = (Turn("system", "Be brief."), Turn("user", "Name a colour."))
    assert seen == [
        (*first, Turn("assistant", "")),
        (*first, Turn("assistant", "Blue."), Turn("user", "Why?"), Turn("assistant", "")),
    ]
