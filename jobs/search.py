"""Search an index with many queries: list → read on CPUs → encode texts and search in a pool of actors → commit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llmvis.batch_search import IndexQueries, LoadSearch, ReadRows, Version, results_schema
from llmvis.cluster.jobs import Mapping
from llmvis.cluster.planned import Way, run_planned
from llmvis.cluster.stages import Prepare
from llmvis.config import parse
from llmvis.config_bulk import BatchSearchConfig
from llmvis.entry import entry
from llmvis.index import IndexMismatchError, read_info
from llmvis.mining import write_duplicates
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.protocols import Encoder
from llmvis.sources.queries import Queries, ReadTexts, ReadVectors, VectorQueries, open_queries
from llmvis.storage import open_store


def mapping(
    config: BatchSearchConfig, source: Queries, info: dict[str, Any], load: Callable[[], Encoder]
) -> Mapping:
    """What a search is, to the job engine; `info` is the index's manifest, `load` gives its model."""
    version = Version.of(config.index, info)
    asked: Version | None = None
    prepare: Prepare = ReadTexts()
    if isinstance(source, IndexQueries):
        prepare, asked = ReadRows(), Version.of(source.describe()["root"], source.manifest)
    elif isinstance(source, VectorQueries):
        prepare = ReadVectors(source=source.describe(), dim=info["model"]["dim"])
    least = config.min_score if config.near_duplicates is None else config.near_duplicates
    settings: dict[str, Any] = {
        "k": config.hits,
        "where": config.where,
        "exact": config.exact,
        "min_score": least,
    }
    return Mapping(
        job="search",
        settings={"index": f"version {version.number}, {version.sha256[:16]}", **settings},
        about={
            "model": info["model"],
            "index": {"path": config.index, "version": version.number},
            **settings,
        },
        prepare=prepare,
        load=LoadSearch(load=load if source.texts else None, index=version, asked=asked, **settings),
        schema=results_schema(source),
    )


def queries_of(config: BatchSearchConfig, info: dict[str, Any]) -> Queries:
    """The queries, after what can be known of them is held against the index.

    Raises `IndexMismatchError` where they are of another model or dimension.
    """
    model = info["model"]
    asked = config.queries or config.index
    theirs: dict[str, Any] | None = None
    if open_store(asked).exists("CURRENT"):
        source: Queries = IndexQueries(asked)
    else:
        source = open_queries(asked, config.text_column, config.vector_column)
    if isinstance(source, IndexQueries):
        theirs = source.manifest["model"]
    elif isinstance(source, VectorQueries):
        theirs = source.model
    if theirs is not None and theirs["fingerprint"] != model["fingerprint"]:
        raise IndexMismatchError(
            f"{asked} holds vectors of {theirs['name']} ({theirs['fingerprint'][:12]}…), {config.index} those of "
            f"{model['name']} ({model['fingerprint'][:12]}…): encode the queries with the index's model"
        )
    if isinstance(source, VectorQueries) and source.dim not in (None, model["dim"]):
        raise IndexMismatchError(
            f"{asked} has vectors of {source.dim} dimensions, {config.index} of {model['dim']}"
        )
    return source


def run(config: BatchSearchConfig) -> dict[str, Any]:
    """Runs or plans the job; returns the report that is printed."""
    info = read_info(config.index)
    source = queries_of(config, info)
    model = config.model or info["model"]["name"]
    if source.texts and (found := describe_encoder(model)).fingerprint != info["model"]["fingerprint"]:
        raise IndexMismatchError(
            f"{config.index} was made with {info['model']['name']}, and {found.name} is not that: name where it "
            "lies with --model"
        )
    device = "cpu" if config.gpus_per_actor == 0 or not source.texts else "auto"
    load = partial(load_encoder, model, device=device, threads=1)
    way = Way.of(
        config,
        what={
            "index": f"{config.index}, version {info['version']}: {info['rows']:,} vectors × {info['model']['dim']}",
            "queries": "texts" if source.texts else "pictures" if source.pictures else "vectors",
            "hits": f"{config.hits} each" + (f" where {config.where}" if config.where else ""),
        },
        row_bytes=100 + 60 * config.hits,
    )

    def finish(report: dict[str, Any]) -> None:
        if config.near_duplicates is not None:
            report["near_duplicates"] = found = write_duplicates(open_store(config.out), config.index)
            print(
                f"near duplicates: {found['groups']:,} groups of {found['pictures']:,} pictures; "
                f"{found['redundant']:,} of {report['ledger']['input']:,} could go (redundant.txt)"
            )

    return run_planned(mapping(config, source, info, load), source, way, finish)


def main() -> None:
    run(parse(BatchSearchConfig, "python -m jobs.search"))


if __name__ == "__main__":
    entry(main)
