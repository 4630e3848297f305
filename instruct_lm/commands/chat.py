"""Talk to a run, in the terminal or in a browser: `python -m instruct_lm.chat --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_lm.commands.deferred_imports import defer_imports
from instruct_lm.commands.exit_status import VERSION, exit_status
from instruct_lm.errors import InputError
from instruct_lm.io.conf_files import flatten
from instruct_lm.io.run_files import UNTUNED

if TYPE_CHECKING:
    from instruct_lm.respond import Responder


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat until the input ends; returns the exit status."""
    return exit_status(_chat, _parser().parse_args(arguments))


def _chat(options: argparse.Namespace) -> None:
    if options.port is not None and not 0 < options.port < 65536:
        raise InputError(f"--port {options.port}: give a number from 1 to 65535.")
    defer_imports()
    from instruct_lm.commands.chat_session import Chat

    responder = load(options)
    interactive = options.web or sys.stdin.isatty()
    history = interactive and responder.style.turns if options.history is None else options.history
    chat = Chat(responder, history, options.system)
    about = (
        f"{options.run}: {options.checkpoint} weights, prompt style {responder.style.name}, at most "
        f"{responder.max_new_tokens} tokens an answer. {chat.about}"
    )
    if options.web:
        from instruct_lm.commands.chat_page import serve

        serve(chat, about, options.port)
    else:
        from instruct_lm.commands.chat_terminal import talk

        talk(chat, about)


def load(options: argparse.Namespace) -> Responder:
    """The run's model with its tokenizer, prompt style and generation settings.

    Raises:
        InputError: No run folder, no such checkpoint or device, or a setting out of range.
    """
    from instruct_lm.commands.build import build_fetcher, choose_accelerator, load_responder, resolve
    from instruct_lm.commands.check_config import make_config, nest
    from instruct_lm.commands.origins import check_origin
    from instruct_lm.commands.precision import default, with_precision
    from instruct_lm.commands.runs import checkpoint_path, find_run, load_run_config
    from instruct_lm.config import TrainConfig

    values = flatten(load_run_config(options.run).model_dump()) | {"device.devices": 1, "device.precision": None}
    checkpoint = None if options.checkpoint == UNTUNED else checkpoint_path(options.run, options.checkpoint)
    given = {"fast": options.fast, "device.accelerator": options.device}
    given |= {f"generation.{name}": getattr(options, name) for name in ("max_new_tokens", "temperature")}
    values |= {key: value for key, value in given.items() if value is not None}
    if values["generation.temperature"] == 0:
        values |= {"generation.top_k": None, "generation.top_p": None}
    config = make_config(TrainConfig, nest(values))
    config = with_precision(config, default(choose_accelerator(config.device))[0])
    fetcher = build_fetcher(config)
    weights = checkpoint is None or config.lora.rank > 0
    check_origin(find_run(options.run), config, fetcher, weights=weights, data=False)  # a chat needs none
    return load_responder(resolve(config, fetcher), checkpoint, fetcher)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m instruct_lm.chat", description="Talk to a run.")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run of train.py")
    parser.add_argument("--checkpoint", choices=("best", "last", UNTUNED), default="best", help="default: best")
    parser.add_argument("--web", action="store_true", help="a page in the browser in place of the terminal")
    parser.add_argument("--port", type=int, help="of the page; default: the first free one from 7860 on")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="whether the model sees the conversation so far; default: in the terminal and the page, if the prompt "
        "style is made for several exchanges",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "mps"), default="auto", help="default: auto")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; default: the run's own")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy; default: the run's own")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="--no-fast: slower")
    return parser
