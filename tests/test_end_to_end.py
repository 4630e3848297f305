"""The commands from the outside: what they leave behind, what they say, and how they end."""

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import evaluate
import train
from tests.evaluation.judge_server import JudgeServer, answering, in_turn
from tests.run_commands import ROOT, call, commands, finish, read_until, start

METRICS = {"val/loss", "val/response_loss", "val/perplexity", "val/response_perplexity"}
CONTRACT = {"n", "scored", "failed", "mean", "ci95", "judge", "exact_match", "chrf", "rouge_l"}
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:\n"
)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command in this process, in a folder of its own."""
    mains = {"train": train.main, "evaluate": evaluate.main}
    with commands(tmp_path, monkeypatch, capsys) as run:
        yield lambda name, *args: run(name, *args, main=mains[name])[:2]


def sums(n: int = 40) -> list[dict[str, str]]:
    return [{"instruction": f"Add {i} and {i + 3}.", "input": "", "output": f"It is {2 * i + 3}."} for i in range(n)]


def write(path: Path, value: Any, encoding: str = "utf-8") -> Path:
    path.write_text(json.dumps(value), encoding=encoding)
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def at_least(step: int) -> Callable[[str], bool]:
    """Whether the progress bar of epochs of 64 steps stands there."""
    bar = re.compile(r"epoch (\d+)/\d+:[^\r\n]*? (\d+)/64 \[")
    return lambda text: any(64 * (int(epoch) - 1) + int(n) >= step for epoch, n in bar.findall(text[-500:]))


def losses(run: Path) -> list[float]:
    after = read(run / "summary.json")["after"]
    return [after["val/loss"], after["val/response_loss"]]


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(log: EventAccumulator, name: str) -> list[tuple[int, float]]:
    """Steps and values of a curve; files of the same second are not read in the order of their steps."""
    return sorted((point.step, point.value) for point in log.Scalars(name))


def check_run(run: Path) -> None:
    """All that the contract names is there and can be read."""
    best, last = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert "optimizer_states" not in best
    assert last["optimizer_states"]
    assert best["state_dict"].keys() == last["state_dict"].keys()
    assert OmegaConf.load(run / ".hydra" / "config.yaml").model.name
    assert "validation loss" in (run / "train.log").read_text(encoding="utf-8")
    assert events(run).Scalars("val/loss")
    summary = read(run / "summary.json")
    assert summary["before"].keys() == summary["after"].keys() == METRICS
    assert not list(run.rglob("*.part"))


def check_evaluation(folder: Path, entries: list[dict[str, str]]) -> dict[str, Any]:
    """The same for an evaluation, whose summary it returns."""
    responses = read(folder / "responses.json")
    assert [{key: item[key] for key in ("instruction", "input", "output")} for item in responses] == entries
    assert all(isinstance(item["model_response"], str) for item in responses)
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(len(entries)))
    summary = read(folder / "summary.json")
    assert summary.keys() >= CONTRACT
    assert (summary["n"], summary["scored"] + summary["failed"]) == (len(entries), len(entries))
    return summary


# GPT-2 as the hub has it, from a server of our own


class Hub(SimpleHTTPRequestHandler):
    """Serves a folder and notes what was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 256}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random GPT-2 by transformers, with merges by tokenizers, on a server like the hub; and a run trained from it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    work = tmp_path_factory.mktemp("gpt2")
    revision = OmegaConf.load(ROOT / "conf" / "model" / "gpt2.yaml").weights.partition("@")[2].partition("/")[0]
    folder = work / "hub" / "openai-community" / "gpt2" / "resolve" / revision
    end = 320
    torch.manual_seed(5)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=end + 1, n_positions=SIZES["block_size"], n_embd=SIZES["n_embd"], n_layer=SIZES["n_layer"],
            n_head=SIZES["n_head"], initializer_range=0.3, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROMPT.format(entry) for entry in sums()], vocab_size=end, show_progress=False)
    bpe.save_model(str(folder))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(work / "hub")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    args = [
        "model=gpt2", "model.weights_sha256=null", "model.tokenizer_sha256=null", f"model.vocab_size={end + 1}",
        *(f"model.{key}={value}" for key, value in SIZES.items()),
        f"data.source={write(work / 'entries.json', sums())}", f"cache_dir={work / 'cache'}",
    ]  # fmt: skip
    err = call("train.py", *args, "output_dir=run", cwd=work, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    return {"work": work, "args": args, "model": model, "folder": folder, "err": err}


def test_training_from_the_hub_leaves_a_complete_run(gpt2: dict[str, Any]) -> None:
    run = gpt2["work"] / "run"
    check_run(run)
    assert sorted(Path(path).name for path in Hub.asked) == ["merges.txt", "model.safetensors"]
    summary = read(run / "summary.json")
    assert summary["entries"] == {"train": 34, "test": 4, "validation": 2}
    assert summary["steps"] == 10  # two epochs of ⌈34 / 8⌉
    assert summary["parameters"] == sum(p.numel() for p in gpt2["model"].parameters())
    assert summary["after"]["val/loss"] < summary["before"]["val/loss"]


def test_training_tells_a_newcomer_what_happens_and_nothing_else(gpt2: dict[str, Any]) -> None:
    err = gpt2["err"]
    assert "device: cpu" in err or "device: gpu" in err or "device: mps" in err
    assert re.search(r"epoch 1/2: +\d+%.*loss=\d\.\d{3}, tokens/s=\d", err)
    assert re.search(r"before +after\nvalidation loss +\d\.\d{3} +\d\.\d{3}\n", err)
    assert "python evaluate.py run=run\n" in err
    assert not re.search("warn|deprecat|lightning|/lib/", err, re.IGNORECASE)


def test_a_run_is_evaluated_by_its_path_alone(gpt2: dict[str, Any]) -> None:
    call("evaluate.py", "run=run", "offline=true", "generation.max_new_tokens=12", cwd=gpt2["work"])
    summary = check_evaluation(gpt2["work"] / "run" / "evaluation" / "test", sums()[34:38])
    assert summary["judge"]["kind"] == "reference"


def test_another_judge_finds_the_answers_made_before(gpt2: dict[str, Any], command: Any) -> None:
    run = gpt2["work"] / "run"
    settings = [f"run={run}", "split=validation", "offline=true", "generation.max_new_tokens=12"]
    assert command("evaluate", *settings)[0] == 0
    answered = (run / "evaluation" / "validation" / "responses.json").read_bytes()
    status, err = command("evaluate", *settings, "judge=none", f"output_dir={run / 'evaluation' / 'unjudged'}")
    assert status == 0
    assert "made before" in err
    assert (run / "evaluation" / "unjudged" / "responses.json").read_bytes() == answered
    summary = read(run / "evaluation" / "unjudged" / "summary.json")
    assert summary.keys() >= CONTRACT
    assert (summary["n"], summary["scored"], summary["failed"], summary["mean"]) == (2, 0, 0, None)
    assert command("evaluate", *settings, "generation.max_new_tokens=13")[0] == 0
    assert (run / "evaluation" / "validation" / "responses.json").read_bytes() != answered


def test_untuned_answers_are_those_of_transformers(gpt2: dict[str, Any], command: Any) -> None:
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    settings = [f"output_dir={gpt2['work'] / 'untuned'}", "offline=true", "generation.max_new_tokens=12"]
    status, err = command("evaluate", *gpt2["args"], *settings)
    assert status == 0, err
    check_evaluation(gpt2["work"] / "untuned", sums()[34:38])
    merges = [tuple(line.split()) for line in (gpt2["folder"] / "merges.txt").read_text("utf-8").splitlines()[1:]]
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges), "<|endoftext|>"]  # OpenAI's order
    tokenizer = GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    assert len(merges) > 40
    assert any(entry["model_response"] for entry in read(gpt2["work"] / "untuned" / "responses.json"))
    for entry in read(gpt2["work"] / "untuned" / "responses.json"):
        prompt = tokenizer(PROMPT.format(entry["instruction"]), return_tensors="pt").input_ids
        made = gpt2["model"].generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :]
        assert entry["model_response"] == tokenizer.decode(made, skip_special_tokens=True).strip()


# A sweep


def test_a_sweep_leaves_complete_runs_that_tensorboard_can_compare(tmp_path: Path) -> None:
    data = f"data.source={write(tmp_path / 'entries.json', sums())}"
    settings = ["model=gpt2-tiny", data, "data.batch_size=4", "trainer.max_epochs=1", "cache_dir=cache"]
    sweep = ["-m", "mask_instructions=true,false", "seed=1,2", "output_dir=sweep", "trainer.keep_last=true"]
    call("train.py", *sweep, *settings, cwd=tmp_path)
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    seen = []
    for run in runs:
        check_run(run)
        saved, log = OmegaConf.load(run / ".hydra" / "config.yaml"), events(run)
        seen.append((saved.mask_instructions, saved.seed))
        content = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
        assert (hparams["mask_instructions"].string_value == "true", hparams["seed"].number_value) == seen[-1]
        # Sorted, since event files of the same second are not read in the order of their steps.
        assert [points(log, f"val/{name}")[-1][1] for name in ("loss", "response_loss")] == losses(run)
        tokens = [value for _, value in points(log, "train/tokens_seen")]
        assert len(tokens) == len(points(log, "train/loss"))
        assert tokens == sorted(set(tokens))  # grows with each step
        assert "epoch" not in log.Tags()["scalars"]
        content = log.summary_metadata["_hparams_/experiment"].plugin_data.content
        infos = HParamsPluginData.FromString(content).experiment.hparam_infos
        assert {info.name for info in infos if info.differs} == {
            "mask_instructions",
            "prompt_loss_weight",
            "seed",
            "optimizer.lr",
        }
    assert seen == [(True, 1), (True, 2), (False, 1), (False, 2)]
    assert len({tuple(losses(run)) for run in runs}) == 4

    summary = read(runs[-1] / "summary.json")
    for name in ("val/loss", "val/response_loss"):
        values = points(log, name)
        assert [step for step, _ in values] == [0, 4, 8]  # before, in the middle, after the last of ⌈34 / 4⌉ steps
        assert (values[0][1], values[-1][1]) == (summary["before"][name], summary["after"][name])
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/memory_gb"):
        values = points(log, name)
        assert [step for step, _ in values] == list(range(9)), name
        assert all(value > 0 for _, value in values), name
    texts = {name: log.Tensors(f"{name}/text_summary") for name in ("config", "responses")}
    assert "mask_instructions: false" in texts["config"][0].tensor_proto.string_val[0].decode()
    assert "Add 38 and 41. | It is 79. |" in texts["responses"][0].tensor_proto.string_val[0].decode()
    assert len(texts["responses"]) == 3


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (["trainer.max_epochs=1", "trainer.val_interval=0.3"], [0, 1, 2, 4]),  # after batches ⌈1.5⌉, 3, ⌈4.5⌉ of 5
        (["trainer.max_epochs=3", "trainer.val_interval=2"], [0, 9, 14]),
        (["trainer.max_epochs=3", "trainer.val_interval=2", "trainer.accumulate=2"], [0, 5, 8]),  # 3 steps an epoch
        (["trainer.max_steps=3", "trainer.val_interval=0.3"], [0, 1, 2]),
    ],
)
def test_validation_comes_at_its_interval_and_after_the_last_step(
    command: Any, tmp_path: Path, limits: list[str], steps: list[int]
) -> None:
    data = f"data.source={write(tmp_path / 'entries.json', sums())}"
    assert command("train", "model=gpt2-tiny", data, "output_dir=run", "optimizer.lr=0.3", *limits)[0] == 0
    curve = points(events(tmp_path / "run"), "val/response_loss")
    assert [step for step, _ in curve] == steps
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    best = kept["SaveBest"]["value"]
    assert best == pytest.approx(min(value for _, value in curve[1:]), rel=1e-7)  # in the last case not the last one
    step = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    assert dict(curve[1:])[step - 1] == pytest.approx(best, rel=1e-7)


# Interruptions


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    data = f"data.source={write(tmp_path / 'entries.json', sums(300))}"  # 64 steps an epoch
    settings = ["model=gpt2-tiny", data, "data.batch_size=4", "trainer.max_epochs=2", "cache_dir=cache"]
    call("train.py", *settings, "output_dir=whole", cwd=tmp_path)

    run = tmp_path / "run"
    process = start("train.py", *settings, "output_dir=run", cwd=tmp_path)
    read_until(process, at_least(1))
    process.send_signal(signal.SIGINT)
    status, err = finish(process)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert "python train.py resume=run" in err
    assert not (run / "summary.json").exists()

    process = start("train.py", "resume=run", cwd=tmp_path)
    read_until(process, at_least(65))
    process.kill()
    process.communicate()
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".part"]
    for path in files:
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            read(path)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 64

    call("train.py", "resume=run", cwd=tmp_path)
    assert losses(run) == losses(tmp_path / "whole")
    best = [torch.load(folder / "checkpoints" / "best.ckpt")["state_dict"] for folder in (run, tmp_path / "whole")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


def test_a_complete_run_has_nothing_left_to_resume(command: Any, tmp_path: Path) -> None:
    settings = ["model=gpt2-tiny", f"data.source={write(tmp_path / 'entries.json', sums())}", "trainer.progress=false"]
    assert command("train", *settings, "output_dir=run", "trainer.max_epochs=1")[0] == 0
    expected = losses(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    status, err = command("train", "resume=moved")
    assert status == 0
    assert "raise trainer.max_epochs or max_steps to continue it" in err
    assert losses(tmp_path / "moved") == pytest.approx(expected, rel=1e-6)
    assert command("train", "resume=moved", "trainer.max_epochs=2")[0] == 0
    assert read(tmp_path / "moved" / "summary.json")["steps"] == 10


def test_ctrl_c_before_the_first_step(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instruct_lm.training.module import InstructionTuner

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InstructionTuner, "validation_step", interrupt)
    status, err = command("train", "model=gpt2-tiny", f"data.source={write(tmp_path / 'entries.json', sums())}")
    assert status == 128 + signal.SIGINT
    assert "Stopped before the first checkpoint. Start again with: python train.py resume=" in err
    assert "Traceback" not in err


def test_a_run_that_diverges_stops_and_says_so(command: Any, tmp_path: Path) -> None:
    data = f"data.source={write(tmp_path / 'entries.json', sums())}"
    options = ["optimizer.lr=1e3", "trainer.max_steps=1", "output_dir=run"]  # the last step ruins the weights
    status, err = command("train", "model=gpt2-tiny", data, *options)
    assert status == 1
    assert "diverged at step 1: val/loss is" in err
    assert "The step's entries: " in err
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert "Lower optimizer.lr" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "summary.json").exists()


# Malformed data

ENTRY = {"instruction": "Say yes.", "output": "Yes."}
MALFORMED = {
    "missing key": ([ENTRY, {"instruction": "Say no."}], ["entry 2: output is missing (its keys: instruction)"]),
    "wrong type": ([ENTRY, {**ENTRY, "input": [5]}], ["1 of 2 entries are malformed", "entry 2: input"]),
    "empty output": ([{**ENTRY, "output": " "}], ["1 of 1 entries are unusable", "entry 1: the response is blank"]),
    "no object": ([ENTRY, "text"], ["entry 2: it is", "not an object with keys"]),
    "no entries": ([], ["no entries"]),
    "no entry": ({"data": 5}, ["entry 1", "its keys fit no known shape: data"]),
    "too few": ([ENTRY, ENTRY], ["2 entries", "Use more entries"]),
    "all too long": ([{**ENTRY, "output": "y" * 100_000}] * 20, ["longer than max_length=512", "overlong"]),
    "broken": (b'[{"instruction": "Say yes.",\n "output": ', ["line 2, column"]),
    "empty": (b"", ["no entries"]),
    "binary": (bytes(range(256)) * 8, ["not UTF-8"]),
    "latin-1": ('[{"instruction": "Say é.", "output": "é"}]'.encode("latin-1"), ["not UTF-8", "byte 0xe9", "line 1"]),
}


@pytest.mark.parametrize(("content", "parts"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_data_ends_with_2(command: Any, tmp_path: Path, content: Any, parts: list[str]) -> None:
    (tmp_path / "data.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    status, err = command("train", "model=gpt2-tiny", "data.source=data.json", "output_dir=run", "cache_dir=cache")
    assert status == 2
    assert "Traceback" not in err
    assert all(part in err for part in parts), err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_malformed_data_ends_the_command_itself_with_2(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\x00junk")
    status, err = finish(start("train.py", "model=gpt2-tiny", "data.source=data.json", cwd=tmp_path))
    assert status == 2
    assert err.count("\n") <= 3
    assert "data.json, byte 0x6b in position 6 (line 1): not UTF-16 text" in err


def test_odd_but_usable_data_trains_with_a_warning(command: Any, tmp_path: Path) -> None:
    entries = sums()
    entries[3]["output"] = "y" * 100_000
    entries[-1] = entries[0]  # in the training split and in the validation split
    write(tmp_path / "data.json", entries, encoding="utf-8-sig")  # with a byte-order mark
    status, err = command("train", "model=gpt2-tiny", "data.source=data.json", "trainer=debug", "output_dir=run")
    assert status == 0
    assert "train split: 1 of 34 entries are longer than 512 tokens: 1 dropped" in err
    assert "1 prompts stand in more than one split, the first in entries 1, 40" in err
    check_run(tmp_path / "run")


# Answers from elsewhere, and judges


def answers(n: int = 6) -> list[dict[str, str]]:
    """As the book writes them."""
    return [{**entry, "model_response": f"It is {i}."} for i, entry in enumerate(sums(n))]


def test_a_foreign_file_of_answers_is_scored(command: Any, tmp_path: Path) -> None:
    write(tmp_path / "answers.json", [{**item, "note": "kept"} for item in answers()])
    status, err = command("evaluate", "responses=answers.json", "output_dir=scored")
    assert status == 0, err
    summary = check_evaluation(tmp_path / "scored", sums(6))
    assert summary["exact_match"] == pytest.approx(0)
    assert "ended" not in summary
    assert read(tmp_path / "scored" / "responses.json")[0]["note"] == "kept"
    assert summary["mean"] == pytest.approx(summary["chrf"] / 2)


def test_a_judge_is_asked_once_for_each_answer(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "answers.json", answers())
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    with JudgeServer(
        lambda exchange: exchange.answer("no idea" if "Add 2 and 5." in exchange.question else "80")
    ) as judge:
        settings = ["responses=answers.json", "judge=openai", f"judge.base_url={judge.url}", "output_dir=judged"]
        status, err = command("evaluate", *settings)
        assert status == 1
        assert "1 entries have no score" in err
        summary = check_evaluation(tmp_path / "judged", sums(6))
        assert (summary["scored"], summary["failed"], summary["mean"]) == (5, 1, 80)
        assert summary["failures"][0]["index"] == 2
        assert command("evaluate", *settings)[0] == 1
        assert len(judge.asked) == len(set(judge.asked)) == 6
    for path in (tmp_path / "judged").rglob("*"):
        assert not path.is_file() or "secret-of-the-test" not in path.read_text(encoding="utf-8")


def test_a_second_judge_sees_the_same_answers_and_their_agreement_is_told(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "answers.json", answers())
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with JudgeServer(lambda exchange: exchange.answer(re.search(r"Add (\d+)", exchange.question)[1])) as judge:  # type: ignore[index]
        settings = ["responses=answers.json", f"second_judge.base_url={judge.url}", "output_dir=judged"]
        status, err = command("evaluate", *settings, "judge@second_judge=openai")
    assert status == 0
    first, second = (read(tmp_path / "judged" / folder / "summary.json") for folder in ("", "second"))
    assert (first["judge"]["kind"], second["judge"]["kind"], second["mean"]) == ("reference", "openai", 2.5)
    assert read(tmp_path / "judged" / "responses.json") == read(tmp_path / "judged" / "second" / "responses.json")
    scores = [json.loads(line)["score"] for line in (tmp_path / "judged" / "scores.jsonl").read_text().splitlines()]
    expected = pearson(scores, list(range(6)))
    row = next(line for line in err.splitlines() if "reference and gpt-4o-mini" in line)
    assert [cell.strip() for cell in row.split("|")][2:4] == ["6", f"{expected:.2f}"]


def pearson(x: list[float], y: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1])


def test_a_server_that_comes_back_is_asked_the_rest(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "answers.json", answers())
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    refuse = lambda exchange: exchange.error(400, "not now") if "Add 4" in exchange.question else exchange.answer("60")  # noqa: E731
    with JudgeServer(in_turn(refuse, answering("70"))) as judge:
        settings = ["responses=answers.json", "judge=openai", f"judge.base_url={judge.url}", "output_dir=judged"]
        assert command("evaluate", *settings)[0] == 1
        assert read(tmp_path / "judged" / "summary.json")["failed"] == 1
        assert command("evaluate", *settings)[0] == 0
        assert len(judge.answered) == len(set(judge.answered)) == 6
    assert read(tmp_path / "judged" / "summary.json")["mean"] == pytest.approx((5 * 60 + 70) / 6)


# Less memory when asked


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lora")
    write(work / "entries.json", sums())
    call(
        "train.py", "model=gpt2-tiny", "lora=r16", "lora.rank=4", "optimizer.lr=0.05", "data.source=entries.json",
        "output_dir=run", "cache_dir=cache", cwd=work,
    )  # fmt: skip
    return work


def test_adapters_are_kept_alone_and_merged_to_answer(lora: Path, command: Any) -> None:
    from instruct_lm.commands import build
    from instruct_lm.commands.runs import load_run_config
    from instruct_lm.data.conversation import Conversation
    from instruct_lm.io.fetcher import Fetcher

    run = lora / "run"
    check_run(run)
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in state} == {"lora_a", "lora_b"}
    summary = read(run / "summary.json")
    assert sum(tensor.numel() for tensor in state.values()) == summary["trained_parameters"] < summary["parameters"] / 4
    assert summary["after"]["val/loss"] < summary["before"]["val/loss"] - 0.1

    assert command("evaluate", f"run={run}", "generation.max_new_tokens=16")[0] == 0
    check_evaluation(run / "evaluation" / "test", sums()[34:38])
    config = load_run_config(run)
    config = config.model_copy(update={"generation": config.generation.model_copy(update={"max_new_tokens": 16})})
    model = build.build_model(config, Fetcher(None))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()}, strict=False)
    responder = build.build_responder(config, model, build.build_tokenizer(config.model, Fetcher(None)))
    unmerged = [response.text for response in responder.answer([Conversation.of(**entry) for entry in sums()[34:38]])]
    assert [entry["model_response"] for entry in read(run / "evaluation" / "test" / "responses.json")] == unmerged
    assert any(unmerged)


def test_other_ways_to_compute_the_same_steps_end_the_same(command: Any, tmp_path: Path) -> None:
    settings = [
        "model=gpt2-tiny", f"data.source={write(tmp_path / 'entries.json', sums())}", "optimizer.lr=0.01",
        "trainer.max_steps=7", "trainer.max_epochs=null", "cache_dir=cache",
    ]  # fmt: skip
    ways = {
        "plain": ["data.batch_size=8"],
        "lean": [
            "data.batch_size=2", "trainer.accumulate=4", "data.layout=padded", "trainer.activation_checkpointing=true"
        ],
    }  # fmt: skip
    for name, way in ways.items():
        status, err = command("train", *settings, *way, f"output_dir={name}")
        assert status == 0, err
        assert read(tmp_path / name / "summary.json")["steps"] == 7
    assert losses(tmp_path / "lean") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_short_rows_are_cut_as_asked(command: Any, tmp_path: Path) -> None:
    entries = sums()
    entries[5]["output"] = "It is thirteen, and I could go on about it for very, very long."
    settings = ["model=gpt2-tiny", f"data.source={write(tmp_path / 'entries.json', entries)}", "trainer.max_steps=1"]
    status, err = command("train", *settings, "data.max_length=200", "data.overlong=truncate", "output_dir=run")
    assert status == 0
    assert "1 of 34 entries are longer than 200 tokens: 0 dropped, 1 truncated (data.overlong=truncate)" in err
    assert read(tmp_path / "run" / "summary.json")["steps"] == 1


@pytest.mark.slow
def test_a_killed_sweep_goes_on_keeps_its_finished_runs_and_ends_in_a_report(tmp_path: Path) -> None:
    write(tmp_path / "entries.json", sums(300))  # 64 steps an epoch
    settings = ["model=gpt2-tiny", "data.source=entries.json", "data.batch_size=4", "trainer.max_epochs=2"]
    settings.append("generation.max_new_tokens=8")
    sweep = [
        "-m",
        "prompt_loss_weight=0,1",
        "seed=1",
        "output_dir=a sweep",
        "evaluate=true",
        "cache_dir=cache",
        *settings,
    ]
    process = start("train.py", *sweep, cwd=tmp_path)
    folder = tmp_path / "a sweep"
    read_until(process, lambda text: text.count("training: from step 0") == 2)
    process.kill()
    process.wait()
    first, second = (next(folder.glob(f"{number}_*")) for number in (0, 1))
    assert (first / "summary.json").is_file()
    assert not (second / "summary.json").exists()
    assert [path.name for path in (first / "checkpoints").iterdir()] == ["best.ckpt"]
    kept = [
        first / "checkpoints" / "best.ckpt",
        first / "summary.json",
        *(first / "evaluation" / "test").glob("*.json*"),
    ]
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert len(stamps) == 6

    process = start("train.py", *sweep, cwd=tmp_path)
    read_until(process, at_least(1))
    process.send_signal(signal.SIGINT)
    status, err = finish(process)
    assert status == 128 + signal.SIGINT
    assert "Job 1 of the multirun was stopped" in err
    assert "1 of 2 jobs are not complete. The same command tries again" in err
    step = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 1 <= step < 128

    assert f"training: from step {step}\n" in call("train.py", *sweep, cwd=tmp_path)
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    whole = call(
        "train.py", "prompt_loss_weight=1", "seed=1", "output_dir=alone", "cache_dir=cache", *settings, cwd=tmp_path
    )
    assert "Traceback" not in whole
    assert losses(second) == losses(tmp_path / "alone")
    assert not (second / "checkpoints" / "last.ckpt").exists()
    shutil.copy(tmp_path / "alone" / "checkpoints" / "last.ckpt", second / "checkpoints")
    check_run(second)
    assert [step for step, _ in points(events(second), "val/loss")] == [0, 31, 63, 95, 127]
    call("evaluate.py", *settings[:2], "seed=1", settings[-1], "output_dir=untuned", "cache_dir=cache", cwd=tmp_path)
    untuned = [read(path / "responses.json") for path in (tmp_path / "untuned", first / "evaluation" / "test-untuned")]
    assert untuned[0] == untuned[1]

    # The report's means, from the files by hand.
    table = (folder / "report.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in re.findall(r"^\| .*\|$", table.split("## Differences")[0], re.M)}
    assert [name for name in rows if not set(name) <= {"-", " "}][1:] == [
        "untuned",
        "prompt weight=0",
        "prompt weight=1",
    ]
    for name, run in (
        ("prompt weight=0", first / "evaluation/test"),
        ("untuned", first / "evaluation/test-untuned"),
    ):
        scores = [json.loads(line)["score"] for line in (run / "scores.jsonl").read_text().splitlines()]
        assert f" {sum(scores) / len(scores):.1f} [" in rows[name]
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    content = events(first).summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = [info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert {"verdict/test_score", "val/loss"} <= set(metrics)
    assert events(first).Scalars("verdict/test_score")[0].value == pytest.approx(
        read(first / "evaluation/test/summary.json")["mean"]
    )


def test_a_sweep_refuses_a_folder_with_other_settings(command: Any, tmp_path: Path) -> None:
    settings = [
        "-m",
        "model=gpt2-tiny",
        "data=sample",
        "trainer=debug",
        "seed=1",
        "output_dir=sweep",
        "cache_dir=cache",
    ]
    assert command("train", *settings)[0] == 0
    status, err = command("train", *settings, "optimizer.lr=0.5")
    assert (status, "optimizer.lr=5e-05, not 0.5" in err) == (0, False)  # another name, another folder
    config = next(Path("sweep").glob("0_*trainer-debug/.hydra/config.yaml"))
    written = config.read_text()
    config.write_text(written.partition("\n")[2].replace("lr: 5.0e-05", "lr: 0.25"))  # without the hash of its lines
    status, err = command("train", *settings)
    assert status == 2
    assert "optimizer.lr=0.25, not 5e-05. Leave out what differs, or start a run in another output_dir" in err
    config.write_text(written)
    Path(config.parents[1], "checkpoints", "last.ckpt").unlink(missing_ok=True)
    Path(config.parents[1], "summary.json").write_text("{}")
    status, err = command("train", *settings)
    assert status == 2
    assert "summary.json is damaged, and without checkpoints/last.ckpt" in err
