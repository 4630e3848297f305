"""The export command on run folders and bases: what it writes, what it refuses, and what it leaves behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruct_lm.commands import build, export, runs
from instruct_lm.commands.check_config import make_config
from instruct_lm.config import ExportConfig, TrainConfig
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.errors import InputError, RunError
from instruct_lm.export.huggingface import save_pretrained
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import CONTENTS
from instruct_lm.model.lora import adapter_state
from tests.conftest import ROOT
from tests.run_commands import commands, composed, typed

FETCHER = Fetcher(None, offline=True)
HF = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", CONTENTS),
}


def make_run(folder: Path, *overrides: str) -> Path:
    """A run folder as training leaves it, its weights random."""
    values = composed("train", "model=gpt2-tiny", *overrides) | {"output_dir": str(folder)}
    config = make_config(TrainConfig, values)
    runs.save_config(config)
    model = build.build_model(config, FETCHER)
    (folder / "checkpoints").mkdir()
    for seed, which in enumerate(("best", "last")):
        generator = torch.Generator().manual_seed(seed)
        for tensor in (adapter_state(model) or model.state_dict()).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        state = adapter_state(model) or model.state_dict()
        torch.save(
            {"state_dict": {f"model.{k}": v for k, v in state.items()}}, folder / "checkpoints" / f"{which}.ckpt"
        )
    return folder


def configured(*overrides: str, run: Path | None = None) -> ExportConfig:
    if run is None:
        return typed("export", "model=gpt2-tiny", *overrides)
    values = composed("export", *overrides) | {"run": str(run)}
    return runs.taken_from_run(make_config(ExportConfig, values, combinations=False), [])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("lora", [(), ("lora=r16", "lora.rank=2")])
@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_goes_to_transformers_and_back(folder: Path, lora: tuple[str, ...], which: str) -> None:
    run = make_run(folder / "run", *lora)
    export.main(configured(f"checkpoint={which}", run=run))
    out = run / "export" / ("hf" if which == "best" else "hf-last")
    assert names(out) == HF
    config = runs.load_run_config(run)
    ours = build.load_trained(config, run / "checkpoints" / f"{which}.ckpt", FETCHER)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, 257, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    again = typed("train", "model=auto", "prompt=template", f"model.weights={out}")
    again = build.resolve(again, FETCHER)
    assert again.model.block_size == config.model.block_size
    with torch.no_grad():
        assert torch.equal(build.build_model(again, FETCHER)(ids), ours(ids))


def test_a_base_goes_to_transformers(folder: Path) -> None:
    export.main(configured("dtype=bf16"))
    out = folder / "outputs" / "gpt2-tiny-hf"
    assert names(out) == HF
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert "## Training" not in (out / "README.md").read_text(encoding="utf-8")


def test_an_adapter_goes_alone_without_its_base(folder: Path) -> None:
    save_pretrained(
        build.build_model(typed("train", "model=gpt2-tiny"), FETCHER), load_tokenizer("bytes"), folder / "base"
    )
    run = make_run(folder / "run", "model.weights=base", "lora=r16", "lora.rank=3")
    (folder / "base").rename(folder / "moved")
    export.main(configured("format=peft", run=run))
    card = (run / "export" / "peft" / "README.md").read_text(encoding="utf-8")
    assert "`base` (local)" in card
    assert str(folder) not in "".join(
        path.read_text("utf-8", "replace") for path in (run / "export" / "peft").iterdir()
    )
    peft = pytest.importorskip("peft", reason="peft is not installed")
    (folder / "moved").rename(folder / "base")
    ours = build.load_trained(runs.load_run_config(run), run / "checkpoints" / "best.ckpt", FETCHER)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, run / "export" / "peft").eval()
    ids = torch.randint(0, 257, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)


def test_what_is_there_is_replaced_only_when_told_to(folder: Path) -> None:
    export.main(configured("output_dir=out"))
    before = (folder / "out" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"output_dir=.*out holds .* already: give a new folder, or overwrite=true"):
        export.main(configured("output_dir=out", "seed=5"))
    assert (folder / "out" / "model.safetensors").read_bytes() == before
    (folder / "out" / "model-00001-of-00002.safetensors").write_bytes(b"")  # a stale shard, in the record
    record = json.loads((folder / "out" / CONTENTS).read_text(encoding="utf-8"))
    record["files"].append("model-00001-of-00002.safetensors")
    (folder / "out" / CONTENTS).write_text(json.dumps(record), encoding="utf-8")
    export.main(configured("output_dir=out", "seed=5", "overwrite=true"))
    assert (folder / "out" / "model.safetensors").read_bytes() != before
    assert names(folder / "out") == HF
    assert names(folder) == {"out"}


def _users_own(folder: Path) -> str:
    (folder / "mine").mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (folder / "mine" / name).write_text("{}", encoding="utf-8")
    return "mine"


def _with_notes(folder: Path) -> str:
    export.main(configured("output_dir=noted"))
    (folder / "noted" / "notes.md").write_text("mine", encoding="utf-8")
    return "noted"


def _file(folder: Path) -> str:
    (folder / "file").touch()
    return "file"


def _link(folder: Path) -> str:
    (folder / "link").symlink_to("nowhere")
    return "link"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_users_own, r"holds README\.md, which no export wrote there"),
        (_with_notes, r"holds notes\.md, which no export wrote there"),
        (_file, "is a file: give a folder"),
        (_link, "is a link to nowhere"),
        (lambda folder: ".", "is the current folder, or holds it, which cannot be replaced"),
        (lambda folder: "/proc", "is a mounted disk"),
        (lambda folder: "/proc/x", r"cannot make .*Give another folder"),
        (lambda folder: str(make_run(folder / "run")), "holds a run, whose files would be replaced"),
    ],
    ids=["own files", "a note among an export", "file", "link", "here", "mount", "not writable", "run"],
)
def test_a_folder_that_it_should_not_replace_is_refused(folder: Path, make: Any, message: str) -> None:
    target = make(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        export.main(configured(f"output_dir={target}", "overwrite=true"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_read_is_not_replaced(folder: Path) -> None:
    export.main(configured("output_dir=base"))
    for weights in ("base", "base/model.safetensors"):
        config = typed("export", "model=auto", f"model.weights={weights}", "output_dir=base", "overwrite=true")
        with pytest.raises(InputError, match=r"holds model\.weights=.*base.*, which is read"):
            export.main(config)


def test_a_full_disk_is_told_before_and_in_the_middle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(RunError, match=r"new/out needs about 0\.05 GB, and the disk has 0\.00 GB left\. Free"):
            export.main(configured("output_dir=new/out"))
    monkeypatch.setattr("instruct_lm.export.safetensors_files.converted", _full)
    with pytest.raises(RunError, match=r"needs about 0\.05 GB, and the disk has no room left \(No space left"):
        export.main(configured("output_dir=new/out"))
    assert names(folder) == set()


def _full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(folder: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "instruct_lm.export", "model=gpt2-tiny", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_file_that_cannot_grow_ends_in_words(folder: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start(folder, "output_dir=out", preexec_fn=limited)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "the disk has no room left (File too large)" in err
    assert "Traceback" not in err
    assert names(folder) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGTERM, "Ended by SIGTERM. What was written before is whole."), (signal.SIGINT, "Interrupted.")],
)
def test_a_signal_leaves_nothing(folder: Path, number: int, words: str) -> None:
    run = (
        "import os, signal; from instruct_lm.commands import export; from instruct_lm.export import safetensors_files as s; "
        f"s.converted = lambda *args: os.kill(os.getpid(), {int(number)}); from instruct_lm.commands.hydra_app import hydra_command\n"
        "with hydra_command('export', export.main) as run: run()"
    )
    command = [sys.executable, "-c", run, "model=gpt2-tiny", "output_dir=out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (128 + number, words)
    assert names(folder) == set()


def test_what_a_killed_export_left_goes_with_the_next(folder: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"out.{ended.pid}.part", f"out.{os.getppid()}.part", f"other.{ended.pid}.part"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    export.main(configured("output_dir=out"))
    assert names(folder) == {"out", f"out.{os.getppid()}.part", f"other.{ended.pid}.part"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel's peak is read from /proc")
def test_it_takes_less_than_twice_the_models_memory(folder: Path) -> None:
    sizes = ("model=gpt2-tiny", "model.n_embd=512", "model.n_layer=8", "model.n_head=8", "model.vocab_size=20000")
    run = (
        "import re, sys; from pathlib import Path; from instruct_lm.commands import build, export\n"
        "import instruct_lm.export.huggingface, instruct_lm.export.card; from tests.run_commands import typed\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "config = typed('export', *sys.argv[1:]); before = peak(); export.main(config); print(peak() - before)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", run, *sizes, "output_dir=out"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    size = (folder / "out" / "model.safetensors").stat().st_size
    assert size > 120e6
    assert int(done.stdout) < 1.7 * size


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model=gpt2-tiny", "format=peft"], "format=peft: a base model has no adapter"),
        (["model=gpt2-tiny", "dtype=q8_0"], "dtype=q8_0 with format=hf: GGUF alone has it"),
        (["run=nowhere"], "nowhere: no such folder"),
        (["run=run", "format=peft"], "has no adapter. Give run=<a run trained with lora=r16>"),
        (["run=run", "model=gpt2"], "The run"),
    ],
)
def test_what_cannot_be_exported_is_refused(command: Any, tmp_path: Path, args: list[str], message: str) -> None:
    make_run(tmp_path / "run")
    status, err, _ = command("export", *args, main=export.main)
    assert status == 2
    assert message in err


def test_a_multirun_has_a_folder_for_each_dtype_that_is_given_one(command: Any, tmp_path: Path) -> None:
    status, err, _ = command(
        "export", "-m", "model=gpt2-tiny", "dtype=f32,bf16", "output_dir=out-${dtype}", main=export.main
    )
    assert status == 0, err
    assert {"out-f32", "out-bf16"} <= names(tmp_path)


def test_a_multirun_has_a_folder_for_each_format_and_checkpoint(command: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sweep = ("format=hf,gguf,ollama", "checkpoint=best,last")
    status, err, _ = command("export", "-m", f"run={run}", *sweep, main=export.main)
    assert status == 0, err
    kinds = ("hf", "gguf", "ollama")
    assert names(run / "export") == {f"{kind}{which}" for kind in kinds for which in ("", "-last")}


def test_damaged_input_leaves_nothing(folder: Path) -> None:
    run = make_run(folder / "run")
    (run / "checkpoints" / "best.ckpt").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="is no readable checkpoint"):
        export.main(configured(run=run))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del state["state_dict"]["model.h.1.ln_1.weight"]
    torch.save(state, run / "checkpoints" / "last.ckpt")
    with pytest.raises(InputError, match=r"h\.1\.ln_1\.weight"):
        export.main(configured("checkpoint=last", run=run))
    assert names(folder / "run") == {".hydra", "checkpoints"}
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "gemma").mkdir()
    (folder / "gemma" / "config.json").write_text('{"model_type": "gemma"}', encoding="utf-8")
    (folder / "gemma" / "model.safetensors").write_bytes(b"")
    for name in ("pickled", "gemma"):
        with pytest.raises(InputError):
            export.main(typed("export", "model=auto", f"model.weights={name}", "output_dir=out"))
    assert names(folder) == {"run", "pickled", "gemma"}


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_a_checkpoint_of_other_things_than_tensors_is_refused(folder: Path, form: str) -> None:
    run = make_run(folder / "run", "lora=r16")
    torch.save({"state_dict": {"model.x": 3}}, run / "checkpoints" / "best.ckpt")
    with pytest.raises(InputError, match=r"is no readable checkpoint \(model\.x is no tensor\)"):
        export.main(configured(f"format={form}", run=run))


def test_its_tokenizer_knows_the_prompt_of_the_run(folder: Path) -> None:
    run = make_run(folder / "run", "prompt=chatml")
    export.main(configured(run=run))
    theirs = AutoTokenizer.from_pretrained(run / "export" / "hf")
    written = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True
    )
    assert written == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_help_into_a_closed_pipe_is_quiet(folder: Path) -> None:
    process = start(folder, "--help", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("args", "lora", "weights"), [([], "none", False), ([], "r16", True), (["format=peft"], "r16", False)]
)
def test_sources_that_have_changed_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], lora: str, weights: bool
) -> None:
    told: list[tuple[Path, bool]] = []

    def refuse(run: Path, config: Any, fetcher: Any, *, weights: bool) -> None:
        told.append((run, weights))
        raise InputError("the tokenizer has changed")

    monkeypatch.setattr(export, "check_origin", refuse)
    run = make_run(tmp_path / "run", f"lora={lora}")
    with pytest.raises(InputError, match="the tokenizer has changed"):
        export._export(configured(*args, run=run), run / "checkpoints" / "best.ckpt", tmp_path)
    assert told == [(run, weights)]  # those of the base count under adapters, unless these are exported alone
