"""Pretrained weights for a `GPT`: one map of tensor names for reading and writing, and a strict reader.

The reader takes Hugging Face safetensors (GPT-2 and Llama) and GGUF files. It copies one tensor at a time, so loading
needs the memory of the model and of its largest tensor.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from instruct_lm.errors import InputError, listing
from instruct_lm.io.gguf import read_gguf
from instruct_lm.model.gpt import GPT, GPTConfig, store_matrices

# Names of modules: ours, then GPT-2's and Llama's on the hub, then GGUF's. A module of ours that stacks several of a
# checkpoint lists them in order, separated by spaces. The modules of a block follow the first three.
_NAMES = {
    "wte": ("wte", "model.embed_tokens", "token_embd"),
    "wpe": ("wpe", "", ""),
    "ln_f": ("ln_f", "model.norm", "output_norm"),
    "ln_1": ("ln_1", "input_layernorm", "attn_norm"),
    "attn.qkv": ("attn.c_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_q attn_k attn_v"),
    "attn.proj": ("attn.c_proj", "self_attn.o_proj", "attn_output"),
    "ln_2": ("ln_2", "post_attention_layernorm", "ffn_norm"),
    "mlp.fc": ("mlp.c_fc", "mlp.gate_proj mlp.up_proj", "ffn_gate ffn_up"),
    "mlp.proj": ("mlp.c_proj", "mlp.down_proj", "ffn_down"),
}


class Layout(NamedTuple):
    """A checkpoint format.

    Attributes:
        names: Our module → the format's modules, separated by spaces; empty if the format lacks it.
        block: Prefix of the names in a block; ``{}`` stands for the block's number, from 0.
        head: Tensor of the output head, which must equal the embedding if the checkpoint has it.
        transposed: Whether linear layers are stored (in, out), as by GPT-2's Conv1D.
        interleaved: Whether the rows of q and k are stored in llama.cpp's rotary order.
    """

    names: dict[str, str]
    block: str
    head: str
    transposed: bool = False
    interleaved: bool = False


_GPT2, _LLAMA, _GGUF = ({ours: theirs[i] for ours, theirs in _NAMES.items()} for i in range(3))
LAYOUTS = {
    "gpt2": Layout(_GPT2, "h.{}.", "lm_head.weight", transposed=True),
    "llama": Layout(_LLAMA, "model.layers.{}.", "lm_head.weight"),
    "gguf": Layout(_GGUF, "blk.{}.", "output.weight", interleaved=True),
}

# Buffers of old GPT-2 checkpoints (the causal mask), and the rotary frequencies of GGUF and old Llama files.
_IGNORED = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|rope_freqs\.weight)$")


class Piece(NamedTuple):
    """A tensor of a checkpoint and the part of our parameter that corresponds to it.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape in the checkpoint.
        values: View of our parameter with its elements in the checkpoint's order. It may have more dimensions than
            ``shape``. Copying into it loads the tensor; copying from it exports the tensor.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor


def pieces_of(model: GPT, layout: Layout) -> Iterator[Piece]:
    """The tensors of a checkpoint that hold a model's parameters, in the order of `GPT.named_parameters`.

    Example:
        Our ``attn.qkv`` stacks three matrices of a Llama checkpoint. With 4 heads of width 2, two of them for keys and
        values, it has 8 + 4 + 4 rows:

        >>> model = GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=4, n_kv_head=2, n_embd=8, position="rotary"))
        >>> for piece in pieces_of(model, LAYOUTS["llama"]):
        ...     if "attn" in piece.name and piece.name.endswith("proj.weight"):
        ...         print(piece.name, piece.shape)
        model.layers.0.self_attn.q_proj.weight (8, 8)
        model.layers.0.self_attn.k_proj.weight (4, 8)
        model.layers.0.self_attn.v_proj.weight (4, 8)
        model.layers.0.self_attn.o_proj.weight (8, 8)
    """
    config = model.config
    kv_width = config.kv_heads * config.head_dim
    for name, parameter in model.named_parameters():
        # "h.3.attn.qkv.weight" is the weight of the module attn.qkv in block 3; "ln_f.bias" is in no block.
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("h."):
            _, block, module = module.split(".", 2)
            prefix = layout.block.format(block)
        # Our rows are the checkpoint's modules one below the other. Gate and up have the same number of rows; k and v
        # have fewer than q where query heads share them.
        theirs = layout.names[module].split()
        heights = [config.n_embd, kv_width, kv_width] if len(theirs) == 3 else len(parameter) // len(theirs)
        for i, (their_module, values) in enumerate(zip(theirs, parameter.detach().split(heights), strict=True)):
            if layout.transposed and values.dim() == 2 and prefix:
                values = values.T
            shape = tuple(values.shape)
            if layout.interleaved and module == "attn.qkv" and i < 2:
                # The two numbers that rotary positions turn together lie half a head apart in our rows (Hugging Face's
                # order): 0 1 2 | 3 4 5. llama.cpp puts them side by side: 0 3 1 4 2 5. So each head's (2, D / 2) rows
                # are read as (D / 2, 2).
                values = values.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)
            yield Piece(f"{prefix}{their_module}.{kind}", shape, values)


def load_pretrained(config: GPTConfig, path: Path, matrix_dtype: torch.dtype = torch.float32) -> GPT:
    """Build the model of ``config`` with the weights of a checkpoint.

    Args:
        config: The sizes, which must be the checkpoint's.
        path: A ``.safetensors`` or ``.gguf`` file, or a folder in the hub's layout (``model.safetensors``, or shards
            with ``model.safetensors.index.json``).
        matrix_dtype: Dtype of the matrices; biases and norms are float32. Quantised tensors are dequantised.

    Raises:
        InputError: The file is broken or of another kind, or tensors are missing, superfluous or of another shape; the
            message counts them and lists the first.
    """
    with torch.device("meta"):
        model = GPT(config)
    checkpoint = _open(path)
    layout = _recognise(checkpoint, config, path)
    head = checkpoint.pop(layout.head, None)
    found = {name: stored.shape for name, stored in checkpoint.items() if not _IGNORED.search(name)}
    _check(found, {piece.name: piece.shape for piece in pieces_of(model, layout)}, path)
    store_matrices(model, matrix_dtype)
    model.to_empty(device="cpu")
    for piece in pieces_of(model, layout):
        piece.values.copy_(torch.as_tensor(checkpoint[piece.name].read()).view(piece.values.shape))
    if head and not torch.equal(torch.as_tensor(head.read(), dtype=matrix_dtype), model.wte.weight):
        raise InputError(f"{path}: {layout.head} differs from the embedding; only tied heads are supported")
    return model


class _Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor | np.ndarray]


def _open(path: Path) -> dict[str, _Stored]:
    """Name → tensor, for all tensors of a checkpoint; none is read yet."""
    if path.suffix == ".gguf":
        header = read_gguf(path)
        return {name: _Stored(tensor.shape, partial(header.read, name)) for name, tensor in header.tensors.items()}
    files = [path if path.suffix == ".safetensors" else path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        files = sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (not a dict)
                    shape = tuple(stored.get_slice(name).get_shape())
                    tensors[name.removeprefix("transformer.")] = _Stored(shape, partial(_read_safetensors, file, name))
        except (SafetensorError, OSError) as error:
            remedy = "fetch it anew, or give a .safetensors or .gguf file or a folder with model.safetensors"
            raise InputError(f"{file} holds no weights that can be read ({error}): {remedy}") from error
    return tensors


def _read_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:  # opened for each tensor, so that its pages are released
        return file.get_tensor(name)


def _recognise(checkpoint: dict[str, _Stored], config: GPTConfig, path: Path) -> Layout:
    """The layout of a checkpoint's names.

    Raises:
        InputError: No layout of the configured architecture has such names.
    """
    learned = config.position == "learned"
    for layout in LAYOUTS.values():
        if f"{layout.names['wte']}.weight" in checkpoint and bool(layout.names["wpe"]) == learned:
            return layout
    names = ", ".join(list(checkpoint)[:5])
    raise InputError(f"{path} has another architecture than model.position={config.position}; it holds {names}, …")


def _check(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise an `InputError` that lists tensors that are missing, superfluous or of another shape."""
    problems = [
        f"{name}: the file has {found.get(name, 'none')}, the model {expected.get(name, 'none')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if problems:
        summary = f"{path} does not fit the model: check the model.* sizes. {len(problems)} tensors differ:"
        raise InputError("\n".join([summary, *listing(problems)]))
