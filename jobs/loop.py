"""Run a file of jobs, each on what the ones before it made: search → make → judge → encode → index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import dataset, encode, generate, index, translate
from llmvis.cluster.session import session
from llmvis.config import EncodeConfig, IndexConfig, parse
from llmvis.config_bulk import DatasetConfig, GenerateConfig, LoopConfig, SeedsConfig, TranslateConfig
from llmvis.entry import entry
from llmvis.index import read_info
from llmvis.ledger import read_manifest
from llmvis.models.load import describe_encoder
from llmvis.models.load_synthesis import MakeOptions, describe_synthesis
from llmvis.schema import MAKERS
from llmvis.seeds import copy_seeds
from llmvis.sources import open_source
from llmvis.sources.prompts import PromptSource
from llmvis.steps import Step, read_steps
from llmvis.storage import open_store
from llmvis.summary import size

CONFIGS: dict[str, type[Any]] = {
    "seeds": SeedsConfig,
    "translate": TranslateConfig,
    "generate": GenerateConfig,
    "dataset": DatasetConfig,
    "encode": EncodeConfig,
    "index": IndexConfig,
}


def run_seeds(config: SeedsConfig) -> dict[str, Any]:
    """Copies what answers the queries, unless that was done."""
    store = open_store(config.out)
    asked = {"index": config.index, "queries": list(config.queries), "k": config.k}
    if store.exists("manifest.json") and (done := read_manifest(store, "seeds"))["source"] == asked:
        manifest = done
    else:
        manifest = copy_seeds(config.index, config.queries, config.k, config.out)
    print(f"seeds: {manifest['rows']:,} pictures for {len(config.queries):,} queries in {config.out}")
    return manifest


RUN: dict[str, Callable[[Any], Any]] = {
    "seeds": run_seeds,
    "translate": translate.run,
    "generate": generate.run,
    "dataset": dataset.run,
    "encode": encode.run,
    "index": index.run,
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a step will write, at most, or has written."""

    rows: int
    bytes: int
    done: bool


def expect(step: Step, before: dict[str, Expected]) -> Expected:
    """Of a step, from its flags and what the steps before it write; what is done is counted."""
    store, config = open_store(step.config.out), step.config
    if step.job != "index" and store.exists("manifest.json"):
        manifest = read_manifest(store, *MAKERS, "encode")
        return Expected(rows=manifest["rows"], bytes=sum(f["bytes"] for f in manifest["files"]), done=True)
    above = sum(before[name].rows for name in step.after)
    if step.job == "seeds":
        rows = len(config.queries) * config.k
        return Expected(rows=rows, bytes=rows * 10_000, done=False)
    if step.job == "generate":
        source = PromptSource(
            config.prompts,
            seeds=range(config.variants),
            lists=config.lists,
            prompt_column=config.prompt_column,
        )
        rows = sum(map(len, source.listing()))
        side = describe_synthesis(config.model, MakeOptions(), "generate").side
        return Expected(rows=rows, bytes=rows * (side**2 + 500), done=False)
    if step.job == "translate":
        inputs = above or sum(map(len, open_source(config.images).listing()))
        rows = inputs * max(1, len(config.instruction)) * len(config.seeds)
        return Expected(rows=rows, bytes=rows * 5_000, done=False)
    if step.job == "dataset":
        return Expected(rows=above, bytes=sum(before[name].bytes for name in step.after), done=False)
    if step.job == "encode":
        rows = above or sum(map(len, open_source(config.images).listing()))
        return Expected(rows=rows, bytes=rows * (2 * describe_encoder(config.model).dim + 100), done=False)
    old = read_info(config.out)["rows"] if config.add and store.exists("CURRENT") else 0
    return Expected(rows=old + above, bytes=sum(before[name].bytes for name in step.after), done=False)


def run(config: LoopConfig) -> None:
    """Shows the plan of all steps, then runs them one after the other; each goes on where it stopped."""
    steps = read_steps(config.steps, CONFIGS)
    expected: dict[str, Expected] = {}
    print(f"loop plan: {len(steps)} steps of {config.steps}")
    for step in steps:
        expected[step.name] = told = expect(step, expected)
        many = f"{told.rows:,} rows" if told.done else f"at most {told.rows:,} rows, about {size(told.bytes)}"
        state = "done" if told.done else f"from {', '.join(step.after)}" if step.after else "begins"
        print(f"  {step.name:<12} {step.job:<10} {many:<36} {state}", flush=True)
    if config.dry_run:
        return
    with session(config.num_cpus):
        for step in steps:
            print(f"\n{step.name}: {step.job} into {step.config.out}", flush=True)
            RUN[step.job](step.config)


def main() -> None:
    run(parse(LoopConfig, "python -m jobs.loop"))


if __name__ == "__main__":
    entry(main)
