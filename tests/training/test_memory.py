"""The estimate's counts against real models, and its message."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import add_lora
from instruct_lm.training import memory as memory_module
from instruct_lm.training.memory import TrainingMemory, begin_peak, describe, free_memory, largest_batch, peak_memory

MEDIUM = GPTConfig(n_layer=24, n_head=16, n_embd=1024)
SMOL = GPTConfig(
    vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, norm="rmsnorm", position="rotary",
    activation="swiglu", bias=False,
)  # fmt: skip


UNTIED = replace(SMOL, tied=False, head_dim=96)


@pytest.mark.parametrize("config", [MEDIUM, SMOL, UNTIED])
@pytest.mark.parametrize("rank", [0, 16])
def test_parameters_are_counted(config: GPTConfig, rank: int) -> None:
    with torch.device("meta"):
        model = GPT(config)
        if rank:
            add_lora(model, rank, 32.0)
    memory = TrainingMemory(config, 300, 500, lora_rank=rank)
    base = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.parameters == pytest.approx(base, rel=2e-3)  # biases and norms are left out
    assert memory.trained == pytest.approx(trained, rel=2e-3)


def test_an_untied_head_has_gradients_and_states_of_its_own() -> None:
    head = SMOL.vocab_size * SMOL.n_embd
    for in_backward, copies in ((False, 4), (True, 4)):  # the weights, their gradients and AdamW's two states
        tied, untied = (
            TrainingMemory(config, 300, 500, in_backward=in_backward).bytes
            for config in (SMOL, replace(SMOL, tied=False))
        )
        assert untied - tied == pytest.approx(4 * copies * head)


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    full, lora = (TrainingMemory(SMOL, 300, 500, lora_rank=rank) for rank in (0, 16))
    inner = 30 * 300 * 4 * 16  # what each layer keeps of a token for the four adapters of a block
    saved = 3 * (lora.parameters - lora.trained) - inner  # a gradient and AdamW's two states
    assert full.bytes - lora.bytes == pytest.approx(4 * saved)
    assert lora.bytes - replace(lora, base_bytes=2).bytes == pytest.approx(2 * lora.parameters - 4 * 576 * 8192)
    assert full.bytes - replace(full, optimizer="adafactor").bytes == pytest.approx(4 * 2 * full.parameters)


def test_with_checkpointing_a_layer_more_costs_its_weights_and_its_input_alone() -> None:
    memory = TrainingMemory(SMOL, 300, 500, activation_checkpointing=True)
    deeper = replace(memory, model=replace(SMOL, n_layer=31))
    weights = deeper.parameters - memory.parameters
    assert deeper.bytes - memory.bytes == pytest.approx(4 * (4 * weights + 300 * 576))  # AdamW: four copies


def test_logits_are_counted_for_the_targets_that_are_held_at_once() -> None:
    memory = TrainingMemory(SMOL, 300, 500)
    fewer = replace(memory, head_targets=50)
    assert memory.bytes - fewer.bytes == pytest.approx(4 * 2 * 49152 * (300 - 50))  # and their gradients


def test_in_half_precision_copies_make_room_for_gradients_and_inputs_of_products_are_half_as_large() -> None:
    memory = TrainingMemory(MEDIUM, 300, 500)
    half, blocks = replace(memory, half=True), memory.parameters - 50257 * 1024
    saved = 24 * 300 * (3 * 1024 + 2 * 4096)  # of a token: the inputs of four products, and of GELU
    assert memory.bytes - half.bytes == pytest.approx(2 * saved)
    assert replace(half, accumulates=True).bytes - half.bytes == pytest.approx(2 * blocks)
    alone = replace(memory, in_backward=True)  # there copies are more than the two gradients
    copies = 2 * blocks - 4 * 2 * 1024 * 4096
    assert replace(alone, half=True).bytes - alone.bytes == pytest.approx(copies - 2 * saved)


def test_free_memory_is_what_is_left_and_the_peak_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    assert used / 2 <= peak_memory(torch.device("cpu")) <= total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8, available=5, free=2))
    assert free_memory(torch.device("cpu")) == 5


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps one peak of a process")
def test_each_run_of_a_process_has_its_own_peak() -> None:
    """Against psutil's resident set: 400 MB that an earlier run held do not count in a later one."""
    cpu = torch.device("cpu")
    assert begin_peak(cpu)
    before = psutil.Process().memory_info().rss
    held = torch.ones(100_000_000)
    assert peak_memory(cpu) >= before + 350e6
    del held
    assert begin_peak(cpu)
    assert abs(peak_memory(cpu) - psutil.Process().memory_info().rss) < 100e6


def test_where_the_peak_cannot_begin_anew_the_first_run_alone_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(memory_module, "_begun", False)
    assert [begin_peak(torch.device("cpu")) for _ in range(3)] == [True, False, False]


def test_a_gpu_is_asked_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, torch would ask the first: there each process would hold memory for nothing."""
    free = {"cuda:0": 1, "cuda:2": 3}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[str(device)], 9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 * free[str(device)])
    assert free_memory(torch.device("cuda:2")) == 3
    assert peak_memory(torch.device("cuda:2")) == 30


def test_the_batch_of_the_longest_rows_is_counted_with_its_prefix_once() -> None:
    lengths = np.array([30, 50, 40])
    assert largest_batch(lengths, batch_size=2, shared_prefix=20) == (20 + 30 + 20, 100)
    assert largest_batch(lengths, batch_size=2) == (100, 100)


def test_what_does_not_fit_names_the_settings_that_would() -> None:
    memory = TrainingMemory(MEDIUM, 300, 500)
    fits, message = describe(memory, 64e9)
    assert fits
    assert "355M parameters, full fine-tuning: about" in message
    assert "64.0 GB free" in message
    fits, message = describe(memory, 5.8e9)
    assert not fits
    assert "these would fit" in message
    assert "optimizer.in_backward=true" in message
    assert "lora=r16" in message
    fits, message = describe(memory, 3e9)
    assert "lora=r16" in message
    assert "in_backward" not in message
    fits, message = describe(memory, 1e9)
    assert not fits
    assert "choose a smaller model" in message
