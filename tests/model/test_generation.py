"""Generation against the naive loop, and SmolLM2 against llama.cpp."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.model import generation
from instruct_lm.model.generation import Sampling, generate, stream
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.pretrained import load_pretrained
from tests.conftest import ROOT
from tests.model.conftest import CONFIGS, random_model

END = 7


def naive(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One token at a time, the whole text anew each time."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_new_tokens, model.config.block_size):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=48), min_size=1, max_size=6),
    st.lists(st.integers(0, 100), max_size=5),
    st.integers(1, 60),
    st.integers(1, 4),
    st.sampled_from(sorted(CONFIGS)),
)
def test_batched_greedy_equals_the_naive_loop(
    prompts: list[list[int]], shared: list[int], max_new_tokens: int, batch_size: int, name: str
) -> None:
    model = random_model(CONFIGS[name])
    prompts = [(shared + prompt)[:48] for prompt in prompts]
    made = generate(model, prompts, max_new_tokens=max_new_tokens, end_tokens=[END], batch_size=batch_size)
    assert made == [naive(model, prompt, max_new_tokens) for prompt in prompts]


def test_rows_leave_as_they_finish(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = GPT.decode
    monkeypatch.setattr(GPT, "decode", lambda self, ids, cache: sizes.append(len(ids)) or decode(self, ids, cache))
    prompts = [[i] * (40 - 8 * i) for i in range(1, 5)]  # 32, 24, 16 and 8 tokens of 48: each has different room
    made = generate(model, prompts, max_new_tokens=100)
    assert [len(ids) for ids in made] == [16, 24, 32, 40]
    assert sizes == [4] * 15 + [3] * 8 + [2] * 8 + [1] * 8


@pytest.mark.parametrize(("ended", "rows"), [(1, 10), (2, 8)])
def test_ended_rows_stay_while_nine_in_ten_go_on(monkeypatch: pytest.MonkeyPatch, ended: int, rows: int) -> None:
    sizes = []
    decode = GPT.decode
    monkeypatch.setattr(GPT, "decode", lambda self, ids, cache: sizes.append(len(ids)) or decode(self, ids, cache))
    prompts = [[1] * 47] * ended + [[1] * 45] * (10 - ended)  # of 48: room for one token, and for three
    made = generate(random_model(CONFIGS["gpt2"]), prompts, max_new_tokens=9)
    assert [len(ids) for ids in made] == [1] * ended + [3] * (10 - ended)
    assert sizes == [rows, rows]


def test_a_sampled_answer_does_not_depend_on_its_batch(model: GPT) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2]]
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=5)
    together = generate(model, prompts, max_new_tokens=20, sampling=sampling)
    assert generate(model, prompts, max_new_tokens=20, sampling=sampling, batch_size=1) == together
    other = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=6)
    assert generate(model, prompts, max_new_tokens=20, sampling=other) != together


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),  # 0.5 is short of 0.7, 0.75 reaches it
        (Sampling(temperature=1.0, top_p=0.4), [1, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_sampling_draws_from_the_stated_distribution(sampling: Sampling, expected: list[float]) -> None:
    n = 20_000
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(n, 4)  # not sorted, so that order matters
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    shares = torch.bincount(sampling.choose(logits, generators), minlength=4)[[1, 3, 2, 0]] / n
    # 0.015: 4 standard errors at p = 0.5
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.015)


def drawn(sampling: Sampling, logits: torch.Tensor, n: int = 300) -> set[int]:
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    return set(sampling.choose(logits.expand(n, -1), generators).tolist())


def test_top_p_stops_at_the_token_that_reaches_it_exactly() -> None:
    equal = torch.zeros(8)  # probabilities of 1/8, whose sums are exact
    assert len(drawn(Sampling(temperature=1.0, top_p=0.5), equal)) == 4
    assert len(drawn(Sampling(temperature=1.0, top_p=0.501), equal)) == 5
    assert len(drawn(Sampling(temperature=1.0, top_k=4, top_p=0.5), equal)) == 2  # half of what top_k leaves


def test_tokens_of_one_prompt_are_drawn_anew_each_time() -> None:
    generators = [torch.Generator().manual_seed(3)]
    tokens = [int(Sampling(temperature=1.0).choose(torch.zeros(1, 1000), generators)) for _ in range(20)]
    assert len(set(tokens)) > 15


def test_prompts_of_similar_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    monkeypatch.setattr(
        generation, "stream", lambda model, prompts, **_: batches.append([len(ids) for ids in prompts]) or []
    )
    generate(random_model(CONFIGS["gpt2"]), [[1] * n for n in (3, 9, 1, 8, 5)], batch_size=2, max_new_tokens=1)
    assert batches == [[9, 8], [5, 3], [1]]


def test_no_prompt_draws_as_another_does_whatever_the_seed() -> None:
    draws = [torch.rand(1, generator=Sampling(seed=seed).generator(n)).item() for seed in range(5) for n in range(40)]
    assert len(set(draws)) == 200


@pytest.mark.parametrize("training", [True, False])
def test_a_model_answers_without_dropout_and_keeps_its_mode(training: bool) -> None:
    model = random_model(dataclasses.replace(CONFIGS["gpt2"], dropout=0.5)).train(training)
    modes: list[bool] = []
    model.ln_f.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    made = generate(model, [[1, 2, 3]], max_new_tokens=5)
    assert not any(modes)
    assert made == [naive(random_model(CONFIGS["gpt2"]), [1, 2, 3], 5)]
    assert model.training == model.h[0].dropout.training == training
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        generate(model, [[]], max_new_tokens=5)
    assert model.training == training


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_values_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("prompt", [[], [1] * 49])
def test_prompts_that_do_not_fit_are_named(model: GPT, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens"):
        list(stream(model, [[1], prompt], max_new_tokens=3))


@pytest.mark.slow
def test_smollm2_continues_as_llama_cpp_does(smollm2_gguf: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    conf = yaml.safe_load((ROOT / "conf" / "model" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    config = GPTConfig(**{key: conf[key] for key in GPTConfig.__dataclass_fields__})
    tokenizer = load_tokenizer(smollm2_gguf)
    # llama.cpp rounds activations to 8 bits, so the two agree where the model is sure: on questions that it can answer.
    questions = [
        "Name three colors.",
        "What is the capital of France?",
        "What is 2 plus 2?",
        "Who wrote Romeo and Juliet?",
        "What is the opposite of hot?",
        "What is the boiling point of water?",
    ]
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    ids = [tokenizer.encode_special(prompt) for prompt in [*prompts, "1, 2, 3, 4, 5, 6,"]]
    made = generate(load_pretrained(config, smollm2_gguf), ids, max_new_tokens=24, end_tokens=tokenizer.stop_tokens)
    ours = [tokenizer.decode(answer).removesuffix("<|im_end|>") for answer in made]

    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_gguf)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    server = xllamacpp.Server(params)
    answers = [server.handle_completions({"prompt": prompt, "max_tokens": 24, "temperature": 0}) for prompt in ids]
    assert ours == [answer["choices"][0]["text"] for answer in answers]


def test_a_lower_precision_generates_what_its_naive_loop_does(model: GPT) -> None:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache(1, 2).kv.dtype == torch.bfloat16
        assert generate(model, [[1, 2, 3]], max_new_tokens=4, end_tokens=[END]) == [naive(model, [1, 2, 3], 4)]
