"""A saved configuration is plain values: what could name code, take memory or ask this machine is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from instruct_lm.commands.runs import load_run_config
from instruct_lm.errors import InputError
from instruct_lm.io.plain_yaml import read_plain_yaml

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))


def read(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_plain_yaml(path)


def test_what_a_run_saves_is_read_as_it_was(tmp_path: Path) -> None:
    values = {"lr": 5e-05, "name": "x: y", "a": {"b": [1, None, True, "2001-01-01", "é: #"]}, "none": None}
    assert read(tmp_path, yaml.safe_dump(values, allow_unicode=True)) == values
    assert read(tmp_path, "lr: 5e-5") == {"lr": 5e-05}  # as people write it
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LAUGHS, r"line 2: the alias \*a"),
        ("a: &a\n  b: *a", r"line 2: the alias \*a"),
        ("a: 1\n<<: *a", r"line 2: the alias \*a"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1\na: 2", "line 2: found duplicate key a"),
        ("x: 1\na: {b: ['${oc.env:HOME}']}", r"\$\{oc.env:HOME\} would be filled in from this machine"),
        ("${a}: 1", "would be filled in"),
        ("a: [1", "line 1: "),
        ("[" * 5000, "is nested too deeply"),
        ("? [a]\n: 1", "is no|unhashable"),
        ("seed: 1" + "0" * 5000, "Exceeds the limit"),
        (b"\xff\xfe\x00", "codec can't decode"),
        ("a: " + "x" * 1_000_001, "has 1000004 bytes"),
    ],
)
def test_what_is_no_plain_value_is_refused(tmp_path: Path, text: str | bytes, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        read(tmp_path, text)


def test_an_interpolation_in_a_strangers_run_is_not_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "xyzzy")
    run = tmp_path / "run"  # not tmp_path itself, beside which other tests look for runs
    (run / ".hydra").mkdir(parents=True)
    text = "data: {source: 'https://host/${oc.env:SECRET_OF_MINE}/a.json'}"
    (run / ".hydra/config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="would be filled in from this machine") as caught:
        load_run_config(run)
    assert "xyzzy" not in str(caught.value)
