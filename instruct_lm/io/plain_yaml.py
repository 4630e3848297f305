"""YAML that a stranger may have written: plain values alone."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from instruct_lm.errors import InputError

_LARGEST = 1_000_000  # bytes; a run's configuration has 4,000


class _PlainLoader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's loader, which reads 1e-5 as a number and refuses a key that is there twice; without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"the alias *{event.anchor:.40}", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_plain_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; an empty one has none.

    Aliases are refused, since a few lines of them stand for any number of values; tags, since they name types; and
    interpolations, which would put what this machine knows, such as a key in its environment, into an address.

    Raises:
        InputError: The file cannot be read, is no YAML or no such YAML.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path} has {path.stat().st_size} bytes, and no configuration has a tenth of that.")
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, _PlainLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, a number of thousands of digits
        if isinstance(error, InputError):
            raise
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        fault = getattr(error, "problem", None) or str(error)
        raise InputError(f"{path}{place}: {fault}: this is not the YAML of plain values that a run saves.") from error
    except Exception as error:  # PyYAML raises more kinds, such as TypeError for a key that is a list
        raise InputError(f"{path} is no YAML ({error!r}).") from error
    if found := _interpolation(values):
        raise InputError(f"{path}: {found:.80} would be filled in from this machine, and a saved value is final.")
    return {} if values is None else values


def _interpolation(value: Any) -> str | None:
    """The first text with `${` in a value."""
    if isinstance(value, str):
        return value if "${" in value else None
    items = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _interpolation(item))), None)
