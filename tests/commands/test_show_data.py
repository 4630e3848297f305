import json
import random
import subprocess
import sys

import numpy as np
import pytest

from instruct_lm.commands.show_data import main, render
from instruct_lm.data.encoded import EncodedExample
from instruct_lm.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    entries = [{"instruction": f"Say {i}.", "input": "", "output": "ok"} for i in range(20)]
    entries[19]["instruction"] = "say  3."
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_it_works_without_arguments_network_and_cache():
    run = subprocess.run([sys.executable, "-m", "instruct_lm.data"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "tokenizer: bytes" in run.stdout
    assert "### Response:" in run.stdout
    assert "\x1b" not in run.stdout  # no colours into a pipe


def test_numbers_of_a_small_file(source, capsys):
    assert main([source, "--style", "phi3", "--tokenizer", "bytes", "--mask-instructions", "--entry", "2"]) == 0
    out = capsys.readouterr().out
    # "<|user|>\nSay 1." + "\n<|assistant|>:\n" + "ok" + end: 15 (16 from entry 11 on) + 16 + 3 tokens
    train = 10 * 34 + 7 * 35
    row = next(line for line in out.splitlines() if line.startswith("train")).split()
    assert row == ["train", "17", "0", "0", str(train), f"{train / 17:.1f}", "35", f"{17 * 19 / (train - 17):.1%}"]
    assert "Entries in more than one split (same prompt): 1\n  train 4, validation 20: 'Say 3.'" in out
    assert "Entry 2: 15 prompt + 16 header + 3 response tokens" in out
    assert "[0|<|user|>\nSay 1.][1|\n<|assistant|>:\nok<|endoftext|>]" in out


def test_header_mask_weight_and_cuts_are_shown(source, capsys):
    options = ["--style", "phi3", "--tokenizer", "bytes", "--prompt-loss-weight", "0.1", "--mask-header"]
    assert main([source, *options, "--max-length", "33", "--overlong", "truncate"]) == 0
    out = capsys.readouterr().out
    assert "[0|<][0.1||user|>\nSay 0.\n<|assistant|>:\n][1|ok]" in out
    for name, count in (("train", "17"), ("test", "2"), ("validation", "1")):
        assert next(line for line in out.splitlines() if line.startswith(name)).split()[:4] == [name, count, "0", count]


def test_colours_follow_the_weights_and_no_color(source, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    arguments = [source, "--style", "phi3", "--tokenizer", "bytes", "--mask-instructions"]
    assert main(arguments) == 0
    assert "\x1b[90m<|user|>\nSay 0.\x1b[0m\x1b[32m\n<|assistant|>:\nok<|endoftext|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[0|<|user|>\nSay 0.][1|" in out
    assert "\x1b" not in out


def test_render_shows_control_characters_as_escapes():
    ids = np.array([*"a\x1b[2J\né".encode(), 256], dtype=np.int32)
    row = EncodedExample(ids, np.zeros(len(ids), dtype=np.uint8))
    weights = np.array([0.5] * 3 + [1] * (len(ids) - 3), dtype=np.float32)
    assert render(row, weights, BYTES, colour=False) == "[0.5|a\\x1b[][1|2J\né<|endoftext|>]"
    assert render(row, weights, BYTES, colour=True).startswith("\x1b[33ma\\x1b[\x1b[0m\x1b[32m2J")


def test_a_tokenizer_in_the_cache_is_used_and_one_of_another_kind_passed_over(source, tmp_path, capsys):
    folder = tmp_path / "cache" / "instruct-lm" / "hf" / "some"
    folder.mkdir(parents=True)
    (folder / "a.gguf").write_bytes(b"GGUF, but not really")
    (folder / "merges.txt").write_text("o k\n")
    assert main([source]) == 0
    out = capsys.readouterr().out
    assert f"tokenizer: {folder / 'merges.txt'}" in out
    assert "258 token ids" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--entry", "0"], "--entry 0: the file has usable entries from 1 to 20"),
        (["--entry", "21"], "usable entries from 1 to 20"),
        (["--prompt-loss-weight", "2"], "prompt_loss_weight=2.0"),
        (["--tokenizer", "gone.txt"], "gone.txt"),
        (["--duplicates", "0"], "threshold 0 is outside (0, 1]"),
        (["--json", "pairs.json"], "--json pairs.json goes with --duplicates"),
        (["--duplicates", "--json", "/dev/null/pairs.json"], "--json /dev/null/pairs.json: "),
        (["--tokenizer", "bytes", "--max-length", "5"], "max_length=5"),
        (["--tokenizer", "bytes", "--max-length", "33", "--overlong", "error"], "max_length=33"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_message(source, capsys, arguments, message):
    assert main([source, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_what_was_recognised_is_shown_and_other_keys_are_mapped(tmp_path, capsys):
    path = tmp_path / "data.csv"
    rows = [f"Say {i}.,{'' if i == 2 else 'ok'},<noinput>" for i in range(20)]
    path.write_text("question,answer,context\n" + "\n".join(rows))
    columns = ["--columns", "instruction=question", "output=answer", "input=context"]
    assert main([str(path), "--tokenizer", "bytes", "--clean", *columns, "--entry", "4"]) == 0
    out = capsys.readouterr().out
    shape = "Alpaca (instruction=question, input=context, output=answer)"
    assert f"20 entries as {shape}: 19 conversations, 38 turns\n1 of 20 entries are unusable and dropped" in out
    assert "Say 3." in out.partition("Entry 4")[2]
    assert "noinput" not in out.partition("Entry 4")[2]
    path.write_text("question,answer,context\n" + "\n".join([",ok,", *rows]))
    assert main([str(path), "--tokenizer", "bytes", *columns]) == 0
    assert "Say 0." in capsys.readouterr().out.partition("Entry 2")[2]  # the first that can be used
    assert main([str(path), "--tokenizer", "bytes", "--unusable", "error", *columns]) == 2
    assert "entry 4: the response is blank" in capsys.readouterr().err
    assert main([str(path), "--columns", "question"]) == 2
    assert "--columns question: write FIELD=KEY" in capsys.readouterr().err


def test_a_missing_file_ends_with_status_2(capsys):
    assert main(["gone.json"]) == 2
    assert "gone.json" in capsys.readouterr().err


@pytest.fixture
def leaking(tmp_path):
    """20 entries: 1-17 for training, 18-19 for the test, 20 for validation."""
    random_ = random.Random(0)
    texts = ["".join(random_.choices("abcdefghij", k=40)) for _ in range(20)]
    texts[4] = texts[2].upper()
    texts[6] = f"{texts[17][:-1]}?"
    texts[8] = texts[19] = "日本の首都は\u001b[2Jどこですか。" * 5
    path = tmp_path / "leaking.json"
    path.write_text(json.dumps([{"instruction": text, "output": "ok"} for text in texts]))
    return str(path), texts


def test_near_duplicates_as_a_table(leaking, capsys):
    source, texts = leaking
    assert main([source, "--duplicates"]) == 0
    captured = capsys.readouterr()
    assert (
        "20 entries; pairs with a similarity of at least 0.9: 3\n  train and test: 1\n  train and validation: 1\n"
        in (captured.out)
    )
    assert "  test and validation: 0\n  within train: 1\n  within test: 0\n  within validation: 0\n" in captured.out
    rows = [line.split(maxsplit=3)[-3:] for line in captured.out.split("text\n")[1].splitlines()]
    assert [(split, number) for split, number, _ in rows] == [
        *(("train", "9"), ("validation", "20")),
        *(("train", "7"), ("test", "18")),
        *(("train", "3"), ("train", "5")),
    ]
    assert rows[3][2] == texts[17]
    assert rows[0][2].startswith("日本の首都は\\x1b[2Jどこ")
    assert rows[0][2].endswith("…")
    assert "\x1b" not in captured.out


def test_near_duplicates_as_json(leaking, capsys, tmp_path, monkeypatch):
    source, texts = leaking
    assert main([source, "--duplicates", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["threshold"], report["entries"]) == (1, 20)
    assert {tuple(kind["splits"]): kind["pairs"] for kind in report["counts"]} == {
        **{("train", "test"): 0, ("train", "validation"): 1, ("test", "validation"): 0},
        **{("train", "train"): 1, ("test", "test"): 0, ("validation", "validation"): 0},
    }
    assert report["pairs"][0] == {
        "similarity": 1.0,
        "first": {"split": "train", "entry": 9, "text": texts[8]},
        "second": {"split": "validation", "entry": 20, "text": texts[19]},
    }
    monkeypatch.setattr("instruct_lm.commands.show_duplicates._MOST", 1)
    monkeypatch.chdir(tmp_path)
    assert main([source, "--duplicates", "1", "--json", "pairs.json"]) == 0
    assert capsys.readouterr().out.endswith("and 1 more; --json FILE writes all\n\nAll 2 pairs: pairs.json\n")
    assert json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8")) == report


def test_a_hostile_file_writes_nothing_to_the_terminal(tmp_path, capfd):
    """Neither its name nor its keys, its texts, or the message when it is malformed."""
    entries = [{"instruction": f"Say \x1b[2J {i}.", "output": "\x9b2J\u202e", "\x1b]0;title\x07": 1} for i in range(20)]
    path = tmp_path / "e\x1b[2Jvil.json"
    path.write_text(json.dumps(entries))
    assert main([str(path), "--tokenizer", "bytes"]) == 0
    path.write_text('[{"\\u001b[2J": "\\u009b"}]')
    assert main([str(path)]) == 2
    out, err = capfd.readouterr()
    assert "e\\x1b[2Jvil.json" in out
    assert "e\\x1b[2Jvil.json" in err
    assert all(c.isprintable() or c in "\n\t" for c in out + err)
