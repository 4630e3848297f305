"""Show what the model sees: `python -m instruct_lm.data [source] [--mask-instructions] [--entry N]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from instruct_lm.commands.exit_status import VERSION, exit_status
from instruct_lm.commands.show_duplicates import add_options, show_duplicates
from instruct_lm.data.dataset import Splits, duplicates_between, read_conversations, split
from instruct_lm.data.encoded import EncodedExample, loss_weights
from instruct_lm.data.encoded import resolve_prompt_loss_weight as resolve_weight
from instruct_lm.data.encoding import OVERLONG, encode_conversations
from instruct_lm.data.pieces import Kind
from instruct_lm.data.prompts import STYLES, get_style
from instruct_lm.data.tokenizer import Tokenizer, load_tokenizer
from instruct_lm.errors import InputError, listing, presentable, visible
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.sources import default_cache_dir

_COLOURS = {0.0: "\x1b[90m", 1.0: "\x1b[32m"}  # grey: not trained, green: trained; yellow: in between


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the statistics of a data file and one entry with its loss weights; returns the exit status."""
    parser = argparse.ArgumentParser("python -m instruct_lm.data", description="Show entries as the model sees them.")
    add = parser.add_argument
    add("--version", action="version", version=VERSION)
    add(
        "source",
        nargs="?",
        default="sample",
        help="JSON, JSON lines, CSV, TSV or Parquet; default: the embedded sample",
    )
    add("--columns", nargs="+", default=[], metavar="FIELD=KEY", help="keys of other names, such as output=answer")
    add("--unusable", default="drop", choices=("drop", "error"), help="what becomes of blank entries (default: drop)")
    add("--clean", action="store_true", help="drop inputs that stand for none, such as <noinput>")
    add("--tokenizer", help="merges.txt, a GGUF file or bytes; default: one in the cache, else bytes")
    add("--style", default="alpaca", choices=[*STYLES, "template"], help="prompt style (default: %(default)s)")
    add("--mask-instructions", action="store_true", help="train on the response only")
    add("--mask-header", action="store_true", help="weight the response header like the prompt")
    add("--prompt-loss-weight", type=float, metavar="W", help="weight of prompt tokens, 0 to 1")
    add("--entry", type=int, metavar="N", help="entry to print, from 1 (default: the first that can be used)")
    add("--max-length", type=int, metavar="TOKENS", help="most tokens of an entry")
    add("--overlong", default="drop", choices=OVERLONG, help="what becomes of longer ones (default: %(default)s)")
    add_options(parser)
    return exit_status(_show, parser.parse_args(arguments))


def _show(options: argparse.Namespace) -> None:
    weight = resolve_weight(options.mask_instructions, options.prompt_loss_weight)
    if wrong := [pair for pair in options.columns if "=" not in pair]:
        raise InputError(
            f"--columns {wrong[0]}: write FIELD=KEY, such as output=answer; and the file before --columns."
        )
    columns = dict(pair.split("=", 1) for pair in options.columns)
    conversations, report = read_conversations(
        Fetcher().fetch(options.source), columns=columns, unusable=options.unusable, clean=options.clean
    )
    if options.duplicates is not None or options.json is not None:
        return show_duplicates(split(conversations), options.duplicates, options.json)
    number = conversations[0].number if options.entry is None else options.entry
    shown = [conversation for conversation in conversations if conversation.number == number]
    if not shown:
        numbers = f"{conversations[0].number} to {conversations[-1].number}"
        raise InputError(f"--entry {number}: the file has usable entries from {numbers}, and this is none.")
    tokenizer = _tokenizer(options.tokenizer)
    style = get_style(options.style, tokenizer)
    splits = split(conversations)

    about = f"{len(conversations)} entries, style {style.name}, {tokenizer.vocab_size} token ids"
    print(f"{presentable(options.source)}: {about}")
    print(*(line for _, line in report), sep="\n")
    print(f"\n{'split':<12}{'entries':>8}{'dropped':>9}{'cut':>6}{'tokens':>10}{'mean':>8}{'max':>6}{'trained':>9}")
    for name, part in splits._asdict().items():
        encoded = encode_conversations(part, tokenizer, style, options.max_length, options.overlong)
        lengths = encoded.lengths
        trained = sum(float(loss_weights(row, weight, options.mask_header).sum()) for row in encoded)
        share = trained / (lengths.sum() - len(encoded))  # the first token of a row is never a target
        counts = f"{len(part):>8}{encoded.dropped:>9}{encoded.truncated:>6}"
        print(f"{name:<12}{counts}{lengths.sum():>10}{lengths.mean():>8.1f}{lengths.max():>6}{share:>9.1%}")
    print("trained: sum of the loss weights / number of targets, which are all tokens of an entry but the first")
    _show_duplicates(splits)

    row = encode_conversations(shown, tokenizer, style, options.max_length, options.overlong)[0]
    prompt, header, response = ((row.kinds == kind).sum() for kind in Kind)
    sizes = f"{prompt} prompt + {header} header + {response} response tokens (end tokens included)"
    print(f"\nEntry {number}: {sizes}")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    legend = "grey: weight 0, green: weight 1, yellow: in between" if colour else "[w|text] has weight w in the loss"
    print(f"({legend})\n\n{render(row, loss_weights(row, weight, options.mask_header), tokenizer, colour)}")


def render(row: EncodedExample, weights: np.ndarray, tokenizer: Tokenizer, colour: bool) -> str:
    """The text of an encoded entry with each token's loss weight, as a colour or as `[weight|text]`.

    Args:
        row: An encoded entry of length n.
        weights: (n,) float32, from `loss_weights`.
        tokenizer: The one that encoded it.
        colour: Whether to mark by ANSI colours.
    """
    spans = []
    for weight, pairs in groupby(zip(weights.tolist(), row.input_ids.tolist(), strict=True), key=lambda pair: pair[0]):
        text = tokenizer.decode(token for _, token in pairs)
        text = visible(text)
        spans.append(f"{_COLOURS.get(weight, chr(27) + '[33m')}{text}\x1b[0m" if colour else f"[{weight:g}|{text}]")
    return "".join(spans)


def _tokenizer(source: str | None) -> Tokenizer:
    """The tokenizer asked for; else the first in the cache that can be read; else bytes."""
    if source is not None:
        return load_tokenizer(Fetcher().fetch(source))
    cache = default_cache_dir()
    for path in sorted([*cache.rglob("*.gguf"), *cache.rglob("merges.txt")]):
        try:
            tokenizer = load_tokenizer(path)
        except InputError:  # another kind of tokenizer, such as that of a judge's model
            continue
        print(f"tokenizer: {visible(str(path))} (choose another with --tokenizer)")
        return tokenizer
    print("tokenizer: bytes, one token a byte. Give --tokenizer merges.txt or a .gguf to see what a real model sees.")
    return load_tokenizer("bytes")


def _show_duplicates(splits: Splits) -> None:
    lines = []
    for duplicate in duplicates_between(splits):
        places = [f"{name} {number}" for name, found in duplicate.places.items() for number in found]
        lines.append(f"{', '.join(places)}: {duplicate.first.turns[-2].text[:60]!a}")
    summary = f"\nEntries in more than one split (same prompt): {len(lines)}"
    print("\n  ".join([summary, *listing(lines, most=5)]))
