"""Hostile words: command lines, saved configurations, and the replies of judges."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from hypothesis import strategies as st

from faults.files_mutate import CONTROLS, MAGIC, PATHS, grown, hostile, mutate_bytes, mutate_value

_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
_YAML = (
    _LAUGHS,
    "a: &a\n  b: *a\n",
    "a: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "!!python/object/new:os.system [x]",
    "_target_: os.system\nseed: 1\n",
    "? {a: b}\n: c\n",
    "? [a]\n: c\n",
    "a: 1\na: 2\n",
    "- 1\n- 2\n",
    "just text",
    "",
    "\x00",
    "%YAML 9.9\n---\na: 1\n",
    "a: " + "[" * 20_000,
    "a: " + "{a: " * 20_000,
    "x: 2001-01-01\ny: 1:2:3\nz: 0o7\n",
    "a: *nothing",
    "<<: *nothing",
    "a: &a {b: 1}\nc:\n  <<: *a\n",
    "seed: 1" + "0" * 100_000,
    "seed: !!binary x\n",
    "---\na: 1\n---\nb: 2\n",
    "a: ${b}\nb: ${a}\n",
    "a: ${" * 200,
    "seed: ${oc.env:HOME}\n",
)


@functools.cache
def _saved() -> dict[str, Any]:
    """The configuration that a run would save."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from instruct_lm.commands.hydra_app import register
    from instruct_lm.io.conf_files import CONF

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("train", ["model=gpt2-tiny", "data=sample"]), resolve=True)
    return values


@functools.cache
def _keys() -> tuple[str, ...]:
    from instruct_lm.commands.check_config import all_keys
    from instruct_lm.config import TrainConfig

    return tuple(all_keys(TrainConfig))


def configuration(random: Random, folder: Path) -> Callable[[], object]:
    """The configuration file of a stranger's run, or a command line."""
    if random.random() < 0.75:
        return _run_folder(random, folder)
    words = [_override(random) for _ in range(random.choice((1, 1, 2, 4)))]
    return lambda: _command_line(random.choice(("train", "evaluate", "export")), words, folder)


def _run_folder(random: Random, folder: Path) -> Callable[[], object]:
    from instruct_lm.commands.runs import load_run_config

    what = random.random()
    if what < 0.3:
        content = random.choice(_YAML).encode("utf-8", "surrogatepass")
        saved = yaml.safe_dump(_saved()).encode()
        content = random.choice((content, saved + content, content + b"\n" + saved))
    else:
        try:
            content = yaml.safe_dump(mutate_value(random, _saved(), random.choice((1, 2, 4)))).encode(
                "utf-8", "replace"
            )
        except (RecursionError, yaml.YAMLError):
            content = b"[" * 1000
    if random.random() < 0.4:
        content = mutate_bytes(random, content)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_bytes(content)
    return lambda: load_run_config(folder)


def _override(random: Random) -> str:
    key = (
        random.choice(_keys())
        if random.random() < 0.85
        else str(random.choice((*PATHS, *CONTROLS, "a.b", "+seed", "~seed")))
    )
    value = random.choice(
        (
            lambda: str(hostile(random))[:2000],
            lambda: str(random.choice(MAGIC) * random.choice((1, -1, 0.1))),
            lambda: random.choice((*PATHS, *CONTROLS)),
            lambda: random.choice(
                ("[" * 300, "{" * 300, "(" * 300, "${" * 100, "${oc.env:HOME}", "${seed}", "glob(*)", "1,2")
            ),
            lambda: random.choice(
                ("range(1,10**9)", "choice(1,2)", "interval(0,1)", "range(0,100000000)", "sort(1,2)", "int(x)")
            ),
            lambda: grown(st.text(st.sampled_from("[]{}(),:=${}'\"\\ \t\nax1.+~@-é"), max_size=30), random) or "",
            lambda: random.choice(("gpt2-tiny", "sample", "null", "true", "auto", "cpu", "1", "???", "bytes")),
        )
    )()
    return f"{key}={value}".replace("\0", "")


def _command_line(name: str, words: list[str], folder: Path) -> int:
    """The exit status of a command up to where its work would begin; its messages must not be a traceback."""
    from instruct_lm.commands.hydra_app import hydra_command

    out, errors = io.StringIO(), io.StringIO()
    argv, here = sys.argv, Path.cwd()
    sys.argv = ["command", *words]
    os.chdir(folder)
    status: Any = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            contextlib.suppress(SystemExit),
            hydra_command(name, lambda config: None) as run,
        ):
            try:
                run()
            except SystemExit as ended:
                status = ended.code
                raise
    finally:
        sys.argv = argv
        os.chdir(here)
    said = out.getvalue() + errors.getvalue()
    if "Traceback" in said:
        raise AssertionError(f"a traceback for {words!a}: {said.splitlines()[-1][:300]!a}")
    if any(control in said for control in ("\x1b", "\x9b", "\x07", "\u202e")):
        raise AssertionError(f"a control character for {words!a}: {said[:300]!a}")
    return status


_REPLY = st.lists(
    st.sampled_from(
        [
            "Score: ",
            "85",
            "/100",
            " out of ",
            "{",
            "}",
            '"score"',
            ":",
            "[",
            "]",
            "\\boxed{",
            "<think>",
            "</think>",
            "**",
            "得分",
            "：",
            "-",
            "→",
            " to ",
            "\n",
            " ",
            "I'd give it ",
            "rating",
            "(",
            ")",
            ",",
            ".",
            "0.85",
            "'",
            "$",
            "\\frac",
            "/",
            "is ",
            "Final score",
            "<|channel|>",
            "final",
            "<|message|>",
            "| ",
            "1e999",
            "NaN",
            "٨٥",
            "８５",
            "\ud800",
            "of",
            "100",
            "and ",
        ]
    ),
    max_size=60,
).map("".join)
_SCALES = ((0.0, 100.0), (1.0, 5.0), (0.0, 10.0), (-1.0, 1.0))


def scores(random: Random, folder: Path) -> Callable[[], object]:
    """A judge's reply, up to a hundred thousand characters."""
    from instruct_lm.evaluation.judges.parsing import parse_feedback, parse_score

    piece = grown(_REPLY | st.text(max_size=40), random) or str(hostile(random))[:5000]
    if random.random() < 0.3:
        piece = random.choice((piece, piece[:8], piece[:3], piece[:1])) * random.choice((10, 1000, 20_000))
    reply = piece[:100_000] + random.choice(("", "", " Score: 85", "\n85", "{"))
    scale = random.choice(_SCALES)

    def read() -> object:
        score = parse_score(reply, scale)
        if score is not None and not scale[0] <= score <= scale[1]:
            raise AssertionError(f"{score} is not on the scale {scale}")
        return parse_feedback(reply)

    return read
