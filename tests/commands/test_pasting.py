import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from instruct_lm.commands.pasting import command, override

ODD = st.text(st.sampled_from("ab1e.-_ \t'\"\\$`{}()[]=,:#!&*?;<>|~日本\n%@+/"), min_size=1, max_size=12)
INTERPOLATIONS = st.lists(st.sampled_from(["${", "}", "\\", "a", "oc.env:HOME", '"', "'"]), min_size=1).map("".join)


@given(ODD | INTERPOLATIONS | st.sampled_from(["null", "1", "1e3", "true", "nan", "2024", "-", ".5", "5."]))
def test_hydra_reads_the_text_back(text: str) -> None:
    parsed = OverridesParser.create().parse_override(override("data.source", text))
    config = OmegaConf.create({"data": {"source": None}})
    OmegaConf.update(config, parsed.key_or_group, parsed.value())
    assert config.data.source == text
    assert not parsed.is_sweep_override()


@pytest.mark.parametrize("value", [None, True, False, 3, 0.5])
def test_other_values_keep_their_kind(value: object) -> None:
    read = OverridesParser.create().parse_override(override("key", value)).value()
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("name", ["it's (1)", 'a "b" = c', "日本語", "$HOME `x`", "-x", "a\\b", "#1;2&3", "${x}"])
def test_a_shell_reads_the_arguments_back(name: str) -> None:
    line = command("train.py", resume=Path(name), **{"device.devices": 2})
    show = shlex.join([sys.executable, "-c", "import sys; print(sys.argv[1:])"])
    out = subprocess.run(["sh", "-c", line.replace("python train.py", show, 1)], capture_output=True, check=True)
    assert out.stdout.decode().strip() == repr([override("resume", name), "device.devices=2"])
