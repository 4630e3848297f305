"""A model repository in the hub's layout: which of its files are needed, and whether a folder has them.

Only the hub's `resolve/` addresses are asked for, one known name at a time, so that any mirror will do.
"""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from instruct_lm.errors import InputError
from instruct_lm.io.files import write_text
from instruct_lm.io.network import NotThereError
from instruct_lm.io.verification import beside, in_place, is_damaged

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def shard_names(index: Path) -> list[str]:
    """The names of the files that `model.safetensors.index.json` lists, sorted.

    Raises:
        InputError: It is no such index, or it names something else than a safetensors file beside it.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is no index of weights ({error!r}): delete it to fetch it anew") from error
    wrong = [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII)]
    if wrong or not names:
        listed = ", ".join(map(repr, wrong[:3])) or "nothing"
        raise InputError(f"{index} names {listed}: a shard is a .safetensors file beside it. Do not use this model")
    return sorted(names)


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks to be loaded: config.json, or weights in one file or in all the shards of its index."""
    needed = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        needed = shard_names(folder / INDEX)
    return [name for name in (CONFIG, *needed) if not (folder / name).is_file()]


def is_complete(folder: Path) -> bool:
    """Whether all the files are there, and undamaged, that the repository was found to have."""
    names = _names(folder)
    return bool(names) and all(in_place(folder / name, None) for name in names)


def damaged_files(folder: Path) -> list[str]:
    """The names of the files whose content has changed on the disk by itself."""
    return [name for name in _names(folder) if (folder / name).is_file() and is_damaged(folder / name)]


def _names(folder: Path) -> list[str]:
    """The names of the files that the repository was found to have; none where that is not known."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return [name for name in beside(folder, ".complete").read_text().split() if Path(name).name == name]
    return []


def mark_complete(folder: Path, names: list[str]) -> None:
    """Record the names of a repository's files, so that the next use needs no network."""
    with contextlib.suppress(OSError):  # a read-only cache
        write_text("\n".join(names) + "\n", beside(folder, ".complete"))


def list_files(
    folder: Path, size_of: Callable[[str], int | None], fetch: Callable[[str], None], title: str
) -> dict[str, int | None]:
    """The names of a repository's files that a model needs → the size in bytes where it is known.

    Args:
        folder: The repository's place in the cache; a file that is there is not asked for.
        size_of: Asks the server for a file's size; raises `NotThereError`.
        fetch: Fetches a file at once, for the index of the shards.
        title: What messages call the repository.

    Raises:
        InputError: There is no config.json, or no safetensors, or a shard is missing.
        DownloadError: The server or the network failed.
    """
    files: dict[str, int | None] = {}

    def has(name: str) -> bool:
        try:
            files[name] = (folder / name).stat().st_size if (folder / name).is_file() else size_of(name)
        except NotThereError:
            return False
        return True

    if not has(CONFIG):
        raise InputError(f"{title} has no {CONFIG} there: check the spelling and the revision")
    for name in OPTIONAL:
        has(name)
    if has(WEIGHTS):
        return files
    if not has(INDEX):
        raise InputError(_no_safetensors(title, next(filter(has, _PICKLES), None)))
    fetch(INDEX)
    for name in shard_names(folder / INDEX):
        if not has(name):
            raise InputError(f"{title} lacks the shard {name}, which its {INDEX} names: use another revision")
    return files


def _no_safetensors(title: str, pickle: str | None) -> str:
    if pickle is None:
        return f"{title} has no {WEIGHTS}: name one of its files, such as {title}/<file>.gguf, or use another"
    name, revision = title.removeprefix("hf:").split("@", 1)
    code = f"import transformers as t; [c.from_pretrained({name!r}, revision={revision!r}).save_pretrained('model')"
    code += " for c in (t.AutoModelForCausalLM, t.AutoTokenizer)]"
    return (
        f"{title} has no {WEIGHTS} but {pickle}, a pickle, which can run any code and is not read here.\n"
        f"  Use another revision, or convert it where you trust it, and use the folder `model`:\n"
        f'    python -c "{code}"'
    )
