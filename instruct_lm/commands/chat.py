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

from instruct_lm.errors import InputError, RunError
from instruct_lm.fast.allocator import keep_freed_memory

if TYPE_CHECKING:
    from instruct_lm.respond import Responder

EMPTY = "Write an instruction, such as: Name the capital of Colombia."
_BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_PARTIAL = "\ufffd"  # what an unfinished character decodes to


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat until the input ends; returns 2 after a message on stderr for bad input."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        responder = load(options)
        about = (
            f"{options.run}: {options.checkpoint} weights, prompt style {responder.style.name}, at most "
            f"{responder.max_new_tokens} tokens an answer. The model sees each instruction alone, none before it."
        )
        if options.web:
            serve(responder, about, options.port)
        else:
            talk(responder, about)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


def load(options: argparse.Namespace) -> Responder:
    """The run's model with its tokenizer, prompt style and generation settings.

    Raises:
        InputError: no run folder, no such checkpoint or device, or a setting out of range.
    """
    keep_freed_memory()  # before torch allocates
    from omegaconf import OmegaConf

    from instruct_lm.commands import build
    from instruct_lm.commands.runs import checkpoint_path, load_run_config
    from instruct_lm.config import check_device
    from instruct_lm.io.run_files import UNTUNED

    cfg = load_run_config(options.run)
    checkpoint = None if options.checkpoint == UNTUNED else checkpoint_path(options.run, options.checkpoint)
    cfg.device.accelerator, cfg.device.devices, cfg.device.precision = options.device, 1, None
    accelerator = check_device(cfg.device)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    for name in ("max_new_tokens", "temperature"):
        if (value := getattr(options, name)) is not None:
            config["generation"][name] = value
    if config["generation"]["temperature"] == 0:
        config["generation"] |= {"top_k": None, "top_p": None}
    fetcher = build.build_fetcher(config)
    tokenizer = build.build_tokenizer(config["model"], fetcher)
    if checkpoint is None:
        model = build.build_model(config["model"], config["lora"], config["seed"], fetcher)
    else:
        model = build.load_trained(config, checkpoint, fetcher)
    return build.build_responder(config, model.eval().to("cuda" if accelerator == "gpu" else accelerator), tokenizer)


def answers(responder: Responder, instruction: str) -> Iterator[str]:
    """The growing answer to an instruction, without a character that is not complete; a remark if it is cut."""
    from instruct_lm.data.prompts import Example

    if not instruction.strip():
        yield EMPTY
        return
    example = Example(instruction.strip(), "", "")
    cut = responder.cut_tokens(example)
    remark = f"[The instruction is too long for the model: its last {cut:,} tokens were left out.]\n" if cut else ""
    if remark:
        yield remark
    for text in responder.stream(example):
        yield remark + "".join(c for c in text.rstrip(_PARTIAL) if c in "\n\t" or not _commands(c))


def _commands(character: str) -> bool:
    """Whether a terminal obeys it rather than shows it: control characters, and those that turn the writing round."""
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
                # A text that does not go on from what is shown begins anew.
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
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nobody else is told
    try:
        import gradio
    except ImportError as error:
        raise InputError("--web needs gradio: pip install 'instruct-lm[web]' (here: -e '.[web]').") from error

    def respond(message: str, history: list[Any]) -> Iterator[str]:
        yield from answers(responder, message)

    # Fonts of the system: the page asks no other host for them.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    shown = gradio.Chatbot(render_markdown=False, show_label=False)  # an answer is text, whatever it holds
    page = gradio.ChatInterface(
        respond, chatbot=shown, title="Instruct-LM", description=about, api_visibility="private"
    )
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[])
    except OSError as error:
        raise InputError(f"port {port} cannot be had ({error}): choose another, or leave out --port.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m instruct_lm.chat", description="Talk to a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run of train.py")
    parser.add_argument("--checkpoint", choices=("best", "last", "untuned"), default="best", help="default: best")
    parser.add_argument("--web", action="store_true", help="a page in the browser in place of the terminal")
    parser.add_argument("--port", type=_port, help="of the page; default: the first free one from 7860 on")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "mps"), default="auto", help="default: auto")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="of an answer; default: the run's own")
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="0: greedy; default: the run's own")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a whole number from 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible: give a whole number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not possible: give 0 or a positive number")


if __name__ == "__main__":
    sys.exit(main())
