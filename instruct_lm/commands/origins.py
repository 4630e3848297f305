"""What a run was made from, by content: recorded before it trains, compared when it goes on or its weights are used."""

import logging
import platform
import subprocess
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from instruct_lm import __version__
from instruct_lm.config import BUILT_IN, CommonConfig, DataCommandConfig, TrainConfig
from instruct_lm.errors import InputError
from instruct_lm.io import processes
from instruct_lm.io.conf_files import CONF
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.files import content_hash, shown
from instruct_lm.io.records import read_record, write_record
from instruct_lm.io.run_files import MADE_FROM

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "lightning", "tokenizers")
_WHY = {
    "data": "entries that it was trained on may stand in another split",
    "tokenizer": "the same text would become other tokens",
    "weights": "its checkpoint goes with that base alone",
}


def record_origin(config: TrainConfig, fetcher: Fetcher) -> None:
    """Write `made_from.json` of a run that begins; of a run that goes on, compare with it (see `check_origin`).

    The record holds the run's own number (`run`), `data`, `weights` and `tokenizer`, each with source and sha256 (see
    `content_hash`; null for none and for what comes with the package), `versions`, and `git`: commit and whether files
    differed from it, or null outside a clone.
    """
    if not processes.is_first():
        return
    if config.resume is not None:
        check_origin(config.folder, config, fetcher, weights=config.lora.rank > 0)
        return
    sources = {"data": config.data.source, "weights": config.model.weights, "tokenizer": config.model.tokenizer}
    hashes = _hashes(config, fetcher, sources)
    made_from = {name: {"source": source, "sha256": hashes[name]} for name, source in sources.items()}
    surroundings = {"versions": _versions(), "git": _git()}
    write_record({"run": str(uuid.uuid4()), **made_from, **surroundings}, config.folder / MADE_FROM)


def check_origin(run: Path, config: CommonConfig, fetcher: Fetcher, *, weights: bool, data: bool = True) -> None:
    """Compare what a run was made from with what is there now.

    A source that the command line replaces is another data set, which an evaluation may have, and passes. Other
    versions and another commit are warned of. A run whose record is missing or damaged cannot be compared, and a
    warning says so: its checkpoints have checks of their own.

    Args:
        run: The run's folder.
        config: What is to be used now, of a run that goes on, is evaluated, exported or chatted with.
        fetcher: Fetches the sources.
        weights: Whether the base's weights will be used, as under adapters and for the untuned model.
        data: Whether the data will be used.

    Raises:
        InputError: The content of data, tokenizer or weights has changed.
    """
    record = read_record(run / MADE_FROM)
    if record is None:
        log.warning("%s has no record of what it was made from: other data or weights would not be noticed", shown(run))
        return
    sources = {"tokenizer": config.model.tokenizer}
    if data and isinstance(config, DataCommandConfig):
        sources["data"] = config.data.source
    if weights:
        sources["weights"] = config.model.weights
    then = {name: record[name]["sha256"] for name, source in sources.items() if record[name]["source"] == source}
    now = _hashes(config, fetcher, {name: sources[name] for name, sha256 in then.items() if sha256 is not None})
    for name, sha256 in now.items():
        if sha256 != then[name]:
            key = "data.source" if name == "data" else f"model.{name}"
            raise InputError(
                f"{key}={sources[name]} has changed since the run {shown(run)} was made from it (sha256 "
                f"{str(sha256)[:12]}…, then {then[name][:12]}…): {_WHY[name]}. Put the old file back, or train anew."
            )
    if differing := [*_differing(record["versions"], _versions()), *_differing(_code(record["git"]), _code(_git()))]:
        log.warning("%s was made by other versions: %s. Results may differ", shown(run), "; ".join(differing))


def local_contents(**paths: str | Path | None) -> dict[str, str | None]:
    """Name → sha256 of each path that is a local file or folder; None for others, which their names and hashes tell.

    For `tokenizer`, weights beside it do not count.
    """
    hashes: dict[str, str | None] = dict.fromkeys(paths)
    for name, path in paths.items():
        if path is not None and Path(path).exists():
            hashes[name] = content_hash(Path(path), weights=name != "tokenizer")
    return hashes


def _hashes(config: CommonConfig, fetcher: Fetcher, sources: Mapping[str, str | None]) -> dict[str, str | None]:
    """The content of fetched sources, as in `local_contents`."""
    from instruct_lm.data.dataset import data_file

    known = {"weights": config.model.weights_sha256, "tokenizer": config.model.tokenizer_sha256}
    if isinstance(config, DataCommandConfig):
        known["data"] = config.data.sha256
    fetched: dict[str, Path | None] = dict.fromkeys(sources)
    for name, source in sources.items():
        if name == "data":
            fetched[name] = data_file(fetcher.fetch(str(source), sha256=known[name]))
        elif source is not None and source not in BUILT_IN:
            fetched[name] = fetcher.fetch(source, sha256=known[name])
    return local_contents(**fetched)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "instruct-lm": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git() -> dict[str, Any] | None:
    """The commit of the code that runs, and whether its files differ from it; None where it is no clone."""
    code = CONF.parent

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(code), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != code:  # installed within another project's clone
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _code(git: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"commit": str(git["commit"])[:12] + (" with changes" if git["changed"] else "")} if git else {}


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} {then[name]}, now {now[name]}" for name in then if name in now and then[name] != now[name]]
