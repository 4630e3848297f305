"""The examples in the docstrings of the core are true."""

import doctest
from importlib import import_module

import pytest

from tests.conftest import ROOT

FOLDERS = ("data", "model", "training", "fast")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / "instruct_lm" / folder).glob("*.py"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PATHS
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    from instruct_lm.model.gpt import GPTConfig  # several examples begin with it, not all of their modules import it

    failed, attempted = doctest.testmod(import_module(name), extraglobs={"GPTConfig": GPTConfig})
    assert attempted > 0
    assert failed == 0
