"""Talk to a run, in the terminal or in a browser: `python -m instruct_lm.chat --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_lm.commands.exit_status import exit_status
from instruct_lm.errors import InputError
from instruct_lm.io.run_files import UNTUNED

if TYPE_CHECKING:
    from instruct_lm.respond import Responder

EMPTY = "Write an instruction, such as: Name the capital of Colombia."
_BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_PARTIAL = "\ufffd"  # what an unfinished character decodes to


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat until the input ends; returns the exit status."""
    return exit_status(_chat, _parser().parse_args(arguments))


def _chat(options: argparse.Namespace) -> None:
    responder = load(options)
    about = (
        f"{options.run}: {options.checkpoint} weights, prompt style {responder.style.name}, at most "
        f"{responder.max_new_tokens} tokens an answer. The model sees each instruction alone, none before it."
    )
    if options.web:
        serve(responder, about, options.port)
    else:
        talk(responder, about)


def load(options: argparse.Namespace) -> Responder:
    """The run's model with its tokenizer, prompt style and generation settings.

    Raises:
        InputError: No run folder, no such checkpoint or device, or a setting out of range.
    """
    from instruct_lm.commands.build import build_fetcher, load_responder, resolve
    from instruct_lm.commands.check_config import make_config, nest
    from instruct_lm.commands.runs import checkpoint_path, load_run_config
    from instruct_lm.config import TrainConfig, flatten

    values = flatten(load_run_config(options.run).model_dump()) | {"device.devices": 1, "device.precision": None}
    checkpoint = None if options.checkpoint == UNTUNED else checkpoint_path(options.run, options.checkpoint)
    given = {"fast": options.fast, "device.accelerator": options.device}
    given |= {f"generation.{name}": getattr(options, name) for name in ("max_new_tokens", "temperature")}
    values |= {key: value for key, value in given.items() if value is not None}
    if values["generation.temperature"] == 0:
        values |= {"generation.top_k": None, "generation.top_p": None}
    config = make_config(TrainConfig, nest(values))
    fetcher = build_fetcher(config)
    return load_responder(resolve(config, fetcher), checkpoint, fetcher)


def answers(responder: Responder, instruction: str) -> Iterator[str]:
    """Yield the growing answer to an instruction, complete characters only; a remark first if the prompt was cut."""
    from instruct_lm.data.conversation import Conversation

    if not instruction.strip():
        yield EMPTY
        return
    asked = Conversation.of(instruction.strip())
    remark = ""
    if cut := responder.cut_tokens(asked):
        remark = f"[The instruction is too long for the model: its last {cut:,} tokens were left out.]\n"
        yield remark
    for text in responder.stream(asked):
        yield remark + "".join(c for c in text.rstrip(_PARTIAL) if c in "\n\t" or not _is_control(c))


def _is_control(character: str) -> bool:
    """Whether a terminal acts on a character in place of showing it: control codes, changes of writing direction."""
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _BIDIRECTIONAL


def talk(responder: Responder, about: str) -> None:
    """Read instructions from the terminal, or a line each from a pipe, and print the answers as they grow."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then takes lines beyond the terminal's own 4,096 bytes)
        print(f"{about}\nCtrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            instruction = input("\n> " if interactive else "")
        except EOFError:
            return
        shown = ""
        try:
            for text in answers(responder, instruction):
                # Print what is new. A text that does not continue the shown one starts on a new line.
                piece = text.removeprefix(shown) if text.startswith(shown) else f"\n{text}"
                print(piece, end="", flush=True)
                shown = text
            print()
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" [stopped]")


def serve(responder: Responder, about: str, port: int | None) -> None:
    """Serve a page on this machine until Ctrl-C.

    Raises:
        InputError: gradio is not installed, or the port is taken.
    """
    if port is not None and not 0 < port < 65536:
        raise InputError(f"--port {port}: give a number from 1 to 65535.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no usage reports
    try:
        import gradio
    except ImportError as error:
        raise InputError("--web needs gradio: pip install 'instruct-lm[web]' (here: -e '.[web]').") from error

    def respond(message: str, history: list[Any]) -> Iterator[str]:
        yield from answers(responder, message)

    # System fonts, so that the page loads nothing from another host.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    shown = gradio.Chatbot(render_markdown=False, show_label=False)  # an answer is plain text
    page = gradio.ChatInterface(
        respond, chatbot=shown, title="Instruct-LM", description=about, api_visibility="private"
    )
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[])
    except OSError as error:
        raise InputError(f"Port {port} is not free ({error}): choose another, or leave out --port.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m instruct_lm.chat", description="Talk to a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run of train.py")
    parser.add_argument("--checkpoint", choices=("best", "last", UNTUNED), default="best", help="default: best")
    parser.add_argument("--web", action="store_true", help="a page in the browser in place of the terminal")
    parser.add_argument("--port", type=int, help="of the page; default: the first free one from 7860 on")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "mps"), default="auto", help="default: auto")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; default: the run's own")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy; default: the run's own")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="--no-fast: slower")
    return parser
