"""Export to Hugging Face's layout, which transformers, vLLM and this project (`model.weights=FOLDER`) read."""

from pathlib import Path
from typing import Any

from instruct_lm.data.pieces import PromptStyle
from instruct_lm.data.tokenizer import END_OF_TEXT, Tokenizer
from instruct_lm.export.chat_templates import check_prompt, end_text, jinja_template, own_text
from instruct_lm.export.safetensors_files import DTYPES, SHARD_BYTES, write_safetensors
from instruct_lm.io.files import write_json, write_text
from instruct_lm.model.generation import Sampling
from instruct_lm.model.gpt import GPT
from instruct_lm.model.hub_config import CONFIG_NAME, hub_config
from instruct_lm.model.pretrained import HUB_LAYOUTS, pieces_of
from instruct_lm.respond import Responder

GENERATION_NAME = "generation_config.json"


def save_pretrained(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    rope: dict[str, Any] | None = None,
    style: PromptStyle | None = None,
    dtype: str = "f32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, `config.json`, `generation_config.json`, the tokenizer's files and the chat template.

    Each file is written atomically.

    Args:
        model: A model without adapters.
        tokenizer: The model's.
        folder: The destination, which is created if it does not exist.
        rope: As for `hub_config`.
        style: The prompt style to write as the chat template; None: the tokenizer's own template, if it has one, as it
            stands.
        dtype: Of all tensors: `f32`, `f16` or `bf16`.
        shard_bytes: Largest file of weights.

    Raises:
        InputError: As for `hub_config` and `write_safetensors`.
    """
    config = hub_config(model.config, rope)
    write_safetensors(pieces_of(model, HUB_LAYOUTS[config["model_type"]]), folder, dtype, shard_bytes)
    save_tokenizer(tokenizer, style, model.config.block_size, folder)
    tokens = _token_ids(tokenizer, style)
    ids = {key: tokens[key] for key in ("bos_token_id", "eos_token_id")}
    # No pad_token_id: in training, transformers gives that row of the embedding no gradient.
    config |= ids | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    write_json(config, folder / CONFIG_NAME)
    write_json(tokens, folder / GENERATION_NAME)


def write_huggingface(responder: Responder, folder: Path, dtype: str, rope: dict[str, Any] | None = None) -> None:
    """`save_pretrained` with the responder's prompt style, and its settings for `generate`.

    Raises:
        InputError: As for `save_pretrained`.
    """
    save_pretrained(responder.model, responder.tokenizer, folder, rope, responder.style, dtype)
    write_json(generation_settings(responder), folder / GENERATION_NAME)


def generation_settings(responder: Responder) -> dict[str, Any]:
    """The content of `generation_config.json`: `generate` stops and chooses tokens as the responder does."""
    tokens = _token_ids(responder.tokenizer, responder.style)
    return tokens | {"max_new_tokens": responder.max_new_tokens} | _sampling(responder.sampling)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    # What is left out is not off in transformers 4: top_k is then 50.
    limits = {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    return {"do_sample": True, "temperature": sampling.temperature, **limits}


def _token_ids(tokenizer: Tokenizer, style: PromptStyle | None) -> dict[str, Any]:
    bos = tokenizer.control_tokens.get(tokenizer.template_variables.get("bos_token", ""))
    ends = sorted(tokenizer.stop_tokens_with(style.end if style else ""))
    pad = tokenizer.control_tokens.get(_pad_token(tokenizer, style), tokenizer.end_of_text)
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": pad}


def _pad_token(tokenizer: Tokenizer, style: PromptStyle | None) -> str:
    """The token for padding: the model's own or another control token, if it can be one that no prompt contains."""
    named, control, end = tokenizer.template_variables, tokenizer.control_tokens, end_text(style, tokenizer)
    own = own_text(style) if style else ""
    contained = {text for text in control if text in own} | {end}
    known = [named.get("pad_token", ""), *(text for text in control if "pad" in text.lower())]
    known += [named.get("unk_token", ""), END_OF_TEXT, *named.values(), *control]
    known = [text for text in known if text in control and text != named.get("bos_token")]
    return next((text for text in known if text not in contained), [*known, end][0])


def save_tokenizer(tokenizer: Tokenizer, style: PromptStyle | None, block_size: int, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; the last as `save_pretrained` says.

    Transformers from 4.44 on reads that file, and so does `load_tokenizer`.
    """
    end, template = end_text(style, tokenizer), tokenizer.chat_template
    named = {"eos_token": end, **tokenizer.template_variables, "pad_token": _pad_token(tokenizer, style)}
    if style is not None:
        template = jinja_template(style, tokenizer)
        if "eos_token" not in template:
            named["eos_token"] = end  # programs that know one end token know that of the answers
    definition, settings = tokenizer.hub_files(named)
    settings |= {"model_max_length": block_size, "padding_side": "left"}
    if style is not None and template is not None:
        check_prompt(template, style, tokenizer)
    if template is not None:
        write_text(template, folder / "chat_template.jinja")
    write_json(definition, folder / "tokenizer.json")
    write_json(settings, folder / "tokenizer_config.json")
