"""The kinds of training run that are interrupted: tiny, and together with all that a checkpoint must bring back."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from faults.commands import Ended, Job, must
from instruct_lm.commands.folders import file_name
from instruct_lm.io.run_files import LAST, PREVIOUS, SUMMARY

COMMON = (
    *("data=sample", "data.limit=48", "data.batch_size=4", "trainer.checkpoint_steps=3"),
    *("trainer.progress=false", "generation.max_new_tokens=8", "device=cpu", "offline=true"),
)
LLAMA = (
    *("model.name=llama-tiny", "model.norm=rmsnorm", "model.position=rotary", "model.activation=swiglu"),
    *("model.bias=false", "model.n_kv_head=1", "model.n_inner=48"),
)
LORA = ("lora=r16", "lora.rank=4", "lora.alpha=8")
COSINE = ("optimizer.schedule=cosine", "optimizer.warmup_steps=5")

KINDS: dict[str, tuple[str, ...]] = {
    "gpt2": (),
    "gpt2-accumulate": ("data.layout=padded", "trainer.accumulate=3", "trainer.clip_norm=0.5"),
    "gpt2-dropout": ("data.layout=padded", "model.dropout=0.1", *COSINE),
    "gpt2-in-backward": ("optimizer.in_backward=true",),
    "gpt2-adafactor": ("optimizer=adafactor", "data.shuffle=true"),
    "gpt2-bf16": ("device.precision=bf16-mixed", "data.group_by_length=true"),
    "gpt2-plain": ("fast=false", "mask_instructions=true", *COSINE),
    "gpt2-patience": ("trainer.patience=1", "trainer.max_epochs=4", "optimizer.lr=0.03"),
    "gpt2-lora": (*LORA, "data.num_workers=1", "trainer.activation_checkpointing=true"),
    "llama": (*LLAMA, *COSINE, "data.group_by_length=true"),
    "llama-accumulate": (*LLAMA, "trainer.accumulate=3", "device.precision=bf16-mixed"),
    "llama-workers": (*LLAMA, "data.num_workers=1", "data.layout=padded", "model.dropout=0.1"),
    "llama-adafactor": (*LLAMA, "optimizer=adafactor", "fast=false"),
    "llama-lora": (*LLAMA, *LORA, *COSINE, "trainer.accumulate=3"),
    "llama-lora-dropout": (*LLAMA, *LORA, "lora.dropout=0.1", "data.layout=padded"),
    "llama-lora-bf16": (*LLAMA, *LORA, "lora.base_dtype=bfloat16", "device.precision=bf16-mixed"),
}


class Run:
    """A training run: the command that starts it, and the one that goes on.

    Args:
        kind: One of `KINDS`.
        folder: Its folder; may not exist yet.
        cache: Of the token cache, which runs may share.
        settings: Overrides besides those of the kind.
    """

    def __init__(self, kind: str, folder: Path, cache: Path, *settings: str) -> None:
        self.kind, self.folder, self.cache = kind, folder, cache
        self.seconds = 0.0  # from the start to the end of the whole run, once it is known
        model = [] if any(setting.startswith("model=") for setting in settings) else ["model=gpt2-tiny"]
        self.first = (*model, *COMMON, *KINDS[kind], f"output_dir={folder}", f"cache_dir={cache}", *settings)

    @property
    def next(self) -> tuple[str, ...]:
        """What a user types now: `resume=` where there is something to go on from, else the same command again."""
        begun = any((self.folder / name).exists() for name in (LAST, PREVIOUS, SUMMARY))
        return (f"resume={self.folder}",) if begun else self.first

    def start(self) -> Job:
        """Start it, or go on."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return Job("train.py", *self.next, folder=self.folder.parent)

    def stop_early(self) -> "Run":
        """Start it, and stop it once it has written its last checkpoint for the second time.

        Raises:
            RuntimeError: It ended before, or otherwise than a signal makes it end.
        """
        job, seen = self.start(), set()

        def written_twice() -> bool:
            with suppress(FileNotFoundError):
                seen.add((self.folder / LAST).stat().st_ino)
            return len(seen) > 1

        job.wait_until(written_twice)
        job.send(signal.SIGTERM)
        ended = job.wait()
        if ended.status != 128 + signal.SIGTERM:
            raise RuntimeError(f"could not be stopped in the middle: {ended}")
        return self

    def finish(self) -> Ended:
        """Start it or go on, to the end."""
        return self.start().wait()


_WHOLE: dict[tuple[str, ...], Run] = {}
_MAKING = threading.Lock()


def reference(kind: str, work: Path, *settings: str) -> Run:
    """The same run without faults; made once.

    Raises:
        RuntimeError: It failed.
    """
    with _MAKING:
        key = (kind, str(work), *settings)
        if key not in _WHOLE:
            # The same whatever else is tried: an export is named after it.
            name = file_name("-".join([kind, *settings]))
            run = Run(kind, work / "whole" / name, work / "cache", *settings)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            must("train.py", *run.first, folder=run.folder.parent)
            run.seconds, _WHOLE[key] = time.monotonic() - started, run
        return _WHOLE[key]
