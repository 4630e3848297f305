"""Every configuration key acts: two values of it give two results.

A line of `ACTS` is a key with a value, after what it needs beside it; the results with and without the key must differ,
and `test_the_same_values_give_the_same_results` shows that they differ by nothing else. `ELSEWHERE` names the tests of
keys that take processes, devices or a network to show.
"""

import contextlib
import io
import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
from instruct_lm.commands import build
from instruct_lm.commands.check_config import all_keys
from instruct_lm.commands.export import main as export
from instruct_lm.commands.runs import save_config
from instruct_lm.config import COMMANDS
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError
from instruct_lm.evaluation import scoring
from instruct_lm.evaluation.responses import RESPONSES
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.io.conf_files import flatten
from instruct_lm.io.files import sha256_of
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.report.settings import differing
from tests.conftest import ROOT
from tests.data.hub_tokenizers import train as train_tokenizer
from tests.data.hub_tokenizers import write_folder
from tests.evaluation.judge_server import JudgeServer, answering
from tests.run_commands import typed

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8}
SMALL = ["model=gpt2-tiny", *(f"model.{key}={value}" for key, value in SIZES.items()), "cache_dir=$cache"]
DATA = [*SMALL, "data=sample", "data.source=$entries", "device=cpu", "generation.max_new_tokens=2"]

PLACES: dict[str, str] = {}
"""$name in a line → path, address or hash; `stage` fills it."""

FOLDERS = map(str, itertools.count())
"""Names that are new each time."""


def entries(output: str) -> list[dict[str, str]]:
    """40 of different lengths: one without an answer, one with a stand-in for no input, two nearly alike."""
    made = [
        {"instruction": f"Say {'very ' * (i % 7)}{i}.", "input": "", "output": output.format(i) * (i % 3 + 1)}
        for i in range(40)
    ]
    made[2]["output"] = ""
    made[3]["input"] = "<noinput>"
    made[-1]["instruction"] = made[5]["instruction"] + "."
    return made


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files, runs and servers that the lines name."""
    folder = tmp_path_factory.mktemp("keys")
    answers = [{"instruction": "a", "output": "1", "model_response": f"{i}"} for i in range(3)]
    files = {"entries": entries("{}!"), "others": entries("{}?"), "answers": answers, "fewer_answers": answers[:2]}
    for name, content in (files | {"gguf": "one judge", "other_gguf": "another"}).items():
        PLACES[name] = str(folder / name) + ".json"
        Path(PLACES[name]).write_text(json.dumps(content))
    for seed, name in enumerate(("base", "other_base")):
        model = GPT(GPTConfig(vocab_size=257, block_size=512, **SIZES)).init_weights(seed)
        save_pretrained(model, load_tokenizer("bytes"), folder / name)
        PLACES[name] = str(folder / name / "model.safetensors")
    tokenizer = write_folder(folder / "tokenizer", train_tokenizer("gpt-2"))
    PLACES.update(tokenizer=str(tokenizer / "tokenizer.json"), wrong_sha256="a" * 64)
    PLACES.update(cache=str(folder / "cache"), other_cache=str(folder / "other_cache"), here=str(folder))
    with (
        pytest.MonkeyPatch.context() as patch,
        JudgeServer(answering("85")) as one,
        JudgeServer(answering("40")) as two,
    ):
        patch.chdir(folder)
        patch.setenv("KEY_OF_JUDGE", "secret")
        PLACES.update(server=one.url, other_server=two.url)
        for seed, name in enumerate(("run", "other_run")):  # this rate makes the last weights worse than the best
            PLACES[name] = str(run_of("optimizer.lr=0.1", f"seed={seed}")[0])
        yield
    result.cache_clear()
    PLACES.clear()


def config(command: str, *overrides: str) -> Any:
    given = [Template(override).substitute(PLACES) for override in overrides]
    try:
        return typed(command, *given)
    except InputError as error:  # which shows that a value is checked, not that it acts
        pytest.fail(f"the configuration refuses {given}: {error}")


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def run_of(*overrides: str) -> tuple[Path, list[Any], str]:
    """A short training run: its folder, its tuner with the passes through a block, and what it said."""
    tuners: list[Any] = []
    make = build.build_tuner

    def build_tuner(*args: Any) -> Any:
        tuner = make(*args)
        tuner.passes = 0

        def count(*_: Any) -> None:
            tuner.passes += tuner.training

        tuner.model.h[0].register_forward_pre_hook(count)
        tuners.append(tuner)
        return tuner

    folder = Path(PLACES["here"], next(FOLDERS))
    given = [*DATA, "data.limit=20", "trainer.progress=false", "optimizer.lr=1e-2", f"output_dir={folder}"]
    values = config("train", *given, *overrides)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(build, "build_tuner", build_tuner)
        patch.setattr(train, "evaluate_run", lambda run: print("evaluating", file=said))
        save_config(values)  # as Hydra does
        train.main(values)
    return values.folder, tuners, said.getvalue()


# What is looked at: each function takes overrides and gives values that can be compared.


def model(*overrides: str) -> Any:
    """The weights at the start; and once all are large, logits in training."""
    values = config("train", *SMALL, "data.layout=padded", *overrides)
    made = build.build_model(values, build.build_fetcher(values))
    start = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in made.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    torch.manual_seed(0)
    logits = made.train()(torch.arange(30)[None]).tolist()
    return start, logits, [name for name, parameter in made.named_parameters() if parameter.requires_grad]


def data(*overrides: str) -> Any:
    """The rows of each split with their weights, and the plan of an epoch."""
    values = config("train", *DATA, *overrides)
    fetcher = build.build_fetcher(values)
    made = build.build_datamodule(values, build.build_tokenizer(values.model, fetcher), fetcher)
    made.setup()
    rows = {
        name: [
            (row.input_ids.tolist(), weights.tolist()) for row, weights in zip(part.encoded, part.weights, strict=True)
        ]
        for name, part in made.encoded.items()
    }
    loader = made.train_dataloader()
    return rows, [micro.rows for micro in loader.plan], loader.num_workers


def faster(*overrides: str) -> Any:
    """The kinds of a tuner's layers, and its loss."""
    values = config("train", *DATA, *overrides)
    tuner = build.build_tuner(values, GPT(GPTConfig.of(values.model)), load_tokenizer("bytes"))
    return {type(module).__name__ for module in tuner.modules()}, tuner.loss.__name__


def answers(*overrides: str) -> Any:
    """Answers of a model whose weights are large, and how many were made at once."""
    values = config("evaluate", *SMALL, "generation.max_new_tokens=4", *overrides)
    made, generator = GPT(GPTConfig.of(values.model)), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    together: list[int] = []
    responder = build.build_responder(values, made, load_tokenizer("bytes"))
    return responder.answer([Conversation.of(f"Say {i}.", "", "") for i in range(3)], together.append), together


def training(*overrides: str) -> Any:
    """What a short run leaves, says and computes."""
    folder, (tuner,), said = run_of(*overrides)
    log = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = set(log.Tags()["scalars"]) & {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/response_loss"}
    # Sorted, since event files of the same second are not read in the order of their steps.
    curves = {name: sorted((point.step, point.value) for point in log.Scalars(name)) for name in names}
    return {
        "weights": {name: tensor.tolist() for name, tensor in tuner.state_dict().items()},
        "curves": curves,
        "gradients": [name for name, parameter in tuner.named_parameters() if parameter.grad is not None],
        "passes": tuner.passes,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "model": json.loads((folder / "summary.json").read_text())["model"],
        "bar": "epoch 1/" in said,
        "evaluated": "evaluating" in said,
    }


def judging(*overrides: str) -> Any:
    """What is sent to judges, with how much patience and how many at a time, and the files written."""
    seen: list[Any] = []
    send = requests.Session.request

    def request(self: Any, method: str, url: str, **options: Any) -> Any:
        headers = options["auth"](requests.Request(method, url).prepare()).headers if options["auth"] else {}
        seen.append((method, url, json.dumps(options["json"]), options["timeout"], headers.get("Authorization")))
        return send(self, method, url, **options)

    def pool(workers: int) -> ThreadPoolExecutor:
        seen.append(("workers", str(workers)))
        return ThreadPoolExecutor(workers)

    folder = Path(PLACES["here"], next(FOLDERS))
    given = ["model=gpt2-tiny", "device=cpu", "cache_dir=$cache", f"output_dir={folder}"]
    given += [] if any(override.startswith("run=") for override in overrides) else ["responses=$answers"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests.Session, "request", request)
        patch.setattr(scoring, "ThreadPoolExecutor", pool)
        evaluate.main(config("evaluate", *given, *overrides))
    summaries = {path.parent.name == "second": json.loads(path.read_text()) for path in folder.rglob("summary.json")}
    means = {second: (summary["n"], summary["mean"]) for second, summary in summaries.items()}
    return sorted(map(str, seen)), means


def judge(*overrides: str) -> Any:
    """What a judge says of itself."""
    pytest.importorskip("xllamacpp")
    values = config("evaluate", *SMALL, *overrides)
    judges = [build.build_judge(each, build.build_fetcher(values)) for each in (values.judge, values.second_judge)]
    return [scoring.describe_judge(each) for each in judges]


def evaluation(*overrides: str) -> Any:
    """The answers of a run."""
    folder = Path(PLACES["here"], next(FOLDERS))
    evaluate.main(config("evaluate", *DATA, "data.limit=20", f"output_dir={folder}", *overrides))
    responses = json.loads((folder / RESPONSES).read_text())
    return [(entry["instruction"], entry["model_response"]) for entry in responses]


def exported(*overrides: str) -> Any:
    """The files of an export; made a second time over the first."""
    folder = Path(PLACES["here"], next(FOLDERS))
    values = config("export", *SMALL, f"output_dir={folder}", *overrides)
    export(values)
    files = {name: digest for name, digest in digests(folder).items() if name != "README.md"}
    try:
        export(values)
    except InputError:
        return files, "not twice"
    return files, "twice"


def fetcher(*overrides: str) -> Any:
    """What is fetched through."""
    return vars(build.build_fetcher(config("train", *SMALL, *overrides)))


def named(*overrides: str) -> Any:
    """The keys that tell two runs on different data apart in a report."""
    runs = [SimpleNamespace(settings=flatten(config("train", *DATA, *given).model_dump())) for given in ((), overrides)]
    return differing(runs)  # type: ignore[arg-type]


def where(*overrides: str) -> Any:
    """Where results go."""
    return config("train", *DATA, *overrides).folder


SERVED = "judge.kind=openai judge.model=small judge.base_url=$server judge.api_key_env=null"
JUDGING = [
    *(f"{SERVED} judge.base_url=$other_server", f"{SERVED} judge.model=larger"),
    *(f"{SERVED} judge.api_key_env=KEY_OF_JUDGE", f"{SERVED} judge.concurrency=3", f"{SERVED} judge.timeout=7"),
    *(f"{SERVED} judge.temperature=1", f"{SERVED} judge.seed=5", f"{SERVED} judge.max_tokens=100"),
    *(f"{SERVED} judge.reasoning_effort=low", f"{SERVED} judge.prompt='Rate {{response}}'"),
    f"{SERVED} judge.prompt='Rate {{response}}' judge.scale=[0,200]",
]
JUDGE = ["judge.weights=$other_gguf", "judge.weights_sha256=$wrong_sha256"]
JUDGE = [f"judge.kind=llamacpp judge.weights=$gguf {key}" for key in JUDGE]


def of_both(lines: list[str]) -> list[str]:
    """Of the judge, and of the second one."""
    return [*lines, *(line.replace("judge.", "second_judge.") for line in lines)]


ACTS: dict[Callable[..., Any], list[str]] = {
    model: [
        *("model.vocab_size=300", "model.block_size=64", "model.n_layer=2", "model.n_head=4", "model.n_embd=16"),
        *("model.n_kv_head=1", "model.head_dim=8", "model.n_inner=16", "model.norm=rmsnorm", "model.norm_eps=1e-2"),
        *("model.position=rotary", "model.position=rotary model.rope_base=50"),
        "model.position=rotary model.rope_factors=[1,4]",
        *("model.activation=swiglu", "model.bias=false", "model.bias=false model.qkv_bias=true", "model.qk_norm=true"),
        *("model.tied=false", "model.dropout=0.1", "seed=7"),
        *("model.weights=$base model.weights=$other_base", "model.weights=$base model.weights_sha256=$wrong_sha256"),
        *("lora=r16 lora.rank=3", "lora=r16 lora.alpha=5", "lora=r16 lora.dropout=0.1"),
        *("lora=r16 lora.targets=[mlp.fc]", "lora=r16 lora.base_dtype=bfloat16"),
    ],
    data: [
        *(
            "data.source=$others",
            "data.sha256=$wrong_sha256",
            "'data.columns={instruction: output, output: instruction}'",
        ),
        *("data.unusable=error", "data.clean=true", "data.train_fraction=0.5", "data.test_fraction=0.05"),
        *("data.shuffle=true", "data.shuffle=true seed=7", "seed=7", "data.deduplicate=0.8", "data.batch_size=3"),
        *("data.max_length=170", "data.max_length=170 data.overlong=truncate", "data.num_workers=2", "data.limit=30"),
        *("data.group_by_length=true", "prompt.style=phi3", "mask_instructions=true", "prompt_loss_weight=0.5"),
        *("mask_instructions=true mask_header=true", "model.vocab_size=2000 model.tokenizer=$tokenizer"),
        "model.vocab_size=2000 model.tokenizer=$tokenizer model.tokenizer_sha256=$wrong_sha256",
    ],
    faster: ["data.layout=padded", "fast=false"],
    training: [
        *("seed=7", "optimizer.lr=1e-3", "optimizer.weight_decay=0", "optimizer.beta1=0.5", "optimizer.beta2=0.5"),
        *("optimizer.eps=1e-2", "optimizer.warmup_steps=2", "optimizer.schedule=cosine", "optimizer.name=adafactor"),
        *("optimizer.in_backward=true", "trainer.max_epochs=1", "trainer.max_steps=2", "trainer.accumulate=2"),
        *("trainer.clip_norm=0.1", "trainer.val_interval=1", "trainer.log_interval=2", "trainer.progress=true"),
        *("trainer.activation_checkpointing=true", "trainer.keep_last=false", "evaluate=true", "model.name=other"),
        *("trainer.max_epochs=1 trainer.checkpoint_steps=1", "trainer.max_epochs=1 trainer.checkpoint_minutes=1e-9"),
        *("optimizer.lr=0.1 trainer.patience=1", "device.precision=bf16-mixed"),
    ],
    answers: [
        *("generation.max_new_tokens=2", "generation.temperature=1", "generation.batch_size=2"),
        *("generation.temperature=2 generation.top_k=1", "generation.temperature=2 generation.top_p=0.1"),
        "generation.temperature=2 generation.seed=5",
    ],
    judging: [
        *of_both(JUDGING),
        f"{SERVED} judge.kind=reference",
        "second_judge.kind=reference",
        "responses=$fewer_answers",
    ],
    judge: of_both(JUDGE),
    evaluation: ["run=$run", "run=$run run=$other_run", "run=$run checkpoint=last", "split=validation"],
    exported: [
        *("run=$run", "run=$run checkpoint=last", "format=gguf", "dtype=f16", "overwrite=true"),
        "format=ollama num_ctx=100",
    ],
    fetcher: ["cache_dir=$other_cache", "offline=true", "mirror=http://localhost:1"],
    named: ["data.limit=5 data.name=other"],
    where: ["output_dir=there"],
}

ELSEWHERE = {
    "resume": "tests/test_end_to_end.py::test_an_interrupted_run_goes_on_to_the_same_end",
    "fail_fast": "tests/commands/test_sweeps.py::test_fail_fast_ends_a_sweep_at_its_first_failure",
    "device.devices": "tests/training/test_strategies.py::test_weights_optimizer_and_losses_are_those_of_one_process",
    "device.strategy": "tests/training/test_strategies.py::test_weights_optimizer_and_losses_are_those_of_one_process",
    "device.num_nodes": "tests/commands/test_launch.py::test_torchrun_and_the_configuration_must_agree",
    "device.accelerator": "tests/test_config.py::test_auto_takes_cuda_then_mps_then_cpu",
}

LINES = [(look, line) for look, lines in ACTS.items() for line in lines]


def key_of(line: str) -> str:
    return shlex.split(line)[-1].partition("=")[0]


@cache
def result(look: Callable[..., Any], *overrides: str) -> Any:
    try:
        return look(*overrides)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(("look", "line"), LINES, ids=[line.split()[-1] for _, line in LINES])
def test_a_key_acts(look: Callable[..., Any], line: str) -> None:
    *beside, _ = overrides = shlex.split(line)
    assert not isinstance(result(look, *beside), str), result(look, *beside)
    assert result(look, *overrides) != result(look, *beside)


@pytest.mark.parametrize("look", ACTS, ids=lambda look: look.__name__)
def test_the_same_values_give_the_same_results(look: Callable[..., Any]) -> None:
    assert look() == result(look)


def test_every_key_is_shown_to_act() -> None:
    keys = {key for kind in COMMANDS.values() for key in all_keys(kind)}
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert {*map(key_of, itertools.chain(*ACTS.values())), *ELSEWHERE} == leaves


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_what_is_shown_elsewhere_is_shown(place: str) -> None:
    path, _, name = place.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
