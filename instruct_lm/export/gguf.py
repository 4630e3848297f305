"""Export to one GGUF file, which llama.cpp, Ollama and this project (`model.weights=FILE`) read.

Keys and tensors are those of llama.cpp's convert_hf_to_gguf.py.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from tqdm import tqdm

from instruct_lm.data.tokenizer import without_surrogates
from instruct_lm.errors import InputError, RunError
from instruct_lm.export.gguf_tokenizer import tokenizer_metadata
from instruct_lm.model.architectures import architecture_of
from instruct_lm.model.generation import Sampling
from instruct_lm.model.gguf_config import ROPE_FACTORS, gguf_metadata
from instruct_lm.model.gpt import GPT
from instruct_lm.model.pretrained import GGUF_LAYOUTS, pieces_of
from instruct_lm.respond import Responder

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
"""Dtype of the matrices → `general.file_type`."""

# The largest number of each type. q8_0 stores a block's largest number / 127 as an f16.
_LARGEST = {"F32": 3.4028235e38, "F16": 65504.0, "BF16": 3.3895314e38, "Q8_0": 127 * 65504.0}
_POSITIONS = "position_embd.weight"


class _Tensor(NamedTuple):
    """A tensor of the file: its name, its shape in torch's order, its numbers and how they are stored."""

    name: str
    shape: tuple[int, ...]
    values: torch.Tensor
    kind: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.values.numel() // block * block_bytes


def save_gguf(responder: Responder, folder: Path, dtype: str, name: str) -> Path:
    """Write a model with its tokenizer, end tokens, prompt style and sampling settings.

    One tensor after another is converted and written, so the export needs the memory of the model and of its largest
    tensor.

    Args:
        responder: The model, without adapters, and what it needs to answer.
        folder: The destination, an empty folder.
        dtype: Of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. As in llama.cpp's converter, vectors, norms and
            GPT-2's positions are float32, and with ``q8_0`` a matrix whose rows are no multiple of 32 is float16.
        name: Of the model; the file is ``<name>-<dtype>.gguf``.

    Returns:
        The file.

    Raises:
        InputError: llama.cpp computes no such model or tokenizer, or a number does not fit into ``dtype``.
        RunError: The file cannot be written.

    Example:
        A row of 4 numbers is no block of q8_0; the norm is a vector:

        >>> from instruct_lm.model.gpt import GPTConfig
        >>> tensors = _tensors(GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=4, n_inner=32)), "q8_0")
        >>> [(t.name, t.kind.name) for t in tensors if t.name.startswith(("token", "blk.0.ffn_down", "output_norm.w"))]
        [('token_embd.weight', 'F16'), ('blk.0.ffn_down.weight', 'Q8_0'), ('blk.0.ffn_down.bias', 'F32'), \
('output_norm.weight', 'F32')]
    """
    model, config = responder.model, responder.model.config
    metadata = {
        **gguf_metadata(config),
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **sampling_metadata(responder.sampling),
        **tokenizer_metadata(responder.tokenizer, responder.style, responder.stop_tokens, config.vocab_size),
    }
    path = folder / f"{safe_name(name)}-{dtype}.gguf"
    try:
        _write(path, metadata, list(_tensors(model, dtype)))
    except OSError as error:  # numpy gives no errno and no strerror when the disk is full
        reason = error.strerror or f"is the disk full? {error}"
        raise RunError(f"{path.name} cannot be written ({reason}); nothing is kept of it.") from error
    return path


def safe_name(name: str) -> str:
    """A name with the characters that are safe in a file's name and in a Modelfile, 80 at most, as Ollama takes.

    Example:
        >>> safe_name("my model/v2")
        'my-model-v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"


def sampling_metadata(sampling: Sampling) -> dict[str, Any]:
    """How llama.cpp chooses the next token where a request does not say; its own defaults would cut the choice."""
    return {
        "general.sampling.temp": float(sampling.temperature),
        "general.sampling.top_k": sampling.top_k or 0,  # 0: all
        "general.sampling.top_p": float(sampling.top_p or 1),
        "general.sampling.min_p": 0.0,
    }


def _tensors(model: GPT, dtype: str) -> Iterator[_Tensor]:
    """What the file holds, in order."""
    for name, shape, values in pieces_of(model, GGUF_LAYOUTS[architecture_of(model.config)]):
        kind = GGMLQuantizationType[dtype.upper()]
        if len(shape) == 1 or name == _POSITIONS:
            kind = GGMLQuantizationType.F32
        elif shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        yield _Tensor(name, shape, values, kind)
    if (factors := model.config.rope_factors) is not None:
        yield _Tensor(ROPE_FACTORS, (len(factors),), torch.tensor(factors), GGMLQuantizationType.F32)


def _write(path: Path, metadata: Mapping[str, Any], tensors: list[_Tensor]) -> None:
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs the temporary path
    writer = _Writer(path, str(metadata["general.architecture"]))
    try:
        for key, value in metadata.items():
            if key != "general.architecture":  # GGUFWriter adds it
                stored = without_surrogates(value) if isinstance(value, str) else value
                writer.add_key_value(key, stored, *_types(value))
        for tensor in tensors:
            shape, n_bytes = tensor.shape, tensor.n_bytes
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=sum(tensor.n_bytes for tensor in tensors), desc=path.name, unit="B", unit_scale=True) as bar:
            for tensor in tensors:
                writer.write_tensor_data(_stored(tensor))
                bar.update(tensor.n_bytes)
    finally:
        writer.close()


def _stored(tensor: _Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    values = tensor.values.to(torch.float32).reshape(tensor.shape).contiguous().numpy()
    largest = max(values.max(), -values.min())
    if not largest <= _LARGEST[tensor.kind.name]:  # of NaN nothing is true
        dtype = tensor.kind.name.lower()
        remedy = "Use dtype=f32" if np.isfinite(largest) else "Export an earlier checkpoint"
        raise InputError(f"{tensor.name} holds {largest:.3g}, which {dtype} does not. {remedy}.")
    block, _ = GGML_QUANT_SIZES[tensor.kind]
    if block == 1:
        return gguf.quants.quantize(values, tensor.kind)
    # `quantize` takes 16 rows at a time: longer rows make it faster, and blocks do not reach across them.
    merged = values.size % (128 * block) == 0
    rows = values.reshape(-1, 128 * block) if merged else values
    return gguf.quants.quantize(rows, tensor.kind)


def _types(value: Any) -> tuple[gguf.GGUFValueType, ...]:
    """The type of a value in the file; of a list also that of its items, which are texts or token types."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        return kinds.ARRAY, kinds.INT32 if value and isinstance(value[0], int) else kinds.STRING
    return ({bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)],)


class _Writer(gguf.GGUFWriter):
    """A writer that also writes an empty array, which llama.cpp wants of a tokenizer without merges."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            return self._pack("I", vtype) + self._pack("I", sub_type) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)
