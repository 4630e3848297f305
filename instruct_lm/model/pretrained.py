"""Pretrained weights into a `GPT`: Hugging Face safetensors (GPT-2 and Llama names) and GGUF files, strictly.

Tensors are read and copied one at a time, so that loading needs the memory of the model and of its largest tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from instruct_lm.errors import InputError
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.gpt import GPT, GPTConfig, store_matrices

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """Where a parameter, or one of the matrices stacked in it, stands in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    transform: Transform | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transform is _transpose else self.shape


def _transpose(x: Tensor) -> Tensor:
    return x.T


def _split_halves(head_dim: int) -> Transform:
    """Rows of each head from interleaved pairs (llama.cpp's rotary order) to two halves (Hugging Face's)."""
    return lambda x: x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


# Names per layer: our module → the checkpoint's modules stacked in it.
_GPT2 = {"ln_1": ["ln_1"], "attn.qkv": ["attn.c_attn"], "attn.proj": ["attn.c_proj"],
         "ln_2": ["ln_2"], "mlp.fc": ["mlp.c_fc"], "mlp.proj": ["mlp.c_proj"]}  # fmt: skip
_LLAMA = {"ln_1": ["input_layernorm"], "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
          "attn.proj": ["self_attn.o_proj"], "ln_2": ["post_attention_layernorm"],
          "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}  # fmt: skip
_GGUF_LLAMA = {"ln_1": ["attn_norm"], "attn.qkv": ["attn_q", "attn_k", "attn_v"], "attn.proj": ["attn_output"],
               "ln_2": ["ffn_norm"], "mlp.fc": ["ffn_gate", "ffn_up"], "mlp.proj": ["ffn_down"]}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint format."""

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, list[str]]
    head: str
    conv1d: bool = False
    interleaved: bool = False


LAYOUTS = {
    "gpt2": Layout(
        {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f"}, "h.{}.", _GPT2, head="lm_head.weight", conv1d=True
    ),
    "llama": Layout(
        {"wte": "model.embed_tokens", "ln_f": "model.norm"}, "model.layers.{}.", _LLAMA, head="lm_head.weight"
    ),
    "gguf": Layout(
        {"wte": "token_embd", "ln_f": "output_norm"}, "blk.{}.", _GGUF_LLAMA, head="output.weight", interleaved=True
    ),
}  # fmt: skip

# Buffers of old GPT-2 checkpoints (the causal mask), and the rotary frequencies of GGUF and old Llama files.
_IGNORED = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|rope_freqs\.weight)$")


def load_pretrained(config: GPTConfig, path: Path, matrix_dtype: torch.dtype = torch.float32) -> GPT:
    """Build the model of ``config`` with the weights of a checkpoint.

    Args:
        config: sizes; they must be the checkpoint's.
        path: A ``.safetensors`` or ``.gguf`` file, or a folder in the hub's layout (``model.safetensors``, or shards
            with ``model.safetensors.index.json``).
        matrix_dtype: Of the matrices; biases and norms are float32. Quantised tensors are dequantised.

    Raises:
        InputError: Not such a file, or a missing, extra or misshaped tensor; the message lists them.
    """
    with torch.device("meta"):
        model = GPT(config)
    checkpoint = _open(path)
    layout = _recognise(checkpoint, config, path)
    pieces = {name: pieces_of(name, parameter.shape, layout, config) for name, parameter in model.named_parameters()}
    _check(checkpoint, [piece for stack in pieces.values() for piece in stack], layout, path)
    store_matrices(model, matrix_dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 0
            for piece in pieces[name]:
                tensor = checkpoint.read(piece.name)
                rows = parameter[start : start + piece.shape[0]]
                rows.copy_(tensor if piece.transform is None else piece.transform(tensor))
                start += piece.shape[0]
        if layout.head in checkpoint.shapes and not torch.equal(
            checkpoint.read(layout.head).to(matrix_dtype), model.wte.weight
        ):
            raise InputError(f"{path}: {layout.head} differs from the embedding; only tied heads are supported")
    return model


def pieces_of(name: str, shape: Iterable[int], layout: Layout, config: GPTConfig) -> list[Piece]:
    """Where a parameter of ours stands in a checkpoint: in one tensor, or stacked from several, in order."""
    shape = tuple(shape)
    module, kind = name.rsplit(".", 1)
    if not module.startswith("h."):
        return [Piece(f"{layout.top[module]}.{kind}", shape)]
    _, number, module = module.split(".", 2)
    names = [f"{layout.layer.format(number)}{part}.{kind}" for part in layout.modules[module]]
    heights = [shape[0] // len(names)] * len(names)
    if module == "attn.qkv" and len(names) == 3:
        kv = config.kv_heads * config.head_dim
        heights = [config.n_embd, kv, kv]
    transforms: list[Transform | None] = [None] * len(names)
    if layout.conv1d and len(shape) == 2:
        transforms = [_transpose]
    if layout.interleaved and module == "attn.qkv":
        transforms = [_split_halves(config.head_dim), _split_halves(config.head_dim), None]
    return [
        Piece(part, (height, *shape[1:]), transform)
        for part, height, transform in zip(names, heights, transforms, strict=True)
    ]


class _Checkpoint(Protocol):
    """Names and shapes of all tensors, and one tensor at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


class _Safetensors:
    def __init__(self, paths: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, tuple[Path, str]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for stored in file.keys():  # noqa: SIM118  (not a dict)
                        name = stored.removeprefix("transformer.")
                        self.shapes[name] = tuple(file.get_slice(stored).get_shape())
                        self.files[name] = path, stored
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path} is no readable safetensors file ({error}); delete it to fetch it anew"
                ) from error

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        path, stored = self.files[name]
        with safe_open(path, framework="pt") as file:  # opened anew, so that the pages read are given back
            return file.get_tensor(stored)


class _GGUF:
    def __init__(self, path: Path) -> None:
        self.header = read_gguf(path)
        self.shapes = {name: tensor.shape for name, tensor in self.header.tensors.items()}

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self.header.read(name))


def _open(path: Path) -> _Checkpoint:
    if path.suffix == ".gguf":
        return _GGUF(path)
    if path.suffix == ".safetensors":
        return _Safetensors([path])
    if (single := path / "model.safetensors").is_file():
        return _Safetensors([single])
    if (index := path / "model.safetensors.index.json").is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return _Safetensors([path / file for file in files])
    raise InputError(f"{path} holds no weights; give a .safetensors or .gguf file, or a folder with model.safetensors")


def _recognise(checkpoint: _Checkpoint, config: GPTConfig, path: Path) -> Layout:
    for layout in LAYOUTS.values():
        if f"{layout.top['wte']}.weight" in checkpoint.shapes:
            if ("wpe" in layout.top) != (config.position == "learned"):
                raise InputError(
                    f"{path} is not of the architecture asked for (model.position={config.position}): "
                    f"its tensors are named {layout.layer.format(0)}…"
                )
            return layout
    some = ", ".join(list(checkpoint.shapes)[:5])
    raise InputError(f"{path} has neither GPT-2's, Llama's nor GGUF's names; its first tensors are {some}")


def _check(checkpoint: _Checkpoint, pieces: list[Piece], layout: Layout, path: Path) -> None:
    expected = {piece.name: piece.stored_shape for piece in pieces}
    found = {name: shape for name, shape in checkpoint.shapes.items() if not _IGNORED.search(name)}
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"extra: {name} {list(found[name])}" for name in found if name not in expected and name != layout.head]
    problems += [
        f"misshaped: {name} is {list(found[name])}, the configuration asks for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        shown = "\n".join(_first(problems, 12))
        raise InputError(f"{path} does not fit the model (check the model.* sizes):\n{shown}")


def _first(lines: list[str], n: int) -> Iterator[str]:
    yield from lines[:n]
    if len(lines) > n:
        yield f"… and {len(lines) - n} more"
