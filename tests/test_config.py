import hashlib
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.commands.build import choose_accelerator
from instruct_lm.commands.check_config import all_keys, find_faults, make_config, nest
from instruct_lm.config import (
    COMMANDS,
    DataConfig,
    DeviceConfig,
    JudgeConfig,
    ModelConfig,
    PromptConfig,
    Target,
    TrainConfig,
)
from instruct_lm.data.prompts import STYLES
from instruct_lm.errors import InputError
from instruct_lm.evaluation.judges.factory import JUDGES
from instruct_lm.io.conf_files import CONF, choices, flatten, model_config
from tests.run_commands import ROOT, composed, typed

GROUPS = ("model", "data", "prompt", "device", "optimizer", "trainer", "lora", "generation", "judge", "experiment")
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"), key=lambda p: p.stem)
]


def test_the_groups_are_the_folders_of_conf() -> None:
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {*GROUPS, "hydra"}


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_of_groups_names_each_choice(group: str) -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    rows = [line.split(" | ") for line in lines if re.match(rf"\| `{group}`( \(.*?\))? \| `", line)]
    assert rows, f"no page has a row | `{group}` | choices | fields |"
    for row in rows:
        assert sorted(re.findall("`(.+?)`", row[1])) == choices(group)


def test_the_defaults_are_the_contracts() -> None:
    values = flatten(composed("train"))
    expected = {
        "mask_instructions": False,
        "prompt_loss_weight": None,
        "mask_header": False,
        "seed": 123,
        "output_dir": None,
        "resume": None,
        "cache_dir": None,
        "offline": False,
        "fast": True,
        "mirror": None,
        "model.name": "gpt2-medium",
        "data.name": "instruction",
        "prompt.style": "alpaca",
        "device.accelerator": "auto",
        "lora.rank": 0,
        "data.train_fraction": 0.85,
        "data.test_fraction": 0.10,
        "data.batch_size": 8,
        "data.layout": "packed",
        "optimizer.lr": 5e-5,
        "optimizer.weight_decay": 0.1,
        "trainer.max_epochs": 2,
        "generation.max_new_tokens": 256,
        "generation.temperature": 0.0,
    }
    assert {key: values[key] for key in expected} == expected
    evaluation = typed("evaluate")
    assert (evaluation.judge.kind, evaluation.split, evaluation.checkpoint) == ("reference", "test", "best")
    assert evaluation.run is None
    assert evaluation.responses is None


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_fills_every_field_and_passes_the_checks(group: str, choice: str) -> None:
    commands = [name for name, kind in COMMANDS.items() if group in kind.model_fields]
    for name in ["train"] if group == "experiment" else commands:
        base = ["model.weights=base"] if choice == "auto" and group == "model" else []
        if name == "export" and group == "lora":
            base.append("run=run")  # a base model has no adapters
        values = composed(name, f"{group}={choice}", *base)
        typed_keys = all_keys(COMMANDS[name])
        leaves = {key for key in typed_keys if not any(other.startswith(f"{key}.") for other in typed_keys)}
        assert leaves == flatten(values).keys()
        config = make_config(COMMANDS[name], values)
        assert make_config(COMMANDS[name], config.model_dump()) == config


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    # Parameters with the tied head counted once: transformers' GPT2LMHeadModel and LlamaForCausalLM of these sizes.
    [
        ("gpt2", (12, 12, 768), 124_439_808),
        ("gpt2-medium", (24, 16, 1024), 354_823_168),
        ("gpt2-large", (36, 20, 1280), 774_030_080),
        ("gpt2-xl", (48, 25, 1600), 1_557_611_200),
        ("smollm2-135m", (30, 9, 576), 134_515_008),
    ],
)
def test_model_sizes_give_the_published_number_of_parameters(
    name: str, sizes: tuple[int, int, int], parameters: int
) -> None:
    import torch

    from instruct_lm.model.gpt import GPT, GPTConfig

    model = model_config(name)
    assert (model.n_layer, model.n_head, model.n_embd) == sizes
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**{field.name: getattr(model, field.name) for field in fields(GPTConfig)}))
    assert sum(p.numel() for p in {id(p): p for p in gpt.parameters()}.values()) == parameters


def test_hashes_in_conf_are_those_of_the_files(shared_dir: Path) -> None:
    def sha256(pattern: str) -> set[str]:
        return {hashlib.sha256(path.read_bytes()).hexdigest() for path in shared_dir.glob(pattern)}

    cfg = typed("train", "model=gpt2-xl")
    assert sha256("data/instruction-data.json") == {cfg.data.sha256}
    assert cfg.model.tokenizer_sha256 in sha256("tiktoken/*")


def test_choices_named_in_two_places_agree() -> None:
    from instruct_lm.data.encoding import OVERLONG
    from instruct_lm.model.lora import TARGETS

    assert get_args(DataConfig.model_fields["overlong"].annotation) == tuple(OVERLONG)
    assert get_args(PromptConfig.model_fields["style"].annotation) == (*STYLES, "template")
    assert {*STYLES, "template"} == {*choices("prompt")}
    assert get_args(JudgeConfig.model_fields["kind"].annotation) == (*JUDGES, "none")
    assert {composed("evaluate", f"judge={name}")["judge"]["kind"] for name in choices("judge")} == {*JUDGES, "none"}
    assert get_args(Target) == TARGETS
    assert tuple(typed("train", "lora=r16").lora.targets) == TARGETS


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_is_read_without_hydra_as_hydra_reads_it(path: Path) -> None:
    assert model_config(path.stem) == ModelConfig.model_validate(composed("train", f"model={path.stem}")["model"])


def test_an_unknown_model_is_named_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"model=gpt3: .*gpt2-medium, gpt2-tiny, gpt2-xl, .*smollm2-135m"):
        model_config("gpt3")


def test_a_typed_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        typed("train").seed = 5


def test_configuration_names_no_code() -> None:
    files = [path for path in CONF.rglob("*.yaml") if "hydra" not in path.parts]
    assert len(files) == len(CHOICES) + len(COMMANDS)
    assert not [path for path in files if "_target_" in path.read_text()]


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_file_begins_with_its_command(path: Path) -> None:
    package, command = path.read_text().splitlines()[:2]
    assert package == "# @package _global_"  # Hydra reads it only on the first line
    assert re.fullmatch(rf"# python train\.py (-m )?experiment={path.stem}", command)


def test_masking_sweeps_five_weights_and_three_seeds() -> None:
    params = yaml.safe_load((CONF / "experiment" / "masking.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert params == {"prompt_loss_weight": "0,0.01,0.1,0.3,1", "seed": "1,2,3"}


REFUSED = [
    # overrides; what the message names: key and value, then the remedy
    (["optimizer.lr=0"], "optimizer.lr=0 must be", "greater than 0"),
    (["optimizer.lr=.nan"], "optimizer.lr=nan", "a finite number"),
    (["optimizer.lr=.inf"], "optimizer.lr=inf", "a finite number"),
    (["optimizer.beta2=1"], "optimizer.beta2=1 ", "less than 1"),
    (["optimizer.schedule=linear"], "optimizer.schedule=linear", "constant or cosine"),
    (["data.batch_size=0"], "data.batch_size=0", "greater than or equal to 1"),
    (["data.limit=0"], "data.limit=0", "greater than or equal to 1"),
    (["data.train_fraction=1"], "data.train_fraction=1 ", "less than 1"),
    (["data.test_fraction=0"], "data.test_fraction=0 ", "greater than 0"),
    (["data.test_fraction=0.2"], "data.train_fraction=0.85 and data.test_fraction=0.2 add up to 1.05", "lower one"),
    (["data.deduplicate=0"], "data.deduplicate=0 ", "greater than 0"),
    (["data.deduplicate=1.1"], "data.deduplicate=1.1", "less than or equal to 1"),
    (["data.overlong=cut"], "data.overlong=cut", "drop, truncate_prompt, truncate or error"),
    (["data.layout=ragged"], "data.layout=ragged", "packed or padded"),
    (["data.sha256=abc"], "data.sha256=abc", "64 hexadecimal digits"),
    (["data.max_length=1025"], "data.max_length=1025 is over model.block_size=1024", "use at most that"),
    (["model.block_size=64", "data.max_length=65"], "data.max_length=65 is over model.block_size=64", "null"),
    (["prompt_loss_weight=1.5"], "prompt_loss_weight=1.5", "less than or equal to 1"),
    (["prompt_loss_weight=-0.1"], "prompt_loss_weight=-0.1", "greater than or equal to 0"),
    (["mask_instructions=true", "prompt_loss_weight=0.5"], "prompt_loss_weight=0.5", "leave out one"),
    (["optimizer.in_backward=true", "device.precision=16-mixed"], "device.precision=16-mixed", "scaled gradients"),
    (["prompt.style=absent"], "prompt.style=absent", f"{', '.join(STYLES)} or template"),
    (["model.dropout=1"], "model.dropout=1 ", "less than 1"),
    (["model.dropout=0.1"], "model.dropout=0.1 with data.layout=packed", "data.layout=padded"),
    (["lora=r16", "lora.dropout=0.1"], "lora.dropout=0.1 with data.layout=packed", "data.layout=padded"),
    (["lora.rank=8"], "lora.rank=8", "lora=r16"),
    (["lora.rank=-1"], "lora.rank=-1", "greater than or equal to 0"),
    (["lora=r16", "lora.targets=[attn.qvk]"], "lora.targets=attn.qvk", "attn.qkv"),
    (["model.n_head=3"], "model.n_embd=1024 is not a multiple of model.n_head=3", "change one"),
    (["model.n_kv_head=5"], "model.n_head=16 is not a multiple of model.n_kv_head=5", "change one"),
    (
        ["model=smollm2-135m", "model.head_dim=null", "model.n_embd=27", "model.n_kv_head=9"],
        "model.n_embd=27",
        "even width",
    ),
    (["model=smollm2-135m", "model.head_dim=63"], "model.head_dim=63", "even width"),
    (["model=auto"], "model.name=null", "model.weights=<folder>"),
    (["model=gpt2-tiny", "model.n_layer=null"], "model.n_layer=null", "model.weights=<folder>"),
    (["model.norm=batchnorm"], "model.norm=batchnorm", "layernorm or rmsnorm"),
    (["trainer.max_epochs=0"], "trainer.max_epochs=0", "greater than or equal to 1"),
    (["trainer.max_epochs=null"], "trainer.max_epochs=null and trainer.max_steps=null", "Give one"),
    (["trainer.val_interval=0"], "trainer.val_interval=0 ", "greater than 0"),
    (["trainer.clip_norm=0"], "trainer.clip_norm=0 ", "greater than 0"),
    (["optimizer.warmup_steps=5", "trainer.max_steps=5"], "optimizer.warmup_steps=5", "fewer warm-up steps"),
    (["device.devices=0"], "device.devices=0", "a number of devices, auto"),
    (["device.precision=fp8"], "device.precision=fp8", "32-true"),
    (["generation.temperature=-1"], "generation.temperature=-1 ", "greater than or equal to 0"),
    (["generation=sample", "generation.top_p=0"], "generation.top_p=0 ", "greater than 0"),
    (["generation=sample", "generation.top_k=0"], "generation.top_k=0", "greater than or equal to 1"),
    (["generation.top_k=5"], "generation.top_k=5", "generation=sample"),
    (["seed=-1"], "seed=-1", "greater than or equal to 0"),
    (["seed=4294967296"], "seed=4294967296", "less than 4294967296"),
    (["mirror=ftp://x"], "mirror=ftp://x", "http://"),
]


@pytest.mark.parametrize(("overrides", "named", "remedy"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_cannot_be_is_named_with_its_value_and_remedy(overrides: list[str], named: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        typed("train", *overrides)
    message = str(caught.value)
    assert named in message
    assert remedy in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("overrides", "named", "remedy"),
    [
        (["split=valid"], "split=valid", "train, validation or test"),
        (["checkpoint=first"], "checkpoint=first", "best, last or untuned"),
        (["run=a", "responses=b"], "run=a and responses=b", "not both"),
        (["responses=b", "judge=none"], "judge=none", "judge=reference"),
        (["judge=ollama", "judge.model=null"], "judge.model=null", "conf/judge/ollama.yaml"),
        (["judge=openai", "judge.base_url=null"], "judge.base_url=null", "conf/judge/openai.yaml"),
        (["judge=llamacpp", "judge.weights=null"], "judge.weights=null", "conf/judge/llamacpp.yaml"),
        (["judge=openai", "judge.base_url=localhost"], "judge.base_url=localhost", "http://"),
        (["judge.concurrency=0"], "judge.concurrency=0", "greater than or equal to 1"),
        (["judge=openai", 'judge.prompt="Rate {answer}"'], "{answer}", "{response}"),
        (["judge=ollama", "judge.prompt=rubrics"], "judge.prompt=rubrics: No such file", "rubric"),
        (
            ["judge=rubric", "judge.scale=[0,10]"],
            "judge.scale=[0,10] with judge.prompt=rubric",
            "leave judge.scale out",
        ),
        (
            [f"second_judge.{value}" for value in ("kind=openai", "model=m", "base_url=http://host/v1", "scale=[2,1]")],
            *("second_judge.scale=[2,1]", "then the highest"),
        ),
        (["judge=ollama", "judge.scale=[1]"], "judge.scale=[1]", "at least 2 items"),
        (["judge=ollama", "judge.max_tokens=0"], "judge.max_tokens=0", "greater than or equal to 1"),
        (["data.max_length=4096"], "data.max_length=4096", "use at most that"),
    ],
)
def test_what_an_evaluation_cannot_do_is_named(overrides: list[str], named: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        typed("evaluate", *overrides)
    assert named in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["prompt_loss_weight=0", "mask_instructions=true"],
        ["data.train_fraction=0.7", "data.test_fraction=0.3"],
        ["model.dropout=0.1", "data.layout=padded"],
        ["model.dropout=0.1", "lora=r16", "lora.dropout=0.1", "fast=false"],
        ["data.max_length=1024", "data.deduplicate=1"],
        ["trainer.max_epochs=null", "trainer.max_steps=10"],
        ["trainer.val_interval=2.5"],
        ["device.devices=auto"],
        ["device.devices=0,1"],
        ["generation.temperature=1", "generation.top_p=1", "generation.top_k=1"],
        ["model=smollm2-135m", "data.max_length=8192"],
        ["model=smollm2-135m", "model.head_dim=80"],
        ["model=auto", "model.weights=base", "data.max_length=8192"],
    ],
    ids=" ".join,
)
def test_the_limits_themselves_are_accepted(overrides: list[str]) -> None:
    typed("train", *overrides)


def test_all_faults_are_reported_at_once() -> None:
    overrides = ["optimizer.lr=-1", "data.batch_size=abc", "lora.targets=attn.qkv", "data.max_length=2000"]
    with pytest.raises(InputError) as caught:
        make_config(TrainConfig, {**composed("train", *overrides), "modl": "gpt2"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for part in (
        "optimizer.lr=-1 must",
        "data.batch_size=abc must",
        "lora.targets=attn.qkv must",
        "modl: ",
        "over model",
    ):
        assert any(part in line for line in lines), part


def test_a_combination_with_a_value_at_fault_is_not_reported_beside_it() -> None:
    with pytest.raises(InputError) as caught:
        typed("train", "data.train_fraction=2")
    assert str(caught.value) == "data.train_fraction=2 must be less than 1."


def test_missing_keys_are_named_together() -> None:
    values = composed("train")
    del values["seed"], values["data"]["limit"]
    with pytest.raises(InputError, match=r"^No value for seed, data\.limit\.$"):
        make_config(TrainConfig, values)


@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.recursive(st.integers(), lambda x: st.dictionaries(st.sampled_from("xyz"), x, min_size=1)),
    )
)
def test_nest_undoes_flatten(values: dict[str, Any]) -> None:
    assert nest(flatten(values)) == values


def test_columns_are_one_value() -> None:
    columns = {"instruction": "question", "output": "my answer.text", "input": "5"}
    config = typed("train", "data.columns={instruction: question, output: 'my answer.text', input: 5}")
    assert config.data.columns == flatten(config.model_dump())["data.columns"] == columns
    assert make_config(TrainConfig, nest(flatten(config.model_dump()))) == config
    assert typed("train", "data.columns={}").data.columns == {}


PLAIN = flatten(composed("train"))


def accepted(**values: Any) -> bool:
    try:
        make_config(TrainConfig, nest(PLAIN | {key.replace("__", "."): value for key, value in values.items()}))
    except InputError:
        return False
    return True


@given(st.floats())
def test_prompt_loss_weight_is_accepted_exactly_from_0_to_1(weight: float) -> None:
    assert accepted(prompt_loss_weight=weight) == (0 <= weight <= 1)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_fractions_are_accepted_up_to_a_sum_of_1(train: float, test: float) -> None:
    assert accepted(data__train_fraction=train, data__test_fraction=test) == (train + test <= 1 + 1e-9)


def device(**values: Any) -> DeviceConfig:
    return DeviceConfig.model_validate(composed("train")["device"] | values)


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: mps))


@pytest.mark.parametrize(
    ("gpus", "mps", "chosen"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "gpu"), (1, True, "gpu")]
)
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, chosen: str) -> None:
    machine(monkeypatch, gpus, mps)
    assert choose_accelerator(device()) == chosen
    assert choose_accelerator(device(accelerator="cpu")) == "cpu"


@pytest.mark.parametrize(
    ("gpus", "values", "named"),
    [
        (0, {"accelerator": "gpu"}, ["device.accelerator=gpu", "only cpu", "device=auto", "device=cpu"]),
        (0, {"accelerator": "mps"}, ["device.accelerator=mps", "only cpu", "device=auto"]),
        (1, {"accelerator": "mps"}, ["device.accelerator=mps", "only gpu and cpu", "device=auto"]),
        (2, {"accelerator": "gpu", "devices": 3}, ["device.devices=3", "has 2", "device.devices=auto"]),
        (2, {"accelerator": "gpu", "devices": "0,2"}, ["device.devices=0,2", "has 2"]),
        (0, {"precision": "16-mixed"}, ["device.precision=16-mixed", "bf16-mixed"]),
    ],
)
def test_a_device_that_is_not_here_is_named_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, gpus: int, values: dict[str, Any], named: list[str]
) -> None:
    machine(monkeypatch, gpus, mps=False)
    with pytest.raises(InputError) as caught:
        choose_accelerator(device(**values))
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_as_many_devices_as_there_are_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, mps=False)
    for devices in (2, "2", "0,1", "auto"):
        assert choose_accelerator(device(accelerator="gpu", devices=devices)) == "gpu"


def test_a_rubric_and_a_prompt_of_ones_own() -> None:
    rubric = typed("evaluate", "judge=rubric", "judge.reasoning_effort=none").judge
    assert (rubric.kind, rubric.model, rubric.prompt, rubric.reasoning_effort) == ("ollama", "llama3", "rubric", "none")
    own = typed(
        "evaluate", "judge=openai", 'judge.prompt="Rate {response}: {\\"score\\": 1}"', "judge.scale=[0,10]"
    ).judge
    assert (own.prompt, own.scale) == ('Rate {response}: {"score": 1}', [0, 10])
    plain = typed("evaluate", "judge=openai", "judge.temperature=null", "judge.seed=null").judge
    assert (plain.temperature, plain.seed, plain.max_tokens) == (None, None, 2048)


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("data.source", "https://me:pw123@host/data.json"),
        ("data.source", "https://host/data.json?X-Amz-Signature=pw123"),
        ("model.weights", "https://host/m.gguf?token=pw123"),
        ("mirror", "https://pw123@host"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_shown(key: str, address: str) -> None:
    faults = find_faults(TrainConfig, nest({key: address}))
    message = str(InputError(faults[key]))
    assert "must be free of passwords and keys" in message
    assert "~/.netrc" in message
    assert "pw123" not in message


def test_a_name_that_is_too_long_for_a_path_is_a_value_like_any_other() -> None:
    assert "data.source" not in find_faults(TrainConfig, nest({"data.source": "x" * 5000}))
