"""Several processes: how they share the model, agree with each other, and go on as another number of them.

The checkpoint is the same file whatever wrote it: whole tensors, the optimizer's states by the parameters' numbers, and
the size of an optimizer step in rows. So a run may go on with another strategy and another number of processes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from instruct_lm.model.gpt import GPT

# torch.distributed.fsdp and .tensor take most of a second to import: only what shards a model does.


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a `DTensor` is a part of, which all processes must ask for; another one as it is."""
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as ``like``, if that is sharded and has its shape."""
    if not _is_part(like) or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def _is_part(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`."""
    return hasattr(tensor, "placements")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: each process holds a part of every parameter, gradient and optimizer state.

    Args:
        processes: Number of all processes.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: `load_optimizer_state_dict` is to be called."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        """The whole checkpoint, in each process; Lightning does not pass on ``weights_only`` here."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only is not False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole trained parameters, on the CPU of the first process; {} in the others, which must ask too."""
        trained = [(name, x) for name, x in self.model.named_parameters() if x.requires_grad]  # type: ignore[union-attr]
        return self._on_first({name: whole(x.detach()).cpu() for name, x in trained})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of the parameters."""
        model, parameters = self.lightning_module, dict(self.lightning_module.named_parameters())  # type: ignore[union-attr]
        state = {name: part(x, parameters.get(name, x)) for name, x in checkpoint["state_dict"].items()}
        model.load_state_dict(state, strict=strict)  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state, on the CPU of the first process; {} in the others, which must ask too."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return self._on_first({**state, "state": _map(state["state"], lambda _, x: whole(x).cpu())})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # The state of parameter n is that of the n-th in the optimizer's groups.
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            states = _map(state["state"], lambda number, x, parameters=parameters: part(x, parameters[number]))
            optimizer.load_state_dict({**state, "state": states})

    def _on_first(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.is_global_zero else {}


def _map(states: Mapping[int, Mapping[str, Any]], change: Any) -> dict[int, dict[str, Any]]:
    """Change the tensors among the states of parameters: `change(number, tensor)`."""
    return {
        number: {key: change(number, x) if isinstance(x, Tensor) else x for key, x in state.items()}
        for number, state in states.items()
    }


def make_strategy(name: str, processes: int) -> str | Strategy:
    """The strategy for so many processes: ``auto`` is DDP, and one process needs none."""
    if processes == 1:
        return "auto"
    return FullyShardedStrategy(processes) if name == "fsdp2" else DDPStrategy()


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over the processes, block by block; once is enough.

    Args:
        model: A `GPT`, also one with adapters or made faster. Its methods then gather what they need, if all processes
            call them.
        mesh: Of one dimension.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if is_sharded(model):
        return
    for block in model.h:
        fully_shard(block, mesh=mesh)
    # The embedding and the head are used outside the blocks: they stay whole from hidden states to loss and gradients.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")


def is_sharded(module: nn.Module) -> bool:
    """Whether a process holds only a part of some parameters: then all must call the module together."""
    return any(hasattr(part, "reshard") for part in module.modules())  # a method of FSDP2's modules


def largest(trainer: pl.Trainer, value: int) -> int:
    """The largest of the processes' values, which all of them must ask for; a single process asks nobody."""
    if trainer.world_size == 1:
        return value
    return int(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="max"))


def steps_of(trainer: pl.Trainer) -> dict[str, int]:
    """For a checkpoint: the rows of an optimizer step, and the micro-batches in which so many processes take it."""
    plan = getattr(trainer.train_dataloader, "plan", None)
    return {} if plan is None else {"rows": plan.step_size, "accumulate": plan.accumulate}


def keep_steps(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a run go on with the optimizer steps that it began with, whatever the number of processes now.

    Each step keeps its rows, and is shared among the processes in micro-batches of at most ``data.batch_size`` rows.
    Lightning counts micro-batches: its counters in ``checkpoint`` are changed to those of this number of processes.

    Example:
        A run with ``batch_size=8`` on one process has stopped after 5 steps of 8 rows. Two processes go on with 4 rows
        each. A run of two processes has steps of 16 rows: one process takes each of them in two micro-batches.
    """
    steps, data = checkpoint.get("steps"), trainer.datamodule  # type: ignore[attr-defined]
    if not steps or data is None:
        return
    then, now = steps["accumulate"], -(-steps["rows"] // (data.batch_size * trainer.world_size))
    data.step_size, trainer.accumulate_grad_batches = steps["rows"], now
    if now == then:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = -(-counts["ready"] // then) * now  # between steps, or after an epoch whose last step may be shorter
        # One that is behind counts the micro-batch under way as not completed yet.
        counts.update({name: ready - (counts["ready"] - n) for name, n in counts.items()})
