"""Several processes on one machine: started, watched and ended together by the one that the user started.

That one trains nothing itself. So it answers signals at once, sees how each process ends, and says it once.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from instruct_lm.commands.pasting import override
from instruct_lm.config import DeviceConfig, TrainConfig
from instruct_lm.errors import InputError, RunError, StoppedError
from instruct_lm.io import locks, processes

log = logging.getLogger(__name__)


class ProcessError(RunError):
    """One of several processes was killed or failed, and with it all of them have ended."""


GRACE = 20.0  # seconds; the others' time to end by themselves once a process has ended badly
LOST = 70  # the status of a process that has lost the connection to the others: not the first to fail


def check(config: TrainConfig) -> None:
    """Check that `device` agrees with the program that started this process, if one did, and with the optimizer.

    Raises:
        InputError: It does not, or nothing starts the processes of other machines; the message gives a way that works.
    """
    device, kind, there = config.device, processes.launcher(), processes.world_size()
    known, nodes = str(device.devices) != "auto", device.num_nodes
    if kind is None and nodes > 1:
        way = f"torchrun --nnodes={nodes} --nproc-per-node={device.devices} --rdzv-backend=c10d"
        raise InputError(
            f"device.num_nodes={nodes}: nothing has started the processes of the other machines. On each machine: "
            f"{way} --rdzv-endpoint=<first machine>:29500 train.py device.num_nodes={nodes} … (docs/several.md)."
        )
    if kind in ("torchrun", "srun") and known and count(device.devices) * nodes != there:
        here = processes.local_world_size() if kind == "torchrun" else max(1, there // nodes)
        raise InputError(
            f"{kind} started {there} processes, and device.devices={device.devices} device.num_nodes={nodes} means "
            f"{count(device.devices) * nodes}: give device.devices={here} device.num_nodes={there // here}."
        )
    check_together(config, max(there, count(device.devices) * nodes if known else 1))


def check_together(config: TrainConfig, number: int) -> None:
    """Check that so many processes can train together.

    Raises:
        InputError: The optimizer or the precision does not go with them.
    """
    sharded = config.device.strategy == "fsdp2"
    if number > 1 and sharded and config.optimizer.name == "adafactor":
        raise InputError("optimizer=adafactor needs whole matrices: use optimizer=adamw, or device.strategy=ddp.")
    if number > 1 and sharded and config.device.precision == "16-mixed":
        raise InputError("device.precision=16-mixed does not go with device.strategy=fsdp2: use bf16-mixed or 32-true.")
    if number > 1 and config.optimizer.in_backward:
        raise InputError(
            "optimizer.in_backward=true updates a matrix before the processes have added up its gradient: use "
            "device.devices=1, or optimizer.in_backward=false, with device.strategy=fsdp2 where memory is short."
        )


def check_answering(device: DeviceConfig) -> None:
    """Check that a command that answers can use `device`.

    Raises:
        InputError: It asks for what training alone has; the message gives the way that works.
    """
    if device.strategy == "fsdp2":
        raise InputError("device.strategy=fsdp2 is for training: each process that answers holds the whole model.")
    if device.num_nodes > 1 or processes.launcher() in ("torchrun", "srun"):
        raise InputError("Answers are made on one machine: python evaluate.py … device.devices=<number>, no launcher.")


def count(devices: int | str) -> int:
    """The number of devices in `device.devices`, which is not ``auto``."""
    return len(str(devices).split(",")) if "," in str(devices) else int(devices)


def own_device(device: DeviceConfig, accelerator: str) -> str:
    """The device of this process, as torch names it: each of several processes has a GPU of its own."""
    if accelerator != "gpu":
        return accelerator
    number, named = processes.local_rank(), str(device.devices).split(",")
    return f"cuda:{named[number] if len(named) > 1 else number}"


def processes_to_start(device: DeviceConfig, accelerator: str) -> int:
    """The number of processes that this one is to start; 1: none, it does the work itself."""
    if processes.launcher() is not None:
        return 1
    if str(device.devices) == "auto":
        import torch

        return torch.cuda.device_count() if accelerator == "gpu" else 1
    return count(device.devices)


def run_processes(number: int, folder: Path, precision: str | None = None) -> int:
    """Start this command again as `number` processes of one job, and wait until all have ended.

    The first one writes to this terminal; what the others say is shown if one of them fails first.

    Args:
        number: Of processes.
        folder: The folder that all of them write into.
        precision: That of all of them; None: as their command line says.

    Returns:
        0, or the status of the first process where it has said itself what went wrong.

    Raises:
        RunError: A process was killed, or failed before the first one did.
    """
    with contextlib.ExitStack() as stack:
        said: list[IO[str]] = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(number)
        ]
        shared = _shared(number)
        given = [override("hydra.run.dir", str(folder.resolve())), "hydra.output_subdir=null"]
        given += [] if precision is None else [override("device.precision", precision)]
        children = [_start(rank, shared, given, said[rank]) for rank in range(number)]
        stack.callback(_kill, children)
        with _passing_on(children):
            _wait(children)
        texts = []
        for stream in said:
            stream.seek(0)
            texts.append(stream.read().strip())
    return _conclude(children, texts)


class _Child(subprocess.Popen[bytes]):
    """A process; `killed` once this command has ended it."""

    killed = False


def _start(rank: int, shared: dict[str, str], given: Sequence[str], said: IO[str]) -> _Child:
    environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # The folder is this process's, which has recorded the settings there. Only the first writes a log.
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *given]
    output: Any = None if rank == 0 else said
    command += [] if rank == 0 else ["hydra/job_logging=console"]
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on.
    streams = {"stdout": output, "stderr": output}
    return _Child(command, env=environment, start_new_session=True, pass_fds=locks.descriptors(), **streams)


def _shared(number: int) -> dict[str, str]:
    """The part of the environment that all processes share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "NODE_RANK": 0, "GROUP_RANK": 0}
    shared = sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, processes.LAUNCHED: os.getpid()}
    default = {"OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // number)}  # else each takes all cores
    return {name: str(value) for name, value in (default | processes.plain_environment() | shared).items()}


@contextlib.contextmanager
def _passing_on(children: Sequence[_Child]) -> Iterator[None]:
    """Pass the first signal on to the processes, which save and end; the second one kills them."""
    told: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for child in children:
            if child.poll() is None and len(told) == 1:
                child.send_signal(number)
        if len(told) > 1:
            _kill(children)
            print("Stopped at once.", file=sys.stderr, flush=True)
            os._exit(128 + number)

    before = {number: signal.signal(number, handle) for number in processes.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[_Child]) -> None:
    """Wait for all; once one has ended badly, the others have `GRACE` seconds."""
    deadline = None
    while [child for child in children if child.poll() is None]:  # a list: each of them is asked
        if deadline is None and any(child.returncode for child in children):
            # One that was killed cannot be waited for: the others notice, or hang on its part of a sum for ever.
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            _kill(children)
        time.sleep(0.1)


def _kill(children: Sequence[_Child]) -> None:
    for child in children:
        if child.poll() is None:
            child.killed = True
            child.kill()
            child.wait()


def _conclude(children: Sequence[_Child], texts: Sequence[str]) -> int:
    """The status of all, or an error that names the process which was the first to fail."""
    statuses, name = [child.returncode for child in children], f"of {len(children)}"
    # The others have lost the connection to it, or wait for it until they are killed.
    failed = [rank for rank, child in enumerate(children) if statuses[rank] not in (0, LOST) and not child.killed]
    for rank in failed:
        if statuses[rank] < 0:
            raise ProcessError(f"Process {rank} {name} was ended by {processes.signal_name(-statuses[rank])}.")
    if not failed and any(statuses):
        raise ProcessError("The processes lost the connection to each other.")
    if not failed or failed[0] == 0:  # which has said itself what went wrong
        return statuses[0]
    status, last = statuses[failed[0]], "\n".join(texts[failed[0]].splitlines()[-20:])
    message = f"Process {failed[0]} {name} ended with status {status}:\n{last}"
    raise StoppedError(message, status - 128) if status > 128 else ProcessError(message)


def watch_parent() -> None:
    """In one of several processes: end as after SIGTERM once the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3 * GRACE)
        os._exit(1)  # it waits for a process that is gone

    if processes.launcher() in ("own", "torchrun"):
        threading.Thread(target=watch, daemon=True).start()


def connection_lost(error: BaseException) -> bool:
    """Whether an error means that this process, one of several, has lost the connection to the others."""
    text, kind = str(error).lower(), type(error).__name__
    lost = "gloo" in text or "nccl" in text or kind.startswith("Dist")
    return processes.launcher() is not None and isinstance(error, RuntimeError) and lost


def be_quiet() -> None:
    """In all processes but the first: log nothing but errors, and into no file."""
    if processes.rank() == 0:
        return
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
        else:
            handler.setLevel(logging.ERROR)
