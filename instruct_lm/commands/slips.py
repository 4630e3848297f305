"""What a user means by another tool's name or a flag: `--lr 3e-5`, `optimizer.learning_rate`, `num_train_epochs`."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

# Our key, and the names that Hugging Face, PyTorch Lightning, torchtune, Axolotl and LLaMA-Factory have for it, where
# they differ in more than the group. With a "=" the value is ours; {} stands for the one given.
_NAMES = {
    "optimizer.lr": "learning_rate max_lr rate",
    "optimizer.weight_decay": "wd decay",
    "optimizer.warmup_steps": "warmup num_warmup_steps warmup_ratio",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer": "optim",
    "trainer.max_epochs": "epochs epoch num_epochs n_epochs num_train_epochs",
    "trainer.max_steps": "steps num_steps n_steps iters max_iters iterations",
    "trainer.accumulate": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches grad_accum "
    "accumulation_steps",
    "trainer.clip_norm": "max_grad_norm gradient_clip_val gradient_clipping grad_clip clip_grad_norm clip",
    "trainer.val_interval": "val_check_interval eval_steps eval_interval eval_every",
    "trainer.log_interval": "logging_steps log_every_n_steps log_every",
    "trainer.activation_checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "trainer.patience": "early_stopping early_stopping_patience",
    "trainer.checkpoint_steps": "save_steps save_every save_interval every_n_train_steps",
    "data.batch_size": "bs per_device_train_batch_size train_batch_size micro_batch_size",
    "generation.batch_size": "per_device_eval_batch_size eval_batch_size",
    "data.max_length": "max_seq_length max_seq_len seq_len sequence_len cutoff_len model_max_length",
    "data.source": "dataset datasets dataset_name data_path data_file train_file train_data file",
    "data.limit": "max_samples max_train_samples num_samples limit_train_batches",
    "data.num_workers": "workers dataloader_num_workers",
    "data.test_fraction": "test_size",
    "model=auto model.weights={}": "model_name_or_path model_name pretrained_model_name_or_path base_model "
    "pretrained_model",
    "device.precision": "mixed_precision dtype torch_dtype",
    "device.precision=bf16-mixed": "bf16",
    "device.precision=16-mixed": "fp16 amp",
    "device.devices": "gpus num_gpus n_gpu num_processes nproc_per_node",
    "device=gpu": "cuda use_cuda",
    "device=cpu": "use_cpu no_cuda",
    "lora=r16": "use_lora use_peft peft",
    "lora.rank": "lora_r r",
    "lora.targets": "lora_target_modules target_modules",
    "generation.temperature": "temp",
    "seed": "random_seed manual_seed data_seed",
    "resume": "resume_from_checkpoint resume_from ckpt_path",
    "output_dir": "output out out_dir outdir save_dir run_dir log_dir logdir logging_dir default_root_dir",
    "mask_instructions": "mask mask_inputs mask_prompt completion_only_loss assistant_only_loss "
    "train_on_responses_only train_on_completions_only",
    "mask_instructions=true|false (its opposite)": "train_on_inputs train_on_input train_on_prompt",
}
_MEANT = {name: ours for ours, names in _NAMES.items() for name in names.split()}


def suggestions(name: str, keys: Sequence[str]) -> list[str]:
    """What a name may mean among `keys`, as `optimizer.lr`, `device=gpu` or `model=auto model.weights={}`.

    A key that ends with the name comes first, whatever group was named; then other tools' names; then the nearest.

    Example:
        >>> suggestions("optimizer.learning_rate", ["optimizer.lr", "seed"])
        ['optimizer.lr']
    """
    leaf = name.rpartition(".")[2]
    if found := [key for key in keys if name in (key, key.replace(".", "_"))]:
        return found
    if found := [key for key in keys if key.rpartition(".")[2] == leaf]:
        return found
    for word in (leaf, leaf.lower().replace("-", "_")):
        meant = _MEANT.get(word)
        if meant is not None and meant.partition("=")[0] in keys:
            return [meant]
    near = get_close_matches(leaf, [key.rpartition(".")[2] for key in keys], n=1, cutoff=0.7)
    if found := [key for key in keys if key.rpartition(".")[2] in near]:
        return found
    near = get_close_matches(leaf, _MEANT, n=1, cutoff=0.85)
    return [meant for word in near if (meant := _MEANT[word]).partition("=")[0] in keys]


def with_value(suggestion: str, value: str | None) -> str:
    """A suggestion as a user would type it, if they gave a value.

    Example:
        >>> with_value("model=auto model.weights={}", "gpt2")
        'model=auto model.weights=gpt2'
    """
    if "{}" in suggestion:
        return suggestion.format("…" if value is None else value)
    return suggestion if value is None or "=" in suggestion else f"{suggestion}={value}"


Flag = tuple[str, str, str | None]
"""What was typed, its name, and its value; None where there is none."""


def flags_as_keys(arguments: Iterable[str], known: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """Part a command line into what the command takes and the flags that it does not.

    Args:
        arguments: Of the command line, without the program.
        known: Flags that the command has, such as ``--help`` and ``-m``.

    Returns:
        The other arguments, and the flags that are not known.

    Example:
        >>> flags_as_keys(["seed=1", "--lr", "3e-5", "--no-fast", "-m"], ["-m"])
        (['seed=1', '-m'], [('--lr 3e-5', 'lr', '3e-5'), ('--no-fast', 'fast', 'false')])
    """
    kept: list[str] = []
    flags: list[Flag] = []
    following = iter([*arguments, None])
    argument = next(following)
    while argument is not None:
        after = next(following)
        if not _is_flag(argument) or _is_known(argument, known):
            kept.append(argument)
        else:
            name, equals, given = argument.lstrip("-").partition("=")
            typed, value = argument, given if equals else None
            if not equals and after is not None and not _is_flag(after) and "=" not in after:
                typed, value, after = f"{argument} {after}", after, next(following)
            name = name.replace("-", "_")
            if value is None and name.startswith("no_") and name not in _MEANT:
                name, value = name.removeprefix("no_"), "false"
            flags.append((typed, name, value))
        argument = after
    return kept, flags


def _is_flag(argument: str) -> bool:
    """Whether it begins as an option does; a negative number does not."""
    return argument.startswith("-") and argument.lstrip("-")[:1].isalpha()


def _is_known(argument: str, known: Sequence[str]) -> bool:
    name = argument.partition("=")[0]
    return name in known or (len(name) > 3 and any(flag.startswith(name) for flag in known))  # --multi: argparse's way
