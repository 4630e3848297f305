"""The files in `conf/`, read without Hydra, and dotted keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from instruct_lm.config import ModelConfig
from instruct_lm.errors import InputError

CONF = Path(__file__).resolve().parents[2] / "conf"


def choices(group: str) -> list[str]:
    """The names of the files in `conf/<group>/`; none where there is no such folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def model_config(name: str) -> ModelConfig:
    """Read `conf/model/<name>.yaml` without Hydra, for use in a notebook.

    Raises:
        InputError: There is no such file; the message lists those that there are.
    """
    if name not in choices("model"):
        raise InputError(f"model={name}: there is no such choice. Choose one of {', '.join(choices('model'))}.")
    return ModelConfig.model_validate(OmegaConf.to_container(_read_model(name), resolve=True))


def _read_model(name: str) -> Any:
    """The file's own keys and those of the files that its `defaults` list names; later ones win, as in Hydra."""
    own: Any = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    parents = own.pop("defaults", ["_self_"])
    return OmegaConf.merge(*(own if parent == "_self_" else _read_model(parent) for parent in parents))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"limit": 5}}` → `{"data.limit": 5}`; the value of `data.columns` stays whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        group = isinstance(value, Mapping) and prefix + name != "data.columns"
        flat |= flatten(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return flat
