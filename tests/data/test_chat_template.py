"""Chat templates as prompt styles, against transformers' `apply_chat_template` and its assistant masks."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.data.chat_template import TemplateStyle
from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.dataset import load_conversations
from instruct_lm.data.encoded import loss_weights
from instruct_lm.data.encoding import encode_conversations, encode_pieces
from instruct_lm.data.pieces import Kind, prompt_pieces
from instruct_lm.data.prompts import get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError
from tests.data.hub_tokenizers import KINDS, train, write_folder

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|header|>", "<think>", "</think>"]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

# In the manner of SmolLM2, with a default system turn.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of Llama 3: strips each turn.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|header|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|header|>\n\n' }}
{%- endif %}
"""
# Of Qwen 3: the last answer gets an empty thought, and newlines before an answer go.
THINKING = """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last %}
            {{- '<think>\n\n</think>\n\n' }}
        {%- endif %}
        {{- message.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Of Phi 3: a conversation that ends has a token more.
ENDS = (
    "{% for message in messages %}{{ '<|header|>' + message.role + '\n' + message.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Of TRL: the template itself marks what is trained.
MARKED = """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {% generation %}
        {{- '\n' + message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
SPACED = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "thinking": THINKING, "ends": ENDS, "marked": MARKED, "spaced": SPACED}
SINGLE = (Turn("user", "Hi."), Turn("assistant", "Hello."))
SEVERAL = (Turn("system", "Be brief."), *SINGLE, Turn("user", "2 + 2?"), Turn("assistant", "4"))


class Bytes:
    """One token a byte, with control tokens."""

    name, bos, end_of_text, control_tokens = "bytes", None, 0, {text: 1000 + i for i, text in enumerate(CONTROL)}
    end_token = Tokenizer.end_token

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_special(self, text: str) -> list[int]:
        for token in CONTROL:
            before, found, after = text.partition(token)
            if found:
                return [*self.encode_special(before), self.control_tokens[token], *self.encode_special(after)]
        return self.encode(text)

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        found = re.finditer("|".join(map(re.escape, CONTROL)), text)
        return [(*match.span(), self.control_tokens[match[0]]) for match in found]


def style_of(template: str) -> TemplateStyle:
    return TemplateStyle(template, VARIABLES, CONTROL)


def text_of(template: str, turns: Any) -> str:
    return "".join("$" if piece.ends else piece.text for piece in style_of(template).pieces(turns))


@pytest.fixture(scope="module")
def upstream() -> Any:
    """A tokenizer of transformers without merges."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **VARIABLES)


BLANKS = st.sampled_from(["", "", " ", "\n", "\n ", " \n\n"])  # which templates strip or keep
CONTENT = st.text(st.characters(categories=["L", "N", "P", "Z"], include_characters="\n"), min_size=1).filter(str.strip)
CONTENT = st.tuples(BLANKS, CONTENT, BLANKS).map("".join)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(TURNS, st.booleans(), st.sampled_from(list(TEMPLATES)))
def test_rows_are_what_transformers_renders(upstream: Any, texts: Any, system: bool, name: str) -> None:
    turns = [Turn("system", "Be brief.")] * system
    for asked, answered in texts:
        turns += [Turn("user", asked), Turn("assistant", answered)]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert text_of(TEMPLATES[name], turns) == upstream.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False
    )


@pytest.mark.parametrize("turns", [SINGLE, SEVERAL], ids=["one exchange", "several turns"])
def test_marks_decide_what_is_trained(upstream: Any, turns: tuple[Turn, ...]) -> None:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = upstream.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    (row,) = encode_conversations([Conversation(turns)], Bytes(), style_of(MARKED))
    assert len(row.input_ids) == len(expected["input_ids"])
    assert (row.kinds == Kind.RESPONSE).tolist() == [bool(mask) for mask in expected["assistant_masks"]]


RESPONSES = {
    "chatml": ["Hello.<|im_end|>\n", "4<|im_end|>\n"],
    "llama3": ["Hello.<|eot|>", "4<|eot|>"],
    "thinking": ["Hello.<|im_end|>\n", "4<|im_end|>\n"],
    "ends": ["Hello.<|eot|>\n", "4<|eot|>\n</s>"],
    "marked": ["\nHello.<|im_end|>", "\n4<|im_end|>"],
    "spaced": [" Hello.</s>", " 4</s>"],
}
HEADERS = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|header|>assistant<|header|>\n\n",
    "thinking": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "ends": "<|header|>assistant\n",
    "marked": "",
    "spaced": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_responses_headers_and_the_end_token(name: str) -> None:
    style = style_of(TEMPLATES[name])
    responses, kind = [], None
    for piece in style.pieces(SEVERAL):
        if piece.kind == Kind.RESPONSE:
            responses += [""] if kind != Kind.RESPONSE else []
            responses[-1] += piece.text
        kind = piece.kind
    assert responses == RESPONSES[name]
    assert style.header == HEADERS[name]
    assert style.end == {"llama3": "<|eot|>", "ends": "<|eot|>", "spaced": "</s>"}.get(name, "<|im_end|>")


@pytest.mark.parametrize("name", ["chatml", "llama3", "ends"])
def test_masking_prompt_and_header_trains_each_answer_and_its_end(name: str) -> None:
    (row,) = encode_conversations([Conversation(SEVERAL)], Bytes(), style_of(TEMPLATES[name]))
    trained = row.input_ids[loss_weights(row, 0.0, mask_header=True) > 0]
    assert trained.tolist() == Bytes().encode_special("".join(RESPONSES[name]))


@given(TURNS, st.sampled_from(list(TEMPLATES)))
def test_a_prompt_is_the_beginning_of_the_row(texts: Any, name: str) -> None:
    turns = [Turn(role, text) for pair in texts for role, text in zip(("user", "assistant"), pair, strict=True)]
    style = style_of(TEMPLATES[name])
    (row,) = encode_conversations([Conversation(tuple(turns))], Bytes(), style)
    unanswered = [*turns[:-1], Turn("assistant", "")]
    pieces = encode_pieces(prompt_pieces(style.pieces(unanswered)), Bytes())
    prompt = [token for item in pieces for token in item.ids]
    assert row.input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_that_people_write_stay_text(name: str) -> None:
    hostile = "".join(CONTROL) + "{{ messages }}{% raw %}"
    turns = (Turn("user", hostile), Turn("assistant", hostile + "a"))
    (plain,) = encode_conversations([Conversation(SINGLE)], Bytes(), style_of(TEMPLATES[name]))
    (row,) = encode_conversations([Conversation(turns)], Bytes(), style_of(TEMPLATES[name]))
    assert (row.input_ids >= 1000).sum() == (plain.input_ids >= 1000).sum()
    assert bytes(row.input_ids[row.input_ids < 1000].tolist()).decode().count(hostile) == 2


def test_a_space_before_a_turn_joins_its_first_word() -> None:
    style = style_of(SPACED)
    assert [piece.text for piece in style.pieces(SINGLE)] == ["user:", " Hi.", "</s>assistant:", " Hello.", "</s>"]


def test_a_template_without_an_end_token_gets_the_tokenizers() -> None:
    assert text_of("{% for m in messages %}{{ m.role + '\n' + m.content }}{% endfor %}", SINGLE).endswith("Hello.$")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("{% for %}", SINGLE, "is not valid"),
        ("{{ messages[0].content }}", SINGLE, "does not write each turn once and in order: user, assistant"),
        ("{{ ''.__class__.__mro__ }}", SINGLE, "refuses user, assistant"),
        ("{{ raise_exception('no') }}", SINGLE, "refuses user, assistant: no"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            SEVERAL,
            "refuses system, user, assistant, user, assistant: no system",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str, turns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        style_of(template).pieces(turns)
    assert "hoose another prompt style" in str(error.value)


@pytest.mark.parametrize(
    ("template", "kind"), [("qwen2_5_training", "qwen2"), ("qwen3_training", "qwen2"), ("llama3_training", "llama-bpe")]
)
def test_labels_are_those_of_trls_assistant_only_loss(tmp_path: Path, template: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if (trl := find_spec("trl")) is None or trl.origin is None:
        pytest.skip("TRL, whose templates these are, is not installed")
    text = Path(trl.origin).with_name("chat_templates").joinpath(f"{template}.jinja").read_text("utf-8")
    settings = {**KINDS[kind].settings, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text}
    folder = write_folder(tmp_path / "base", train(kind), tokenizer_config=settings)
    tokenizer, upstream = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    random, texts = Random(1), [turn.text for entry in load_conversations("sample") for turn in entry.turns]
    for number in range(60):
        roles = ["system"] * (number % 2) + ["user", "assistant"] * random.randint(1, 4)
        turns = tuple(Turn(role, random.choice(texts)) for role in roles)
        expected = upstream.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (row,) = encode_conversations([Conversation(turns)], tokenizer, get_style("template", tokenizer))
        assert row.input_ids.tolist() == expected["input_ids"]
        assert (loss_weights(row, 0.0, mask_header=True) > 0).tolist() == [bool(m) for m in expected["assistant_masks"]]
