"""`python -m benchmarks [NAME…]`: tables side by side with the peers, and JSON in `benchmarks/results/`.

Every measurement is a process of its own. The contenders of a table take turns, round after round, so that a noisy
machine is noisy to all; the table gives medians over all rounds and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring import busy_programs, entrants, machine, rounds
from benchmarks.tasks import ROOT, rows
from instruct_lm.errors import RunError
from instruct_lm.io.files import write_json

RESULTS = Path(__file__).parent / "results"
PEERS = ("book", "transformers", "trl")
LOSSES = {"all": "all in the loss", "masked": "masked instructions"}
PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}
EXAMPLE_ANSWERS = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/03_model-evaluation"
Table = list[dict[str, Any]]
Tables = Iterator[tuple[str, Table]]


def train_table(size: str, masked: bool, lora: int, precision: str, args: argparse.Namespace, **extra: Any) -> Table:
    """A training step of each contender."""
    sizes = {"size": size, "masked": masked, "lora": lora, "warmup": args.warmup, "steps": args.steps}
    peers = [name for name in args.peers if not (name == "book" and (size == "smollm2-135m" or lora))]
    found = rounds(entrants("train", precision, peers, **sizes, **extra), args.rounds)
    seconds = {name: statistics.median([s for r in results for s in r["seconds"]]) for name, results in found.items()}
    table = []
    for name, results in found.items():
        over = [s / f for r in results for s, f in zip(r["seconds"], r["floor"], strict=True)]
        table.append(
            {
                "tool": name,
                "s/step": round(seconds[name], 2),
                "ours is faster by": round(seconds[name] / seconds["ours"], 2),
                "× the floor": round(statistics.median(over), 2),
                "peak GB": round(statistics.median(r["peak_gb"] for r in results), 2),
                "GFLOP/s": round(statistics.median(r["gflops"] for r in results)),
            }
        )
    return table


def training(args: argparse.Namespace) -> Tables:
    """Training steps: all in the loss, and the instructions masked."""
    for precision in args.precisions:
        for size in args.sizes:
            for loss in args.losses:
                title = f"training step, {size}, batch 8, {LOSSES[loss]}, {PRECISIONS[precision]}"
                yield title, train_table(size, loss == "masked", 0, precision, args)


def lora(args: argparse.Namespace) -> Tables:
    """Training steps of rank-16 adapters."""
    for precision in args.precisions:
        for size in args.sizes:
            title = f"training step, {size}, batch 8, LoRA r16, {PRECISIONS[precision]}"
            yield title, train_table(size, False, 16, precision, args)


def long_examples(args: argparse.Namespace) -> Tables:
    """Training steps on examples of 300 to 1000 tokens."""
    args = argparse.Namespace(**{**vars(args), "peers": [name for name in args.peers if name == "transformers"]})
    for precision in args.precisions:
        title = f"training step, gpt2, batch 8, 300 to 1000 tokens, {PRECISIONS[precision]}"
        yield title, train_table("gpt2", False, 0, precision, args, long=True)


def memory(args: argparse.Namespace) -> Tables:
    """Peak memory of the whole process by setting."""
    settings: dict[str, dict[str, Any]] = {
        "full, default": {},
        "full, bf16": {"precision": "bf16-mixed"},
        "full, activation checkpointing": {"options": {"activation_checkpointing": True}},
        "full, optimizer in backward": {"options": {"in_backward": True}},
        "full, both": {"options": {"activation_checkpointing": True, "in_backward": True}},
        "full, Adafactor": {"options": {"optimizer": "adafactor"}},
        "full, Adafactor, activation checkpointing": {
            "options": {"optimizer": "adafactor", "activation_checkpointing": True}
        },
        "LoRA r16": {"lora": 16},
        "LoRA r16, activation checkpointing": {"lora": 16, "options": {"activation_checkpointing": True}},
        "LoRA r16, bf16 base": {"lora": 16, "options": {"base_dtype": "bfloat16"}},
        "LoRA r16, both": {"lora": 16, "options": {"activation_checkpointing": True, "base_dtype": "bfloat16"}},
    }
    common = {"task": "train", "precision": "32-true", "size": args.sizes[0], "masked": False, "contender": "ours"}
    common |= {"warmup": 2, "steps": 2}
    found = rounds({name: {**common, **setting} for name, setting in settings.items()}, 1)
    table = [
        {
            "setting": name,
            "peak GB": round(result["peak_gb"], 2),
            "s/step": round(statistics.median(result["seconds"]), 2),
        }
        for name, (result,) in found.items()
    ]
    yield f"peak memory, {args.sizes[0]}, batch 8", table


def generation(args: argparse.Namespace) -> Tables:
    """Answers to the test split's prompts, 32 tokens each."""
    peers = [name for name in args.peers if name != "trl"]
    for precision in args.precisions:
        wanted = entrants("generate", precision, peers, size=args.sizes[0], new_tokens=32)
        title = f"answers to the test split, 32 tokens each, {args.sizes[0]}, {PRECISIONS[precision]}"
        yield title, generation_table(rounds(wanted, args.rounds))


def generation_table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """Tokens a second of each contender."""
    rate = {name: statistics.median(r["tokens_per_second"] for r in results) for name, results in found.items()}
    table = []
    for name, results in found.items():
        floors = [r["floor_tokens_per_second"] for r in results if r["floor_tokens_per_second"]]
        table.append(
            {
                "tool": name,
                "tokens/s": round(rate[name], 1),
                "ours is faster by": round(rate["ours"] / rate[name], 2),
                "floor, tokens/s": round(statistics.median(floors), 1) if floors else "",
            }
        )
    return table


def busy(args: argparse.Namespace) -> Tables:
    """This project alone and beside programs that use all cores, by how long its threads spin while they wait."""
    spins = {"10,000, this project's": {}, "300,000, libgomp's own": {"GOMP_SPINCOUNT": "300000"}}
    size, cores = args.sizes[-1], os.cpu_count() or 1
    ours = {"contender": "ours", "precision": "32-true", "size": size}
    train = {"task": "train", "masked": False, "warmup": args.warmup, "steps": args.steps}
    answer = {"task": "generate", "prompts": 8, "new_tokens": 16}
    table = []
    for programs in (0, cores):
        with busy_programs(programs):
            steps, answers = (
                rounds({name: {**ours, **task, "env": env} for name, env in spins.items()}, args.rounds)
                for task in (train, answer)
            )
        for name in spins:
            seconds = statistics.median(s for r in steps[name] for s in r["seconds"])
            rate = statistics.median(r["tokens_per_second"] for r in answers[name])
            row = {"programs beside it": programs, "spins": name, "s/step": f"{seconds:.2f}", "tokens/s": f"{rate:.1f}"}
            table.append(row)
    yield f"training step, and answers to 8 prompts, beside other programs, {size}, fp32, {cores} cores", table


def startup(args: argparse.Namespace) -> Tables:
    """From the command to the first training step of the demo model, files cached; and --help."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments, mark in (
            ("--help", ["--help"], None),
            ("first step of experiment=demo", ["experiment=demo", "trainer.max_steps=1"], "training:"),
        ):
            seconds = []
            for turn in range(args.rounds + 1):  # the first fills the cache
                command = [sys.executable, "train.py", *arguments]
                command += [f"output_dir={folder}/{turn}"] if mark else []
                start = time.perf_counter()
                with subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ) as process:
                    assert process.stdout is not None
                    for line in process.stdout:
                        if mark is not None and mark in line:
                            break
                    seconds.append(time.perf_counter() - start)
                    process.stdout.read()
            table.append({"command": f"train.py {name}", "s": round(statistics.median(seconds[1:]), 2)})
    yield "start-up", table


def tokens(args: argparse.Namespace) -> Tables:
    """Encoding 52,000 entries, and reading them from the cache."""
    from benchmarks.tasks import SHARED, model_conf
    from instruct_lm.data.conversation import Conversation
    from instruct_lm.data.dataset import load_conversations
    from instruct_lm.data.encoding import encode_cached
    from instruct_lm.data.prompts import ALPACA
    from instruct_lm.data.tokenizer import load_tokenizer
    from instruct_lm.io.fetcher import Fetcher

    model = model_conf("smollm2-135m")
    tokenizer = load_tokenizer(Fetcher().fetch(str(model["weights"]), sha256=str(model["weights_sha256"])))
    real = SHARED / "data" / "instruction-data.json"
    base = load_conversations(real if real.is_file() else "sample")
    # About as long as Alpaca's: four answers in one.
    examples = []
    for i in range(52_000):
        first = base[i % len(base)]
        output = " ".join(base[(i + k) % len(base)].reference for k in range(4))
        asked = first.turns[0]
        examples.append(Conversation.of(f"{asked.text} ({i})", asked.input, output))
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoded", "from the cache"):
            start = time.perf_counter()
            encoded = encode_cached(examples, tokenizer, ALPACA, 1024, "drop", Path(folder))
            table.append(
                {"52,000 entries": name, "s": round(time.perf_counter() - start, 2), "tokens": int(encoded.offsets[-1])}
            )
    yield "token cache", table


def agreement(_: argparse.Namespace) -> Tables:
    """Judges against GPT-4, on the book's example answers and the scores that its repository publishes with them."""
    from instruct_lm.evaluation import statistics as ours
    from instruct_lm.evaluation.judges.reference import ReferenceJudge
    from instruct_lm.io.fetcher import Fetcher

    def load(name: str) -> Any:
        return json.loads(Fetcher().fetch(f"{EXAMPLE_ANSWERS}/{name}").read_text(encoding="utf-8"))

    entries, judge, table = load("eval-example-data.json"), ReferenceJudge(), []
    for model in ("model 1", "model 2"):
        file = f"{model.replace(' ', '-')}-response.json"
        gpt4, llama3 = load(f"scores/gpt4-{file}"), load(f"scores/llama3-8b-{file}")
        reference: list[Any] = [judge.score(entry, entry[f"{model} response"].strip()).score for entry in entries]
        # Llama 3's 99 scores of model 2 lack one of the last three
        n = len(gpt4) if len(llama3) == len(gpt4) else 97
        for name, scores in (("reference", reference), ("Llama 3 8B", llama3)):
            row = {"answers": model, "judge": name, "entries": n}
            table.append({**row, **{key: f"{r:.3f}" for key, r in ours.agreement(scores[:n], gpt4[:n]).items()}})
    yield "agreement with GPT-4", table


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "training": training,
    "lora": lora,
    "memory": memory,
    "generation": generation,
    "long": long_examples,
    "busy": busy,
    "startup": startup,
    "tokens": tokens,
    "agreement": agreement,
}


def markdown(table: Table) -> str:
    """A table for the terminal and the README."""
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in table])


def main() -> None:
    """Run the benchmarks asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--sizes", nargs="+", default=["gpt2-medium", "gpt2", "smollm2-135m"], help="conf/model names")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="a table each; default: those that pay here"
    )
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, help="of the training benchmark")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; choose among {', '.join(BENCHMARKS)}")
    data = rows(args.sizes[0])[0]
    measured_on = machine()
    print(f"data: {data}; machine: {measured_on}", file=sys.stderr)
    rates = measured_on["GFLOP/s"]
    args.precisions = args.precisions or [name for name in PRECISIONS if rates[name] >= rates["32-true"]]
    if skipped := [name for name in PRECISIONS if name not in args.precisions]:
        print(f"not measured: {', '.join(skipped)}; --precisions asks for it", file=sys.stderr)
    for name in args.names or BENCHMARKS:
        try:
            for title, table in BENCHMARKS[name](args):
                record = {"title": title, "table": table, "machine": measured_on, "data": data, "arguments": vars(args)}
                write_json(record, RESULTS / f"{re.sub('[^a-z0-9]+', '-', title.lower())}.json")
                print(f"\n{title}\n\n{markdown(table)}\n", flush=True)
        except RunError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
