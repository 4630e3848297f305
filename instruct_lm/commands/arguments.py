"""The `key=value` arguments of a command line, checked before Hydra composes them."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from instruct_lm.commands import pasting
from instruct_lm.commands.check_config import all_keys, find_faults, nest, no_such_key
from instruct_lm.commands.exit_status import VERSION
from instruct_lm.commands.slips import flags_as_keys
from instruct_lm.config import COMMANDS
from instruct_lm.errors import InputError
from instruct_lm.io.conf_files import CONF, choices


def check_arguments(name: str) -> bool:
    """Check the `key=value` arguments of the command line before Hydra composes them.

    Returns:
        Whether the command will run, rather than show its help or configuration.

    Raises:
        InputError: Wrong keys, choices, values or syntax, all of them in one message.
    """
    parser, faults = _parser(), []
    known = [flag for action in parser._actions for flag in action.option_strings]
    kept, flags = flags_as_keys(sys.argv[1:], known)
    for typed, key, given in flags:
        written = "settings are written key=value"
        if key in all_keys(COMMANDS[name]):
            faults.append(f"{typed}: {written}. Did you mean {key}={given or 'true'}?")
        else:
            remedy = no_such_key(COMMANDS[name], key, given).replace("there is no such key", written)
            faults.append(f"{typed}: {remedy}")
    args = parser.parse_args(kept)
    if args.shell_completion:
        return False
    overrides: list[Override] = []
    syntax = OverridesParser.create()
    for line in args.overrides:
        try:
            overrides += syntax.parse_overrides([line])
        except OverrideParseException as error:
            key, equals, value = error.override.partition("=")
            quoted = shlex.quote(pasting.override(key, value))
            remedy = f"quote such a value twice: {quoted}" if equals else "write key=value."
            faults.append(f"{error.override} cannot be read: {remedy}")
    overrides = [override for override in overrides if not override.is_hydra_override()]
    multirun = args.multirun or _asks_for_multirun(overrides)
    faults += [fault for override in overrides for fault in _faults(name, override, multirun)]
    if faults:
        raise InputError("\n".join(faults))
    return not (args.help or args.hydra_help or args.cfg or args.info)


class _Parser(argparse.ArgumentParser):
    """Hydra's flags, with errors as the others are."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments" in message:  # argparse takes positional arguments in one block
            message += ". Put flags such as -m before all key=value arguments"
        raise InputError(f"{message}. --help lists the keys, --hydra-help the flags.")


def _parser() -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.__class__ = _Parser
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = VERSION  # type: ignore[attr-defined]
    return parser


def _typed(override: Override) -> str | None:
    """The value as it was typed."""
    return (override.input_line or "").partition("=")[2] or None


def _asks_for_multirun(overrides: list[Override]) -> bool:
    """Whether an experiment is a multirun of itself."""
    files = [CONF / "experiment" / f"{o.value()}.yaml" for o in overrides if o.key_or_group == "experiment"]
    modes = [OmegaConf.select(OmegaConf.load(file), "hydra.mode") for file in files if file.is_file()]
    return "MULTIRUN" in modes


def _faults(name: str, override: Override, multirun: bool) -> Iterator[str]:
    """What is wrong with one override."""
    kind, key, line = COMMANDS[name], override.key_or_group, override.input_line or ""
    known, groups = all_keys(kind), group_defaults(name)
    group = f"{key}@{override.package}" if override.package else key
    if override.is_delete():
        yield f"{line}: a key cannot be taken away. Set it to null or another value."
    elif group not in groups and key not in known:
        yield f"{line}: {no_such_key(kind, key, _typed(override))}"
    elif package := next((group for group in groups if group.endswith(f"@{key}")), None):
        yield f"{line}: write {package}={override.value()}."
    elif override.is_add():
        yield f"{line} adds what is there already: write {line[1:]} without the +."
    elif override.is_sweep_override() and not multirun:
        value = override.get_value_string()
        yield f"""{line}: add -m (--multirun) for a job each, or write {key}=[{value}] or '{key}="{value}"' for one."""
    else:
        for value in _values(override):
            if group in groups and value not in choices(key):
                typed = "null" if value is None else value
                yield f"{group}={typed}: there is no such choice. Choose one of {', '.join(choices(key))}."
            elif group not in groups and "${" not in str(value):
                # Of this key alone: all the others are missing.
                yield from (fault for at, fault in find_faults(kind, nest({key: value})).items() if at == key)


def _values(override: Override) -> list[Any]:
    """The value of an override, or the values of a sweep that can be listed without Hydra."""
    if not override.is_discrete_sweep():
        return [] if override.is_sweep_override() else [override.value()]
    parser = OverridesParser.create()
    return [parser.parse_override(f"key={text}").value() for text in override.sweep_iterator(Transformer.str)]


def group_defaults(name: str) -> list[str]:
    """The groups that `conf/<name>.yaml` lists, such as ``model`` and ``judge@second_judge``."""
    entries: Any = OmegaConf.load(CONF / f"{name}.yaml").defaults
    keys = [str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry]
    return [key for key in keys if not key.startswith("override ")]
