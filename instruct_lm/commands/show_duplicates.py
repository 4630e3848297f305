"""List near-duplicates: `python -m instruct_lm.data [source] --duplicates [threshold] [--json FILE]`."""

import argparse
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

from instruct_lm.commands.own_files import check_output_file
from instruct_lm.data.dataset import Splits
from instruct_lm.data.near_duplicates import near_duplicates, questions
from instruct_lm.errors import InputError
from instruct_lm.io.files import shown, write_json

_MOST = 20  # pairs in the table
_WIDTH = 70  # characters of a text in the table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--duplicates` and `--json`."""
    group = parser.add_argument_group("near-duplicates")
    group.add_argument(
        "--duplicates",
        nargs="?",
        const=0.9,
        type=_threshold,
        metavar="THRESHOLD",
        help="list instead the entries whose prompts are at least so similar (cosine of TF-IDF over character "
        "trigrams, 0 to 1; default: 0.9), within and between the splits",
    )
    group.add_argument("--json", metavar="FILE", help="with --duplicates: write all pairs as JSON; - prints only them")


def _threshold(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; name a file before --duplicates") from None


def show_duplicates(splits: Splits, threshold: float | None, file: str | None) -> None:
    """Print the near-duplicates, those between splits first, then the most similar.

    Args:
        splits: The entries.
        threshold: As for `near_duplicates`; None, where `--duplicates` is missing, is refused.
        file: Where to write all of them as JSON; "-": print JSON alone; None: print a table alone.

    Raises:
        InputError: As for `near_duplicates`, or the file cannot be written.
    """
    if threshold is None:
        raise InputError(f"--json {file} goes with --duplicates.")
    if file not in (None, "-"):
        check_output_file(Path(str(file)), "--json")
    entries = [(name, entry) for name, part in splits._asdict().items() for entry in part]
    texts = questions([entry for _, entry in entries])
    found: list[dict[str, Any]] = []
    for first, second, similarity in near_duplicates(texts, threshold, parts=[name for name, _ in entries]):
        sides = [
            {"split": name, "entry": entry.number, "text": text}
            for (name, entry), text in ((entries[i], texts[i]) for i in (first, second))
        ]
        found.append({"similarity": round(similarity, 6), "first": sides[0], "second": sides[1]})
    found.sort(key=lambda pair: pair["first"]["split"] == pair["second"]["split"])  # stable: the most similar first
    counts = Counter((pair["first"]["split"], pair["second"]["split"]) for pair in found)
    kinds = [*combinations(Splits._fields, 2), *((name, name) for name in Splits._fields)]
    counted = [{"splits": list(kind), "pairs": counts[kind]} for kind in kinds]
    report = {"threshold": threshold, "entries": len(entries), "counts": counted, "pairs": found}
    if file == "-":
        print(json.dumps(report, indent=2))
        return
    _print_table(report)
    if file is not None:
        try:
            write_json(report, Path(file))
        except OSError as error:
            raise InputError(f"--json {file}: {error.strerror or error}.") from error
        print(f"\nAll {len(found)} pairs: {shown(Path(file).resolve())}")


def _print_table(report: dict[str, Any]) -> None:
    pairs = report["pairs"]
    print(f"{report['entries']} entries; pairs with a similarity of at least {report['threshold']:g}: {len(pairs)}")
    for count in report["counts"]:
        first, second = count["splits"]
        print(f"  {'within ' + first if first == second else f'{first} and {second}'}: {count['pairs']}")
    print("Compared is what the model is asked: instruction, input, system and earlier turns; case and spacing aside.")
    if pairs:
        print(f"\n{'similarity':>10}  {'split':<10}{'entry':>7}  text")
    for pair in pairs[:_MOST]:
        for side, similarity in ((pair["first"], f"{pair['similarity']:.3f}"), (pair["second"], "")):
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(side["text"].split()))
            text = text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
            print(f"{similarity:>10}  {side['split']:<10}{side['entry']:>7}  {text}")
    if len(pairs) > _MOST:
        print(f"and {len(pairs) - _MOST} more; --json FILE writes all")
