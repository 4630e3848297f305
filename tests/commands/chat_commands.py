"""The chat as a process, with a model that says what a test wants: `python -m tests.commands.chat_commands`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instruct_lm.commands import chat
from instruct_lm.commands.chat_session import Chat
from instruct_lm.commands.exit_status import exit_status
from instruct_lm.data.conversation import Conversation
from instruct_lm.data.prompts import PHI3
from instruct_lm.data.tokenizer import load_tokenizer
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.respond import Responder

TIMEOUT = 120  # seconds for a page or an answer to come; a limit, not a measure
WORD = "word "  # what the model says again and again where a test says nothing else


def options(run: Path, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(chat._parser().parse_args([str(run)])), **changed})


def command(run: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "instruct_lm.chat", str(run), *args]


def scripted(system: str = "") -> Chat:
    """A chat of style phi3 with room for 8,000 tokens, a byte each, and 20 for the answer."""
    model = GPT(GPTConfig(vocab_size=257, block_size=8000, n_layer=1, n_head=1, n_embd=8))
    return Chat(Responder(model, load_tokenizer("bytes"), PHI3, max_new_tokens=20), True, system)


def scripted_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "tests.commands.chat_commands", *args]


def script(asked: Path, says: dict[str, str]) -> dict[str, str]:
    """The environment of a scripted command: where it writes the prompts, and the answers by instruction.

    It says `word ` again and again where it is told no answer. An answer comes a byte at a time.
    """
    answers = {question: answer.encode().hex() for question, answer in says.items()}
    return {**os.environ, "ASKED": str(asked), "SAYS": json.dumps(answers), "PYTHONUNBUFFERED": "1"}


def prompts(asked: Path) -> list[list[int]]:
    """The prompts that the model was given."""
    return [json.loads(line) for line in asked.read_text().splitlines()]


def _stream(self: Responder, conversation: Conversation) -> Iterator[str]:
    with Path(os.environ["ASKED"]).open("a") as file:
        print(json.dumps(self.prompt_ids(conversation)), file=file)
    said = json.loads(os.environ["SAYS"]).get(conversation.prompt[-1].text)
    tokens = [WORD.encode()] * 5000 if said is None else [bytes([b]) for b in bytes.fromhex(said)]
    text = b""
    for token in tokens:
        text += token
        yield text.decode(errors="replace")
        time.sleep(0.02 if said is None else 0)  # an answer to be stopped takes its time


if __name__ == "__main__":
    from instruct_lm.commands.chat_page import serve
    from instruct_lm.commands.chat_terminal import talk

    Responder.stream = _stream  # type: ignore[method-assign]
    talking = scripted(sys.argv[2] if sys.argv[1:2] == ["--system"] else "")
    sys.exit(exit_status(serve, talking, "about", None) if "--web" in sys.argv else exit_status(talk, talking, "about"))
