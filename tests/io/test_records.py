import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_lm.io.files import write_json
from instruct_lm.io.records import HASH, read_record, write_record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != HASH), JSON, max_size=5))
def test_a_record_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("record") / "a.json"
    write_record(values, path)
    assert read_record(path) == values


def test_every_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.json"
    write_record({"mean": 29.4, "n": 64, "limits": {"trainer.max_epochs": 2}}, path)
    whole = path.read_bytes()
    for position in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        read = read_record(path)
        # Flips of blanks between the values change nothing.
        assert read is None or read == {"mean": 29.4, "n": 64, "limits": {"trainer.max_epochs": 2}}
    assert "damaged" in caplog.text


def test_no_file_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_record(tmp_path / "none.json") is None
    assert not caplog.text


def test_json_never_holds_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5,)}, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None, {"c": None}], "d": [1.5]}
    write_record({"a": math.nan}, path)
    assert read_record(path) == {"a": None}
