"""Pretrained weights for a `GPT`: one map of tensor names for reading and writing, and a strict reader.

The reader takes Hugging Face safetensors and GGUF files of the architectures in `instruct_lm.model.architectures`. It
copies one tensor at a time, so loading needs the memory of the model and of its largest tensor.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from instruct_lm.errors import InputError, listing
from instruct_lm.model.architectures import architecture_of
from instruct_lm.model.description import check_agreement
from instruct_lm.model.gpt import GPT, GPTConfig
from instruct_lm.model.lora import store_matrices
from instruct_lm.model.shapes import shapes_only
from instruct_lm.model.weight_files import open_tensors

# Names of modules: ours, then GPT-2's and Llama's on the hub, then GPT-2's and Llama's in GGUF; Qwen2 and Qwen3 have
# Llama's. A module of ours that stacks several of a checkpoint lists them in order, separated by spaces. The modules of
# a block follow the first four.
_NAMES = {
    "wte": ("wte", "model.embed_tokens", "token_embd", "token_embd"),
    "wpe": ("wpe", "", "position_embd", ""),
    "ln_f": ("ln_f", "model.norm", "output_norm", "output_norm"),
    "lm_head": ("lm_head", "lm_head", "output", "output"),
    "ln_1": ("ln_1", "input_layernorm", "attn_norm", "attn_norm"),
    "attn.qkv": (
        *("attn.c_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
        *("attn_qkv", "attn_q attn_k attn_v"),
    ),
    "attn.q_norm": ("", "self_attn.q_norm", "", "attn_q_norm"),
    "attn.k_norm": ("", "self_attn.k_norm", "", "attn_k_norm"),
    "attn.proj": ("attn.c_proj", "self_attn.o_proj", "attn_output", "attn_output"),
    "ln_2": ("ln_2", "post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "mlp.fc": ("mlp.c_fc", "mlp.gate_proj mlp.up_proj", "ffn_up", "ffn_gate ffn_up"),
    "mlp.proj": ("mlp.c_proj", "mlp.down_proj", "ffn_down", "ffn_down"),
}


class Layout(NamedTuple):
    """A checkpoint format.

    Attributes:
        names: Our module → the format's modules, separated by spaces; empty if the format lacks it.
        block: Prefix of the names in a block; ``{}`` stands for the block's number, from 0.
        transposed: Whether linear layers are stored (in, out), as by GPT-2's Conv1D.
        interleaved: Whether the rows of q and k are stored in llama.cpp's rotary order.
    """

    names: dict[str, str]
    block: str
    transposed: bool = False
    interleaved: bool = False


_GPT2, _LLAMA, _GGUF_GPT2, _GGUF_LLAMA = ({ours: theirs[i] for ours, theirs in _NAMES.items()} for i in range(4))
_HUB_LLAMA, _GGUF_QWEN = Layout(_LLAMA, "model.layers.{}."), Layout(_GGUF_LLAMA, "blk.{}.")
HUB_LAYOUTS = {
    "gpt2": Layout(_GPT2, "h.{}.", transposed=True),
    "llama": _HUB_LLAMA,
    "qwen2": _HUB_LLAMA,
    "qwen3": _HUB_LLAMA,
}
"""Architecture → names in safetensors."""

GGUF_LAYOUTS = {
    "gpt2": Layout(_GGUF_GPT2, "blk.{}."),
    "llama": Layout(_GGUF_LLAMA, "blk.{}.", interleaved=True),
    "qwen2": _GGUF_QWEN,
    "qwen3": _GGUF_QWEN,
}
"""Architecture → names in GGUF, as llama.cpp's converter writes them."""

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


def modules_of(module: str, rows: int, config: GPTConfig, layout: Layout) -> tuple[list[str], list[int]]:
    """The format's modules that one of ours stacks, and the rows of each: gate and up have the same number.

    Keys and values have fewer than queries where query heads share them.
    """
    theirs = layout.names[module].split()
    if len(theirs) == 3:
        return theirs, [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    return theirs, [rows // len(theirs)] * len(theirs)


def pieces_of(model: GPT, layout: Layout) -> Iterator[Piece]:
    """The tensors of a checkpoint that hold a model's parameters, in the order of `GPT.named_parameters`.

    Example:
        Our ``attn.qkv`` stacks three matrices of a Llama checkpoint. With 4 heads of width 2, two of them for keys and
        values, it has 8 + 4 + 4 rows:

        >>> model = GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=4, n_kv_head=2, n_embd=8, position="rotary"))
        >>> for piece in pieces_of(model, HUB_LAYOUTS["llama"]):
        ...     if "attn" in piece.name and piece.name.endswith("proj.weight"):
        ...         print(piece.name, piece.shape)
        model.layers.0.self_attn.q_proj.weight (8, 8)
        model.layers.0.self_attn.k_proj.weight (4, 8)
        model.layers.0.self_attn.v_proj.weight (4, 8)
        model.layers.0.self_attn.o_proj.weight (8, 8)
    """
    config = model.config
    for name, parameter in model.named_parameters():
        # "h.3.attn.qkv.weight" is the weight of the module attn.qkv in block 3; "ln_f.bias" is in no block.
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("h."):
            _, block, module = module.split(".", 2)
            prefix = layout.block.format(block)
        theirs, heights = modules_of(module, len(parameter), config, layout)
        for i, (their_module, values) in enumerate(zip(theirs, parameter.detach().split(heights), strict=True)):
            if layout.transposed and values.dim() == 2 and prefix:
                values = values.T
            shape = tuple(values.shape)
            if layout.interleaved and module == "attn.qkv" and i < 2:
                # The two numbers that rotary positions turn together lie half a head apart in our rows (Hugging Face's
                # order): 0 1 2 | 3 4 5. llama.cpp puts them side by side: 0 3 1 4 2 5. So each head's (2, D / 2) rows
                # are read as (D / 2, 2).
                values = values.unflatten(0, (-1, 2, config.head_width // 2)).transpose(1, 2)
            yield Piece(f"{prefix}{their_module}.{kind}", shape, values)


def load_pretrained(config: GPTConfig, path: Path, matrix_dtype: torch.dtype = torch.float32) -> GPT:
    """Build the model of ``config`` with the weights of a checkpoint.

    Args:
        config: The sizes, which must be the checkpoint's; see `instruct_lm.model.description.check_agreement`.
        path: A ``.safetensors`` or ``.gguf`` file, or a folder in the hub's layout (``model.safetensors``, or shards
            with ``model.safetensors.index.json``, and `config.json`).
        matrix_dtype: Dtype of the matrices; biases and norms are float32. Quantised tensors are dequantised.

    Raises:
        InputError: The file is broken or of another kind, describes another model, or tensors are missing, superfluous
            or of another shape; the message counts them and lists the first. Or a number is not finite.
    """
    check_agreement(config, path)
    checkpoint = {name.removeprefix("transformer."): stored for name, stored in open_tensors(path).items()}
    if len(checkpoint) < config.n_layer:  # before thousands of blocks are built that a damaged header promises
        raise InputError(f"{path} has {len(checkpoint)} tensors, too few for model.n_layer={config.n_layer}.")
    with shapes_only():
        model = GPT(config)
    layout = (GGUF_LAYOUTS if path.suffix == ".gguf" else HUB_LAYOUTS)[architecture_of(config)]
    wte, lm_head = f"{layout.names['wte']}.weight", f"{layout.names['lm_head']}.weight"
    if wte not in checkpoint:
        names = ", ".join(list(checkpoint)[:5])
        raise InputError(f"{path} has another architecture than {architecture_of(config)}: no {wte}, but {names}, …")
    head = checkpoint.pop(lm_head, None) if config.tied else None  # a copy of the embedding
    found = {name: stored.shape for name, stored in checkpoint.items() if not _IGNORED.search(name)}
    _check(found, {piece.name: piece.shape for piece in pieces_of(model, layout)}, path, config)
    store_matrices(model, matrix_dtype)
    # `to_empty` would import SymPy, which takes half a second.
    empty = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    for piece in pieces_of(model, layout):
        values = torch.as_tensor(checkpoint[piece.name].read())
        if not values.is_floating_point():
            raise InputError(f"{path}: {piece.name} has {values.dtype} numbers: take the base that is not quantised.")
        if not torch.stack(values.aminmax()).isfinite().all():  # both are NaN if one number is
            raise InputError(f"{path}: {piece.name} has numbers that are not finite: it is damaged, fetch it anew.")
        piece.values.copy_(values.view(piece.values.shape))
    if head and not torch.equal(torch.as_tensor(head.read(), dtype=matrix_dtype), model.wte.weight):
        remedy = "set tie_word_embeddings to false in config.json if it was trained apart from the embedding"
        raise InputError(f"{path}: {lm_head} differs from the embedding, but the head is tied: {remedy}.")
    return model


def _check(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path, config: GPTConfig
) -> None:
    """Raise an `InputError` that lists tensors that are missing, superfluous or of another shape."""
    problems = [
        f"{name}: the file has {found.get(name, 'none')}, the model {expected.get(name, 'none')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if problems:
        names = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner", "tied")
        sizes = ", ".join(f"{name}={size}" for name in names if (size := getattr(config, name)) is not None)
        summary = f"{path} does not fit the model; check the model.* sizes: {sizes}. {len(problems)} tensors differ:"
        raise InputError("\n".join([summary, *listing(problems)]))
