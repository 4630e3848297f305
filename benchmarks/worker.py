"""One contender in a process of its own: `python -m benchmarks.worker '{"task": …}'` prints a JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request and return its seconds, its peak memory and the matrix product rate around it."""
    if request["contender"] == "ours":
        from instruct_lm.fast.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    from benchmarks import contenders, floor, tasks

    precision = request["precision"]
    dtype = contenders.DTYPES[precision]
    if request["task"] == "train":
        n = request["warmup"] + request["steps"]
        given = tasks.long_batches(n) if request.get("long") else tasks.batches(request["size"], n)
        given = sorted(given[: request["warmup"]], key=_longest, reverse=True) + given[request["warmup"] :]
        options, lora, masked = request.get("options", {}), request.get("lora", 0), request["masked"]
        train = contenders.TRAIN[request["contender"]]
        seconds, losses = train(request["size"], given, masked, lora, precision, options)
        from instruct_lm.training.memory import peak_memory

        peak = peak_memory(torch.device("cpu"))
        needed = [floor.train_flops(request["size"], batch, masked, lora) for batch in given]
        timed = slice(request["warmup"], None)
        rate = floor.gemm_rate(request["size"], floor.packed_tokens(given[-1]), dtype)
        update = floor.trained(request["size"], lora) / floor.adamw_rate()
        return {
            "seconds": seconds[timed],
            "losses": losses[timed],
            "peak_gb": peak / 1e9,
            "gflops": rate / 1e9,
            "floor": [flops / rate + update for flops in needed[timed]],
        }
    prompts = tasks.prompts(request["size"])[: request.get("prompts")]
    generate = contenders.GENERATE[request["contender"]]
    elapsed, tokens = generate(request["size"], prompts, request["new_tokens"], precision)
    rate = floor.gemm_rate(request["size"], len(prompts), dtype)
    return {
        "tokens_per_second": tokens / elapsed,
        "gflops": rate / 1e9,
        "floor_tokens_per_second": tokens
        / (floor.generate_flops(request["size"], prompts, request["new_tokens"]) / rate)
        if request["contender"] == "ours"
        else None,
    }


def _longest(batch: list[Any]) -> int:
    return max(len(row.ids) for row in batch)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
